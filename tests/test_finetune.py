"""
projects/finetune from end to end, on a tiny model with a vocabulary of bytes.

    python -m unittest tests/test_finetune.py
"""

import json
import logging
import os
import re
import sys
from unittest import main, mock

import torch

from common import ROOT, Folder, run_forked, run_here, run_python, tiny_gpt, vocabulary_folder
from mingpt.bpe import Encoder, bytes_to_unicode
from mingpt.data import read_text
from mingpt.model import GPT
from mingpt.pretrained import load_encoder, save_encoder

FINETUNE = ROOT / "projects" / "finetune" / "finetune.py"
sys.path.insert(0, str(FINETUNE.parent))
import finetune

TEXT = "".join(f"Größe {i}, a line of text to learn from.\n" for i in range(200))
SHORT = ("--data.block_size=16", "--trainer.max_iters=20", "--trainer.batch_size=4",
         "--trainer.eval_interval=10", "--system.length=20", "--model.dropout=0",
         "--trainer.learning_rate=3e-3")


def byte_encoder() -> Encoder:
    """A vocabulary of the 256 bytes, two merges and <|endoftext|>."""
    merges = [("l", "i"), ("li", "n")]
    tokens = [*bytes_to_unicode().values(), *map("".join, merges), "<|endoftext|>"]
    return Encoder({token: i for i, token in enumerate(tokens)}, merges)


class Finetune(Folder):
    def setUp(self):
        super().setUp()
        torch.manual_seed(1)
        # The vocabulary is padded: five rows stand for no token.
        self.start = tiny_gpt(vocab_size=264, block_size=32, n_layer=3)
        self.start.save_pretrained(self.folder / "tiny")
        save_encoder(byte_encoder(), self.folder / "tiny")
        (self.folder / "in.txt").write_text(TEXT, encoding="utf-8")
        cache = str(vocabulary_folder())
        self.patch(mock.patch.dict(os.environ, MINGPT_CACHE=cache, HOME=str(self.folder)))
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)

    def run_script(self, *args) -> str:
        """What a run prints, in this process."""
        logger = logging.getLogger("mingpt")
        level = logger.level
        logger.setLevel(logging.INFO)
        status, printed, errors = run_here(finetune.main, *args)
        logger.setLevel(level)
        self.assertEqual((status, errors), (0, ""), printed)
        return printed

    def train(self, *args) -> str:
        return self.run_script("--data.path=in.txt", *SHORT, *args)

    def losses(self, printed: str) -> list[float]:
        pattern = r"loss ([\d.]+) nats per token, perplexity [\d.]+, [\d.]+ bits per byte"
        return [float(loss) for loss in re.findall(pattern, printed)]

    def rows(self, folder: str, split: str) -> dict[int, float]:
        """The losses of a run by step."""
        lines = (self.folder / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return {row["iteration"]: row["loss"] for row in rows if row["split"] == split}

    def test_train_load_sample(self):
        printed = self.train("--model.name=~/tiny", "--system.prompt=a line")
        before, after = self.losses(printed)
        self.assertLess(after, before - 1)
        self.assertEqual(printed.count("\na line"), 2)
        self.assertIn("tokens to learn from", printed)
        # The model is saved before the last report.
        self.assertLess(printed.index("the model is in out/finetune/model"),
                        printed.rindex("validation loss"))
        self.assertEqual(list(self.rows("out/finetune", "val")), [0, 10, 20])
        # No file holds the tokens.
        files = {path.name for path in (self.folder / "out/finetune").iterdir()}
        self.assertEqual(files, {"args.txt", "config.json", "log.txt", "metrics.jsonl",
                                 "checkpoint.pt", "best.pt", "model"})

        folder = self.folder / "out/finetune/model"
        model = GPT.from_pretrained(folder)
        encoder = load_encoder(folder, model.config.vocab_size)
        self.assertEqual((model.block_size, model.config.vocab_size), (16, 259))
        status, sampled, errors = run_here(
            finetune.main, "--system.mode=sample", "--system.prompt=a line", "--system.length=30",
            "--system.temperature=0")
        idx = torch.tensor([encoder.encode("a line")])
        expected = model.generate(idx, 30, stop_token=encoder.eot_token)[0]
        self.assertEqual((status, sampled, errors), (0, encoder.decode(expected) + "\n", ""))

    def test_bits_per_byte(self):
        printed = self.train("--model.name=tiny", "--trainer.max_iters=0")
        tokens = byte_encoder().encode(read_text("in.txt"))
        targets = tokens[len(tokens) * 9 // 10 + 1:]
        size = len(b"".join(byte_encoder().token_bytes[token] for token in targets))
        bits = self.losses(printed)[0] * len(targets) / size / 0.6931472
        self.assertAlmostEqual(float(re.search(r"([\d.]+) bits", printed)[1]), bits, delta=1e-3)

    def test_special_tokens_of_a_text_are_tokens(self):
        config = finetune.get_config()
        config.data.path = "special.txt"
        config.data.block_size = 4
        (self.folder / "special.txt").write_text("one<|endoftext|>two" * 20, encoding="utf-8")
        tokens, val_tokens = finetune.encode_text(config, byte_encoder())
        expected = byte_encoder().encode("one<|endoftext|>two" * 20, "<|endoftext|>")
        self.assertEqual([*tokens, *val_tokens], expected)
        self.assertEqual(expected.count(258), 20)

    def test_fresh_weights(self):
        for args, size in (((), 50257), (("--data.vocabulary=tiny",), 259)):
            printed = self.train("--model.model_type=gpt-nano", "--trainer.max_iters=1", *args)
            # It knows nothing, so the loss is ln V.
            expected = torch.tensor(size).log().item()
            self.assertAlmostEqual(self.losses(printed)[0], expected, delta=0.1)
            encoder = load_encoder(self.folder / "out/finetune/model", size)
            self.assertEqual(len(encoder.encoder), size)

    def test_the_best_model_is_the_result(self):
        printed = self.train("--model.name=tiny", "--trainer.learning_rate=0.3",
                             "--trainer.warmup_iters=0", "--trainer.schedule=constant",
                             "--trainer.eval_interval=1")
        losses = self.rows("out/finetune", "val")
        del losses[0]
        best = min(losses, key=losses.get)
        self.assertLess(losses[best], losses[20])
        self.assertIn(f"the best model is that of step {best}\n", printed)
        self.assertAlmostEqual(self.losses(printed)[1], losses[best], delta=1e-3)

    def test_resume(self):
        args = ("--model.name=tiny", "--trainer.optimizer=muon", "--trainer.lr_decay_iters=20",
                "--trainer.warmup_iters=4")
        whole = self.train(*args, "--system.work_dir=whole")
        self.train(*args, "--system.work_dir=parts", "--trainer.max_iters=10")
        resumed = self.train(*args, "--system.work_dir=parts", "--trainer.resume=auto")
        # A resumed run does not report where it begins.
        self.assertEqual(self.losses(resumed), self.losses(whole)[1:])

    def test_two_processes(self):
        printed = run_forked(finetune.main, "--data.path=in.txt", "--model.name=tiny", *SHORT,
                             "--trainer.max_iters=2", count=2)
        self.assertEqual(printed.count("the model is in"), 1)
        GPT.from_pretrained(self.folder / "out/finetune/model")

    def refused(self, message: str, *args) -> None:
        status, printed, errors = run_here(finetune.main, *args)
        self.assertEqual(status, 2, printed)
        self.assertRegex(errors, "^error: .*" + message)

    def test_bad_input(self):
        (self.folder / "empty.txt").write_text("")
        (self.folder / "short.txt").write_text("short of text")
        (self.folder / "broken.txt").write_bytes(b"good " * 100 + b"\xff")
        (self.folder / "none").mkdir()
        tiny = ("--model.name=tiny", *SHORT)
        self.refused("expected the name of a text file", *tiny)
        self.refused("there is no text file", "--data.path=none.txt", *tiny)
        self.refused("empty.txt is empty", "--data.path=empty.txt", *tiny)
        self.refused("short.txt has 13 characters, expected about 170 or more",
                     "--data.path=short.txt", *tiny)
        self.refused("broken.txt is not UTF-8 text", "--data.path=broken.txt", *tiny)
        self.refused("tiny has only 32 positions", "--data.path=in.txt", *tiny,
                     "--data.block_size=64")
        self.refused("config.json", "--data.path=in.txt", "--model.name=none")
        self.refused("there is no model in", "--system.mode=sample", "--system.work_dir=none")
        for setting, message in (("mode=chat", "expected train or sample"), ("length=-1", "0 or"),
                                 ("temperature=-1", "0 .* or more"), ("top_k=0", "1 or more")):
            self.refused(message, f"--system.{setting}")
        for count in ("-1", "4", "1.5", "two"):
            self.refused("last_blocks", "--data.path=in.txt", *tiny, f"--model.last_blocks={count}")
        # A model without a vocabulary gets nobody else's.
        (self.folder / "tiny/merges.txt").unlink()
        self.refused("put its tokenizer.json there", "--data.path=in.txt", *tiny)
        self.assertFalse((self.folder / "out").exists())

    def test_it_starts_as_a_script(self):
        result = run_python(FINETUNE, "--help", cwd=self.folder)
        self.assertIn("--data.vocabulary=", result.stdout)

    def load(self, **changes) -> GPT:
        config = finetune.get_config()
        config.model.name = "tiny"
        config.data.block_size = 16
        config.model.merge_from_dict(changes)
        return finetune.load_model(config)[0]

    def test_positions_and_rows_without_a_token_are_cut(self):
        model = self.load(dropout=0.3)
        self.assertEqual(model.transformer.drop.p, 0.3)
        self.assertEqual(model.config.resid_pdrop, 0.3)
        idx = torch.randint(259, (2, 16))
        logits = model.eval()(idx)[0]
        torch.testing.assert_close(logits, self.start(idx)[0][..., :259])
        # A row without a token cannot be drawn, however likely it was.
        with torch.no_grad():
            self.start.lm_head.weight[259:] = 100 * self.start.lm_head.weight[:1]
        self.start.save_pretrained("tiny")
        self.assertLess(self.load().generate(idx, 50).max().item(), 259)

    def test_last_blocks_alone_are_trained(self):
        def parts(names):
            return {re.match(r"transformer\.(h\.\d|\w+)|lm_head", name)[0] for name in names}

        blocks = ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
        for count, expected in ((0, []), (1, blocks[2:]), (3, blocks)):
            model = self.load(last_blocks=count)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            config = finetune.get_config().trainer
            config.learning_rate = 0.1
            optimizer = model.configure_optimizers(config)
            idx = torch.randint(259, (2, 8))
            model(idx, idx)[1].backward()
            optimizer.step()
            changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
            self.assertEqual(parts(changed), {*expected, "transformer.ln_f"})


if __name__ == "__main__":
    main()
