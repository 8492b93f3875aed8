"""The bench at toy size, as a user runs it; the models that it compares; the plot of a run's metrics."""

import contextlib
import io
import json
import sys
import unittest

import torch

from common import ROOT, Folder, run_python, tiny_gpt

BENCH = ROOT / "projects" / "bench"
sys.path.insert(0, str(BENCH))
import bench
from peers import PEERS

class Bench(Folder):
    def test_every_part_at_toy_size(self):
        self.check("train", "generate", "growth", "bpe")
        self.check("load")

    def check(self, *parts):
        args = (*parts, "--toy", "--rounds", 1, "--out", self.folder)
        printed = run_python(BENCH / "bench.py", *args, OMP_NUM_THREADS="1").stdout # a toy needs no second thread
        for part in parts:
            with self.subTest(part):
                self.assertIn(f"\n{part}: ", printed)
                lines = (self.folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
                head, *rows = map(json.loads, lines)
                self.assertIn(f"torch {torch.__version__}", head["machine"])
                self.assertTrue(all(0 <= row["low"] <= row["value"] <= row["high"] for row in rows))
                if part in ("train", "generate"):
                    names = {"mingpt", "mingpt, bfloat16", "mingpt, compiled", "transformers", "torch.nn"}
                    self.assertTrue(names <= {row["way"] for row in rows})
                    self.assertTrue(all(0 < row["limit"] for row in rows))
                self.assertEqual((self.folder / f"{part}.png").read_bytes()[:4], b"\x89PNG")

    def test_mistakes_are_one_line(self):
        (self.folder / "other.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
        cases = [("bench.py", "dance"), ("bench.py", "--rounds", 0), ("plot.py", "other.jsonl")]
        if not torch.cuda.is_available():
            cases.append(("bench.py", "--device=cuda"))
        for script, *args in cases:
            with self.subTest(args):
                result = run_python(BENCH / script, *args, cwd=self.folder, check=False)
                self.assertEqual((result.returncode, result.stdout), (2, ""))
                self.assertRegex(result.stderr, r"^error: .*\n$")

    def test_what_does_not_run_is_named_and_left_out(self):
        calls = []

        def fails_at(number):
            def way():
                calls.append(number)
                if calls.count(number) == number:
                    raise torch.OutOfMemoryError("too large\nand more")
            return way

        part, printed = bench.Bench("train", 3, "cpu", toy=False), io.StringIO()
        with contextlib.redirect_stdout(printed):
            times = part.take_turns({"first": fails_at(1), "second": fails_at(2), "good": lambda: None})
            part.report("empty", {})
        self.assertEqual({name: len(values) for name, values in times.items()}, {"good": 3})
        self.assertEqual(calls, [1, 2, 2])
        self.assertEqual(printed.getvalue(), "first does not run: too large\nsecond does not run: too large\n\n"
                                             "train: empty: nothing runs\n")

    def test_plot_of_metrics(self):
        rows = [dict(iteration=i, split=split, loss=1.0 / i, lr=0.1) for i in (1, 2, 3) for split in ("train", "val")]
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        run_python(BENCH / "plot.py", "metrics.jsonl", cwd=self.folder)
        self.assertEqual((self.folder / "metrics.png").read_bytes()[:4], b"\x89PNG")

class Peers(unittest.TestCase):
    """The rows of the tables compare like with like."""

    def setUp(self):
        torch.manual_seed(1)
        self.gpt = tiny_gpt(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
        self.x, self.y = torch.randint(11, (2, 8)), torch.randint(11, (2, 8))

    def check(self, name, translate):
        """The peer computes what minGPT does when it is given the same weights by other names."""
        peer = PEERS[name](self.gpt.config).eval()
        own, state = self.gpt.state_dict(), {}
        for key in peer.state_dict():
            source, transposed = translate(key)
            state[key] = own[source].t() if transposed else own[source]
        peer.load_state_dict(state)
        for one, other in zip(peer(self.x, self.y), self.gpt(self.x, self.y)):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        torch.testing.assert_close(peer.generate(self.x[:, :3], 4), self.gpt.generate(self.x[:, :3], 4))

    def test_torch_encoder(self):
        names = {
            "wte": "transformer.wte", "wpe": "transformer.wpe", "encoder.norm": "transformer.ln_f",
            "encoder.layers.": "transformer.h.", "norm1": "ln_1", "self_attn.in_proj_": "attn.c_attn.",
            "self_attn.out_proj": "attn.c_proj", "norm2": "ln_2", "linear1": "mlp.c_fc", "linear2": "mlp.c_proj"}

        def translate(key):
            for theirs, ours in names.items():
                key = key.replace(theirs, ours)
            return key, False
        self.check("torch.nn", translate)

    def test_transformers(self):
        linear = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
        self.check("transformers", lambda key: (key.removeprefix("net."), key.endswith(linear)))


if __name__ == "__main__":
    unittest.main()
