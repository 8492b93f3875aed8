"""projects/finetune from end to end, on a tiny model with a vocabulary of single bytes."""

import contextlib
import io
import json
import logging
import os
import re
import sys
import unittest
from unittest import mock

import torch

from common import ROOT, Folder, close_log, get_encoder, run_python, tiny_gpt, vocabulary_folder
from mingpt.bpe import Encoder, bytes_to_unicode
from mingpt.model import GPT

FINETUNE = ROOT / "projects" / "finetune" / "finetune.py"
sys.path.insert(0, str(FINETUNE.parent))
import finetune

TEXT = "".join(f"Größe {i}, a line of text to learn from.\n" for i in range(200))
SHORT = ("--data.block_size=16", "--trainer.max_iters=20", "--trainer.batch_size=4", "--trainer.eval_interval=10", "--system.length=20",
         "--model.dropout=0", "--trainer.learning_rate=3e-3")

def byte_encoder() -> Encoder:
    """A vocabulary of the 256 bytes, two merges and <|endoftext|>."""
    merges = [("l", "i"), ("li", "n")]
    tokens = [*bytes_to_unicode().values(), *map("".join, merges), "<|endoftext|>"]
    return Encoder({token: i for i, token in enumerate(tokens)}, merges)


class Finetune(Folder):
    def setUp(self):
        super().setUp()
        torch.manual_seed(1)
        tiny_gpt(vocab_size=259, block_size=32).save_pretrained(self.folder / "tiny")
        finetune.save_encoder(byte_encoder(), self.folder / "tiny")
        (self.folder / "in.txt").write_text(TEXT, encoding="utf-8")
        self.patch(mock.patch.dict(os.environ, MINGPT_CACHE=str(vocabulary_folder()), HF_HUB_OFFLINE="1"))
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)

    def run_script(self, *args, **options):
        return run_python(FINETUNE, *args, cwd=self.folder, **options)

    def train(self, *args) -> str:
        """What a run prints; in this process, which is faster than in one of its own."""
        logger = logging.getLogger("mingpt")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            logger.setLevel(logging.INFO)
            finetune.main(["--data.path=in.txt", *SHORT, *args])
            logger.setLevel(logging.WARNING)
        close_log()
        return printed.getvalue()

    def losses(self, printed: str) -> list[float]:
        return [float(loss) for loss in re.findall(r"validation loss over all tokens: ([\d.]+) nats per token, perplexity [\d.]+", printed)]

    def test_train_load_sample(self):
        printed = self.run_script("--data.path=in.txt", "--model.name=tiny", *SHORT, "--system.prompt=a line").stdout
        before, after = self.losses(printed)
        self.assertLess(after, before - 1)
        self.assertEqual(printed.count("\na line"), 2) # a sample before, one after
        self.assertRegex(printed, r"[\d,]+ tokens: [\d,]+ to learn from, [\d,]+ to validate")
        self.assertTrue(printed.endswith("the model is in out/finetune/model\n"))
        rows = [json.loads(row) for row in (self.folder / "out/finetune/metrics.jsonl").read_text().splitlines()]
        self.assertEqual([row["iteration"] for row in rows if row["split"] == "val"], [0, 10, 20])

        folder = self.folder / "out/finetune/model"
        model, encoder = GPT.from_pretrained(str(folder)), finetune.load_encoder(folder)
        self.assertEqual(model.block_size, 16)
        from transformers import GPT2LMHeadModel, GPT2Tokenizer
        theirs, tokenizer = GPT2LMHeadModel.from_pretrained(folder).eval(), GPT2Tokenizer.from_pretrained(folder)
        self.assertEqual(tokenizer.encode("Größe of a line"), encoder.encode("Größe of a line"))
        idx = torch.tensor([encoder.encode("a line of text")])
        torch.testing.assert_close(model(idx)[0], theirs(idx).logits)

        sampled = self.run_script("--system.mode=sample", "--system.prompt=a line", "--system.length=30", "--system.temperature=0",
                                  PYTHONUTF8="0", PYTHONIOENCODING="ascii").stdout
        self.assertTrue(sampled.startswith("a line") and sampled.endswith("\n"))
        expected = encoder.decode(model.generate(torch.tensor([encoder.encode("a line")]), 30, stop_token=encoder.eot_token)[0])
        self.assertEqual(sampled.rstrip("\n"), expected.encode("ascii", "replace").decode())

    def test_tokens_are_made_once(self):
        self.train("--model.name=tiny")
        tokens, = (self.folder / "out/finetune").glob("tokens-*.bin")
        written = tokens.stat().st_mtime_ns
        self.train("--model.name=tiny", "--trainer.max_iters=1")
        self.assertEqual(tokens.stat().st_mtime_ns, written)
        encoder, folder = byte_encoder(), self.folder / "out/finetune"
        path = self.folder / "in.txt"
        self.assertEqual(finetune.encode_text(encoder, str(path), folder).tolist(), encoder.encode(TEXT))
        self.assertEqual(finetune.encode_text(get_encoder(), str(path), folder).tolist(), get_encoder().encode(TEXT)) # another vocabulary
        path.write_text(TEXT.replace("text", "TEXT<|endoftext|>"), encoding="utf-8")
        changed = finetune.encode_text(encoder, str(path), folder).tolist()
        self.assertEqual(changed, encoder.encode(TEXT.replace("text", "TEXT<|endoftext|>"), "<|endoftext|>"))
        self.assertEqual(len(list(folder.glob("tokens-*.bin"))), 3)

    def test_fresh_weights_and_gpt2s_vocabulary(self):
        printed = self.train("--model.model_type=gpt-nano", "--trainer.max_iters=2")
        self.assertAlmostEqual(self.losses(printed)[0], 10.82, delta=0.1) # ln 50257, as it knows nothing
        encoder = finetune.load_encoder(self.folder / "out/finetune/model")
        self.assertEqual(encoder.encoder, get_encoder().encoder)
        self.assertEqual(encoder.bpe_ranks, get_encoder().bpe_ranks)

    def test_the_best_model_is_the_result(self):
        printed = self.train("--model.name=tiny", "--trainer.learning_rate=0.3", "--trainer.warmup_iters=0", "--trainer.schedule=cosine", "--trainer.eval_interval=1",
                             "--trainer.lr_decay_iters=1000")
        rows = [json.loads(row) for row in (self.folder / "out/finetune/metrics.jsonl").read_text().splitlines()]
        losses = {row["iteration"]: row["loss"] for row in rows if row["split"] == "val" and row["iteration"]}
        best = min(losses, key=losses.get)
        self.assertLess(losses[best], losses[20])
        self.assertIn(f"the best model is that of step {best}\n", printed)
        self.assertAlmostEqual(self.losses(printed)[1], losses[best], places=3)

    def test_resume_and_micro_batches(self):
        muon = ("--model.name=tiny", "--trainer.optimizer=muon")
        whole = self.train(*muon, "--system.work_dir=whole")
        self.train(*muon, "--system.work_dir=parts", "--trainer.max_iters=10", "--trainer.lr_decay_iters=20")
        resumed = self.train(*muon, "--system.work_dir=parts", "--trainer.resume=True")
        self.assertEqual(self.losses(resumed), self.losses(whole)[1:])
        pieces = self.train(*muon, "--system.work_dir=pieces", "--trainer.grad_accum_steps=2")
        self.assertAlmostEqual(self.losses(pieces)[1], self.losses(whole)[1], places=3)

    def test_two_processes(self):
        printed = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", FINETUNE, "--data.path=in.txt",
                             "--model.name=tiny", *SHORT, cwd=self.folder, OMP_NUM_THREADS="1").stdout
        self.assertEqual(printed.count("the model is in"), 1)
        GPT.from_pretrained(str(self.folder / "out/finetune/model"))

    def fails(self, message, *args):
        with self.assertRaisesRegex((ValueError, OSError), message):
            finetune.main([*args])

    def test_bad_input(self):
        (self.folder / "empty.txt").write_text("")
        (self.folder / "short.txt").write_text("short")
        (self.folder / "broken.txt").write_bytes(b"good " * 100 + b"\xff")
        (self.folder / "none").mkdir()
        with_tiny = ("--model.name=tiny", *SHORT)
        self.fails("expected the name of a text file that is not empty", *with_tiny)
        self.fails("expected the name of a text file that is not empty", "--data.path=empty.txt", *with_tiny)
        self.fails("got a row of 4 tokens for a block_size of 16; take a longer text", "--data.path=short.txt", *with_tiny)
        self.fails("broken.txt is not UTF-8 text: byte 0xff at position 500", "--data.path=broken.txt", *with_tiny)
        self.fails("tiny has only 32 positions", "--data.path=in.txt", *with_tiny, "--data.block_size=64")
        self.fails("config.json", "--data.path=in.txt", "--model.name=none", *SHORT)
        self.fails("there is no model in", "--system.mode=sample", "--system.work_dir=none")
        for setting, message in (("mode=chat", "expected train or sample"), ("length=-1", "0 or more"), ("temperature=-1", "0 .* or more"), ("top_k=0", "1 or more")):
            self.fails(message, f"--system.{setting}")
        self.fails("expected muon or adamw", "--data.path=in.txt", *with_tiny, "--trainer.optimizer=sgd")
        self.assertFalse((self.folder / "out/finetune/config.json").exists())
        result = self.run_script("--data.path=none.txt", check=False)
        self.assertEqual((result.returncode, result.stderr), (2, "error: got --data.path=none.txt, expected the name of a text file that is not empty\n"))

    def test_a_vocabulary_that_does_not_fit(self):
        (self.folder / "tiny/merges.txt").unlink() # so that GPT-2's own is taken
        self.fails("tiny knows 259 tokens, but the vocabulary goes up to number 50256", "--data.path=in.txt", "--model.name=tiny", *SHORT)
        for content in ("", "#version: 0.2\na b c\n", "#version: 0.2\na"):
            (self.folder / "tiny/merges.txt").write_text(content)
            with self.assertRaisesRegex(ValueError, "no vocabulary of the GPT-2 type"):
                finetune.load_encoder(self.folder / "tiny")
        (self.folder / "tiny/merges.txt").write_text("#version: 0.2\n")
        for content in ("", "[]", "{1", '{"世": 1}'):
            (self.folder / "tiny/vocab.json").write_text(content, encoding="utf-8")
            with self.assertRaisesRegex(ValueError, "no vocabulary of the GPT-2 type"):
                finetune.load_encoder(self.folder / "tiny")


class LoadModel(Folder):
    def setUp(self):
        super().setUp()
        torch.manual_seed(2)
        self.start = tiny_gpt(vocab_size=259, block_size=32, n_layer=3)
        self.start.save_pretrained(self.folder / "tiny")

    def load(self, **changes):
        config = finetune.get_config()
        config.model.name, config.data.block_size = str(self.folder / "tiny"), 16
        config.model.merge_from_dict(changes)
        return finetune.load_model(config, byte_encoder())

    def test_positions_are_cut(self):
        model, idx = self.load(dropout=0.3).eval(), torch.randint(259, (2, 16))
        self.assertEqual((model.block_size, model.config.resid_pdrop, model.config.attn_pdrop), (16, 0.3, 0.3))
        torch.testing.assert_close(model(idx)[0], self.start(idx)[0])

    def test_last_blocks(self):
        for count, expected in ((0, {"ln_f"}), (1, {"h.2", "ln_f"}), (3, {"h.0", "h.1", "h.2", "ln_f"}), (None, None)):
            model = self.load(last_blocks=count)
            names = {re.match(r"transformer\.(h\.\d|\w+)", name)[1] for name, p in model.named_parameters() if p.requires_grad}
            self.assertEqual(names, expected or {"wte", "wpe", "h.0", "h.1", "h.2", "ln_f"})
        for count in (-1, 4, 1.5, "two"):
            with self.assertRaisesRegex(ValueError, "last_blocks"):
                self.load(last_blocks=count)

    def test_frozen_weights_stay(self):
        for optimizer in ("adamw", "muon"):
            model, config = self.load(last_blocks=1), finetune.get_config().trainer
            config.optimizer, config.learning_rate = optimizer, 0.1
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            steps = model.configure_optimizers(config)
            idx = torch.randint(259, (2, 8))
            model(idx, idx)[1].backward()
            steps.step()
            changed = {re.match(r"transformer\.(h\.\d|\w+)", name)[1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
            self.assertEqual(changed, {"h.2", "ln_f"})


if __name__ == "__main__":
    unittest.main()
