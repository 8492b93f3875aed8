"""projects/finetune on a tiny model with a vocabulary of bytes: what is cut, trained and saved."""

import json
import math
import re

import torch

from common import WorkingFolder, byte_encoder, run_forked, run_here, tiny_gpt
from mingpt.model import GPT
from mingpt.pretrained import load_encoder, save_encoder

import finetune

TEXT = "".join(f"Größe {i}, a line of text to learn from.\n" for i in range(200))
SHORT = ("--data.path=in.txt", "--model.name=tiny", "--data.block_size=16", "--model.dropout=0",
         "--trainer.max_iters=20", "--trainer.batch_size=4", "--trainer.eval_interval=10",
         "--trainer.learning_rate=3e-3", "--system.length=20")


class Finetune(WorkingFolder):
    def setUp(self):
        super().setUp()
        torch.manual_seed(1)
        # The vocabulary is padded: five rows stand for no token.
        tiny_gpt(vocab_size=264, block_size=32, n_layer=3).save_pretrained("tiny")
        save_encoder(byte_encoder(), "tiny")
        (self.folder / "in.txt").write_text(TEXT, encoding="utf-8")

    def train(self, *args) -> tuple[str, list[float]]:
        """Returns what a run prints, and the losses in it."""
        status, printed, errors = run_here(finetune.main, *SHORT, *args)
        self.assertEqual((status, errors), (0, ""), printed)
        losses = re.findall(r"loss ([\d.]+) nats per token, perplexity", printed)
        return printed, list(map(float, losses))

    def val_losses(self) -> dict[int, float]:
        """Returns the validation losses of a run by step."""
        with open("out/finetune/metrics.jsonl", encoding="utf-8") as file:
            rows = map(json.loads, file)
            return {row["iteration"]: row["loss"] for row in rows if row["split"] == "val"}

    def test_it_learns_and_writes_with_the_result(self):
        _, (before, after) = self.train()
        self.assertLess(after, before - 1)
        self.assertEqual(list(self.val_losses()), [0, 10, 20])

        model = GPT.from_pretrained("out/finetune/model")
        encoder = load_encoder("out/finetune/model", 259)
        self.assertEqual((model.block_size, model.config.vocab_size), (16, 259))
        status, sampled, errors = run_here(
            finetune.main, "--system.mode=sample", "--system.prompt=a line", "--system.length=30",
            "--system.temperature=0")
        idx = torch.tensor([encoder.encode("a line")])
        expected = model.generate(idx, 30, stop_token=encoder.eot_token)[0]
        self.assertEqual((status, sampled, errors), (0, encoder.decode(expected) + "\n", ""))

    def test_bits_are_per_byte_of_text(self):
        printed, losses = self.train("--trainer.max_iters=0")
        encoder = byte_encoder()
        tokens = encoder.encode(TEXT)
        targets = tokens[len(tokens) * 9 // 10 + 1:]
        size = len(b"".join(encoder.token_bytes[token] for token in targets))
        bits = float(re.search(r"([\d.]+) bits per byte", printed)[1])
        self.assertAlmostEqual(bits, losses[0] * len(targets) / math.log(2) / size, delta=1e-3)

    def test_special_tokens_of_a_text_are_tokens(self):
        config = finetune.get_config()
        config.data.path = "special.txt"
        config.data.block_size = 4
        (self.folder / "special.txt").write_text("one<|endoftext|>two" * 20, encoding="utf-8")
        tokens, val_tokens = finetune.encode_text(config, byte_encoder())
        expected = byte_encoder().encode("one<|endoftext|>two" * 20, "<|endoftext|>")
        self.assertEqual([*tokens, *val_tokens], expected)
        self.assertEqual(expected.count(258), 20)

    def test_the_best_model_is_the_result(self):
        printed, losses = self.train(
            "--trainer.learning_rate=0.3", "--trainer.warmup_iters=0",
            "--trainer.schedule=constant", "--trainer.eval_interval=1")
        found = self.val_losses()
        del found[0]
        best = min(found, key=found.get)
        self.assertLess(found[best], found[20])
        self.assertIn(f"the best model is from step {best}\n", printed)
        self.assertAlmostEqual(losses[1], found[best], delta=1e-3)

    def test_two_processes_save_one_model(self):
        printed = run_forked(finetune.main, *SHORT, "--trainer.max_iters=2", count=2)
        self.assertEqual(printed.count("the model is in"), 1)
        GPT.from_pretrained("out/finetune/model")

    def load(self, block_size: int = 16, **changes) -> GPT:
        config = finetune.get_config()
        config.model.name = "tiny"
        config.data.block_size = block_size
        config.model.merge_from_dict(changes)
        return finetune.load_model(config)[0]

    def test_dropout_is_that_of_the_settings(self):
        self.assertEqual(self.load(dropout=0.3).transformer.drop.p, 0.3)

    def test_what_a_model_does_not_have_is_refused(self):
        with self.assertRaisesRegex(ValueError, "tiny has only 32 positions"):
            self.load(block_size=64)
        with self.assertRaisesRegex(ValueError, "last_blocks=4, expected 0 to 3"):
            self.load(last_blocks=4)

    def test_last_blocks_alone_are_trained(self):
        blocks = ["h.0", "h.1", "h.2"]
        for count, expected in ((0, []), (1, blocks[2:]), (3, blocks)):
            model = self.load(last_blocks=count)
            settings = finetune.get_config().trainer
            settings.learning_rate = 0.1
            optimizer = model.configure_optimizers(settings)
            idx = torch.randint(259, (2, 8))
            model(idx, idx)[1].backward()
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer.step()
            changed = {re.search(r"h\.\d|ln_f|wte|wpe|lm_head", name)[0]
                       for name, p in model.named_parameters() if not p.equal(before[name])}
            self.assertEqual(changed, {*expected, "ln_f"})
