"""The bench at toy size, and the models that it compares."""

import contextlib
import io
import json
import os
import unittest
from unittest import mock

import torch

from common import Folder, run_here, tiny_gpt

import bench
from mingpt.model import NewGELU
from peers import PEERS


class Bench(Folder):
    def test_every_part_at_toy_size(self):
        # The bench sets variables of its process.
        with mock.patch.dict(os.environ):
            status, printed, errors = run_here(
                bench.main, "--toy", "--rounds=1", f"--out={self.folder}")
        self.assertEqual((status, errors), (0, ""))
        models = {"minGPT", "nanoGPT", "transformers", "this library"}
        for part, ways in (
                ("train", models), ("generate", models),
                ("bpe", {"tiktoken", "transformers", "this library, warm", "this library, cold"})):
            lines = (self.folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
            head, *rows = [json.loads(line) for line in lines]
            self.assertIn(f"torch {torch.__version__}", head["machine"])
            self.assertEqual({row["way"] for row in rows}, ways)
            self.assertIn(f"\n| {part} | ", printed)
            self.assertTrue((self.folder / f"{part}.png").exists())

    def test_what_does_not_fit_is_named_and_left_out(self):
        good = mock.Mock()
        large = mock.Mock(side_effect=torch.OutOfMemoryError)
        part = bench.Bench("train", rounds=3, device="cpu", toy=True)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            times = part.take_turns({"large": large, "good": good})
        self.assertEqual(printed.getvalue(), "large does not fit into memory\n")
        self.assertEqual({name: len(values) for name, values in times.items()}, {"good": 3})
        # A round warms up.
        self.assertEqual((large.call_count, good.call_count), (1, 4))

    def test_operations_of_a_step_are_the_products_of_a_real_model(self):
        n_layer, _, C, V = bench.SIZES["toy"]
        model = bench.make_models("toy", T=8, pdrop=0.0)[bench.OURS]
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        weights = sum(linear.weight.numel() for linear in linears)
        # Scores and sums of values: two products, half of T tokens each.
        attention = n_layer * 2 * C * 8 / 2
        self.assertEqual(bench.count_operations("toy", 8, 100), 100 * 2 * 3 * (weights + attention))


def for_transformers(state: dict) -> dict:
    """Renames weights, and turns the matrices that transformers multiplies transposed."""
    renamed = {}
    for name, weight in state.items():
        in_block = name.startswith("transformer.h.") and weight.dim() == 2
        renamed[f"net.{name}"] = weight.t() if in_block else weight
    return renamed


class Peers(unittest.TestCase):
    def check(self, name: str, act: torch.nn.Module, convert=lambda state: state, new: int = 8):
        """Compares logits, loss and the tokens written, past block_size where `new` is 8."""
        torch.manual_seed(1)
        gpt = tiny_gpt(tie_weights=True, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
        for block in gpt.transformer.h:
            block.mlp.act = act
        peer = PEERS[name](gpt.config).eval()
        peer.load_state_dict(convert(gpt.state_dict()))
        x, y = torch.randint(11, (2, 2, 8))
        for one, other in zip(peer(x, y), gpt(x, y)):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        written = peer.generate(x[:, :3], new)
        self.assertTrue(torch.equal(written, gpt.generate(x[:, :3], new)))

    def test_each_computes_what_this_library_does(self):
        self.check("minGPT", NewGELU())
        self.check("nanoGPT", torch.nn.GELU())
        self.check("transformers", NewGELU(), for_transformers, new=4)
