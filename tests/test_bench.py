"""The bench at toy size, the models that it compares, and the plot of a run's metrics."""

import contextlib
import io
import json
import os
import sys
import unittest
from unittest import mock

import torch

from common import ROOT, Folder, run_here, tiny_gpt

sys.path[:0] = [str(ROOT / "projects"), str(ROOT / "projects" / "bench")]
import bench
import plot
from peers import PEERS


class Bench(Folder):
    def test_every_part_at_toy_size(self):
        # The bench sets variables of its process.
        with mock.patch.dict(os.environ):
            status, printed, errors = run_here(
                bench.main, "--toy", "--rounds=1", f"--out={self.folder}")
        self.assertEqual((status, errors), (0, ""))
        for part, ways in (
                ("train", {"minGPT", "nanoGPT", "transformers", "this library"}),
                ("generate", {"minGPT", "nanoGPT", "transformers", "this library"}),
                ("bpe", {"tiktoken", "transformers", "this library, warm", "this library, cold"})):
            lines = (self.folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
            head, *rows = [json.loads(line) for line in lines]
            self.assertIn(f"torch {torch.__version__}", head["machine"])
            self.assertEqual({row["way"] for row in rows}, ways)
            for row in rows:
                self.assertTrue(0 < row["low"] <= row["ms"] <= row["high"])
                self.assertGreater(row["ratio"], 0)
                self.assertEqual(row["share"] is not None, part == "train")
            self.assertIn(f"\n| {part} | ", printed)
            self.assertTrue((self.folder / f"{part}.png").read_bytes().startswith(b"\x89PNG"))

    def test_mistakes_are_one_line(self):
        (self.folder / "other.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
        cases = [(bench.main, "dance"), (bench.main, "--rounds=0"), (bench.main, "--device=tpu"),
                 (plot.main, self.folder / "other.jsonl"), (plot.main, self.folder / "none.jsonl")]
        for main, *args in cases:
            with self.subTest(args):
                status, printed, errors = run_here(main, *args)
                self.assertEqual((status, printed), (2, ""))
                self.assertRegex(errors, r"^error: .*\n$")

    def test_what_does_not_fit_is_named_and_left_out(self):
        calls = []

        def fails() -> None:
            calls.append("fails")
            raise torch.OutOfMemoryError("too large")

        part = bench.Bench("train", rounds=3, device="cpu", toy=True)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            times = part.take_turns({"large": fails, "good": lambda: calls.append("good")})
        self.assertEqual({name: len(values) for name, values in times.items()}, {"good": 3})
        self.assertEqual(calls, ["fails", "good", "good", "good", "good"])
        self.assertEqual(printed.getvalue(), "large does not fit into memory\n")

    def test_operations_of_a_step(self):
        """Against the matrices of a real model, and the products of its attention."""
        n_layer, _, C, V = bench.SIZES["toy"]
        model = bench.make_models("toy", T=8, pdrop=0.0)[bench.OURS]
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        weights = sum(linear.weight.numel() for linear in linears)
        # Scores and sums of values: two products, half of T tokens each.
        attention = n_layer * 2 * C * 8 / 2
        self.assertEqual(bench.count_operations("toy", 8, 100), 100 * 2 * 3 * (weights + attention))


class Peers(unittest.TestCase):
    """Each peer computes what this library does when it has the same weights."""

    def setUp(self):
        torch.manual_seed(1)
        self.gpt = tiny_gpt(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, tie_weights=True)
        self.x = torch.randint(11, (2, 8))
        self.y = torch.randint(11, (2, 8))

    def check(self, name: str, state: dict) -> None:
        peer = PEERS[name](self.gpt.config).eval()
        peer.load_state_dict(state)
        for one, other in zip(peer(self.x, self.y), self.gpt(self.x, self.y)):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        # Past block_size, too.
        written = peer.generate(self.x[:, :3], 8)
        self.assertTrue(torch.equal(written, self.gpt.generate(self.x[:, :3], 8)))

    def test_mingpt(self):
        self.check("minGPT", self.gpt.state_dict())

    def test_nanogpt(self):
        for block in self.gpt.transformer.h:
            block.mlp.act = torch.nn.GELU()
        self.check("nanoGPT", self.gpt.state_dict())

    def test_transformers(self):
        state = {}
        for name, weight in self.gpt.state_dict().items():
            in_block = name.startswith("transformer.h.") and weight.dim() == 2
            state[f"net.{name}"] = weight.t() if in_block else weight
        peer = PEERS["transformers"](self.gpt.config).eval()
        peer.load_state_dict(state)
        torch.testing.assert_close(peer(self.x, self.y)[1], self.gpt(self.x, self.y)[1])
        written = peer.generate(self.x[:, :3], 4)
        self.assertTrue(torch.equal(written, self.gpt.generate(self.x[:, :3], 4)))


class Plot(Folder):
    def test_a_run_that_is_still_writing(self):
        rows = [dict(iteration=1, split="train", loss=3.0, lr=0.1),
                dict(iteration=1, split="val", loss=None), dict(iteration=2, split="val", loss=2.0),
                dict(iteration=2, split="test", exact=0.5)]
        text = "".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 3, "spl'
        path = self.folder / "metrics.jsonl"
        path.write_text(text, encoding="utf-8")
        self.assertEqual([row["loss"] for row in plot.read_rows(path)], [3.0, 2.0])
        status, printed, _ = run_here(plot.main, path)
        self.assertEqual((status, printed), (0, f"{self.folder / 'metrics.png'}\n"))
        self.assertTrue((self.folder / "metrics.png").read_bytes().startswith(b"\x89PNG"))


if __name__ == "__main__":
    unittest.main()
