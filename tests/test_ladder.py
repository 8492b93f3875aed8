"""projects/ladder: what each rung sees, ModernGPT against GPT, a climb in toy size, the table."""

import json
import sys
import unittest

import numpy as np
import torch

from common import ROOT, Folder, run_here, tiny_config
from mingpt.generation import can_cache
from mingpt.model import GPT
from mingpt.utils import CfgNode

sys.path.insert(0, str(ROOT / "projects" / "ladder"))
import ladder
import modern
import report

V, T = 11, 16
SWITCHES = ("rotary", "rms_norm", "qk_norm", "relu_squared", "zero_init")


def tiny_settings() -> CfgNode:
    config = tiny_config(block_size=T)
    config.merge_from_dict(dict(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0))
    return config


def make_rungs() -> dict:
    return {rung.name: rung.make(tiny_settings()).eval() for rung in ladder.RUNGS}


def tiny_modern(**switches) -> modern.ModernGPT:
    """Returns a ModernGPT in double precision, with weights that make a difference."""
    config = tiny_settings()
    config.merge_from_dict(switches)
    model = modern.ModernGPT(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.3
    return model


class Rungs(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(1)

    def test_each_gives_logits_and_a_loss_that_ignores_targets_of_minus_one(self):
        idx = torch.randint(V, (3, T))
        targets = torch.randint(V, (3, T))
        targets[:, ::2] = -1
        for name, model in make_rungs().items():
            with self.subTest(name), torch.no_grad():
                logits, loss = model(idx, targets)
                self.assertEqual(logits.shape, (3, T, V))
                log_p = logits.double().log_softmax(2)[:, 1::2]
                expected = -log_p.gather(2, targets[:, 1::2, None]).mean()
                self.assertAlmostEqual(loss.item(), expected.item(), delta=1e-5)
                self.assertIsNone(model(idx)[1])

    def test_none_looks_ahead(self):
        idx = torch.randint(V, (1, T))
        changed = idx.clone()
        changed[0, 9:] = (changed[0, 9:] + 1) % V
        for name, model in make_rungs().items():
            with self.subTest(name), torch.no_grad():
                torch.testing.assert_close(model(idx)[0][:, :9], model(changed)[0][:, :9])

    def test_how_far_back_each_looks(self):
        idx = torch.randint(V, (1, T))
        reach = {"counted pairs": 1, "pairs by gradient": 1, "MLP over 8 characters": 8}
        for name, model in make_rungs().items():
            if "Modern" in name:
                # Its blocks add nothing before it has learned.
                continue
            far = T - 1 - reach.get(name, T)
            with self.subTest(name), torch.no_grad():
                before = model(idx)[0][0, -1]
                for place in {max(far, 0), far + 1}:
                    changed = idx.clone()
                    changed[0, place] = (changed[0, place] + 1) % V
                    same = torch.equal(model(changed)[0][0, -1], before)
                    self.assertEqual(same, place == far)

    def test_pairs_are_counted(self):
        tokens = np.array([0, 1, 0, 1, 0, 2], dtype=np.uint8)
        pairs = ladder.Pairs(3)
        pairs.count(tokens)
        # After a 0 comes 1 twice and 2 once, and each pair counts once more.
        shares = pairs(torch.tensor([[0]]))[0].softmax(2)
        torch.testing.assert_close(shares, torch.tensor([[[1 / 6, 3 / 6, 2 / 6]]]))

    def test_attention_with_equal_scores_is_the_mean_of_the_past(self):
        x = torch.randn(2, T, 8)
        mean = ladder.Mean(8)
        attention = ladder.Attention(8, n_head=2)
        attention.value.load_state_dict(mean.value.state_dict())
        torch.nn.init.zeros_(attention.query.weight)
        torch.nn.init.zeros_(attention.query.bias)
        torch.testing.assert_close(attention(x), mean(x))

    def test_attention_is_that_of_mingpt(self):
        config = tiny_settings()
        theirs = GPT(config).transformer.h[0].attn
        ours = ladder.Attention(config.n_embd, config.n_head)
        names = ("query", "key", "value")
        for name, weight in zip(names, theirs.c_attn.weight.chunk(3)):
            getattr(ours, name).weight.data = weight.data
            torch.nn.init.zeros_(getattr(ours, name).bias)
        theirs.c_proj = torch.nn.Identity()
        x = torch.randn(2, T, config.n_embd)
        torch.testing.assert_close(ours(x), theirs(x))


class Modern(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(1)

    def test_without_any_change_it_is_a_gpt(self):
        torch.manual_seed(1)
        gpt = GPT(tiny_settings())
        torch.manual_seed(1)
        config = tiny_settings()
        config.merge_from_dict(dict.fromkeys(SWITCHES, False))
        model = modern.ModernGPT(config)
        idx = torch.randint(V, (2, T))
        torch.testing.assert_close(model(idx)[0], gpt(idx)[0])

    def test_generation_with_the_cache_is_that_without(self):
        idx = torch.randint(V, (3, 4))
        for switches in ({}, *({name: False} for name in SWITCHES)):
            with self.subTest(switches):
                model = tiny_modern(**switches)
                self.assertTrue(can_cache(model))
                # The window slides from the 17th token on.
                with_cache = model.generate(idx, T)
                self.assertTrue(torch.equal(with_cache, model.generate(idx, T, use_cache=False)))

    def test_the_formula_step_by_step_is_the_kernel(self):
        model = tiny_modern()
        idx = torch.randint(V, (2, T))
        expected = model(idx)[0]
        for block in model.transformer.h:
            block.attn.fused = False
        torch.testing.assert_close(model(idx)[0], expected)
        self.assertEqual(model.transformer.h[0].attn.att.shape, (2, 2, T, T))

    def test_scores_after_rotation_depend_on_the_distance_alone(self):
        angles = tiny_modern().transformer.h[0].attn.angles
        q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, T, 8)
        scores = modern.rotate(q, angles) @ modern.rotate(k, angles).transpose(2, 3)
        for distance in range(1, T):
            diagonal = scores[0, 0].diagonal(-distance)
            # The angles are those of float32.
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal),
                                       atol=1e-4, rtol=0)
        # A turn changes no length.
        torch.testing.assert_close(modern.rotate(q, angles).norm(dim=3), q.norm(dim=3))

    def test_at_the_start_a_block_adds_nothing(self):
        model = modern.ModernGPT(tiny_settings())
        x = torch.randn(2, T, 16)
        self.assertTrue(torch.equal(model.transformer.h[0](x), x))

    def test_each_switch_removes_its_part(self):
        parts = {"rotary": modern.NoPositions, "rms_norm": torch.nn.RMSNorm,
                 "relu_squared": modern.SquaredReLU}
        for name, kind in parts.items():
            for is_on in (True, False):
                model = tiny_modern(**{name: is_on})
                self.assertEqual(any(isinstance(m, kind) for m in model.modules()), is_on)
        # With equal lengths a large query changes nothing.
        for is_on in (True, False):
            model = tiny_modern(qk_norm=is_on, rotary=False)
            idx = torch.randint(V, (2, T))
            expected = model(idx)[0]
            for block in model.transformer.h:
                block.attn.c_attn.weight.data[:16] *= 5
                block.attn.c_attn.bias.data[:16] *= 5
            # An epsilon stands beside the length.
            same = torch.allclose(model(idx)[0], expected, atol=1e-2)
            self.assertEqual(same, is_on)

    def test_muon_takes_its_matrices(self):
        model = modern.ModernGPT(tiny_settings())
        settings = ladder.Run.get_default_config()
        settings.optimizer = "muon"
        optimizer = model.configure_optimizers(settings)
        count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        self.assertEqual(count, sum(p.numel() for p in model.parameters()))

    def test_an_odd_head_is_refused(self):
        with self.assertRaisesRegex(ValueError, "heads of 3 channels, expected an even number"):
            tiny_modern(n_embd=6)


class Climb(Folder):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "in.txt"
        self.path.write_text('the "def" of 2024\n' * 80, encoding="utf-8")

    def climb(self, *args) -> tuple[list[dict], str]:
        """Returns the rows that were written, and what was printed."""
        status, printed, errors = run_here(
            ladder.main, f"--data.path={self.path}", f"--system.work_dir={self.folder}",
            "--model.n_layer=1", "--model.n_embd=8", "--model.block_size=8",
            "--trainer.max_iters=3", *args)
        self.assertEqual((status, errors), (0, ""))
        lines = (self.folder / "seed-3407.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines], printed

    def test_all_rungs_then_the_table(self):
        rows, printed = self.climb("--system.seconds=0")
        self.assertEqual([row["rung"] for row in rows], [rung.name for rung in ladder.RUNGS])
        for row in rows:
            self.assertEqual(len(row["sample"]), 120)
            self.assertNotIn("loss_in_time", row)
            self.assertIn(f"{row['rung']}: loss {row['loss']:.4f}", printed)
        table = report.format_table(report.read_results(self.folder))
        self.assertEqual(table.count("\n"), len(rows) + 1)
        self.assertTrue(printed.endswith(table + "\n"))
        report.draw(report.read_results(self.folder), self.folder / "ladder.png")
        self.assertGreater((self.folder / "ladder.png").stat().st_size, 1000)

    def test_the_same_seconds(self):
        rungs = "counted pairs,four heads,ModernGPT without rotary"
        rows, _ = self.climb(f"--system.rungs={rungs}", "--system.seconds=0.002")
        self.assertEqual(["loss_in_time" in row for row in rows], [False, True, False])
        self.assertGreaterEqual(rows[1]["steps_in_time"], 1)

    def test_a_name_that_is_none(self):
        status, _, errors = run_here(ladder.main, "--system.rungs=four legs")
        self.assertEqual(status, 2)
        self.assertRegex(errors, "got rungs='four legs', expected some of .*four heads")


class Report(Folder):
    def write(self, seed: int, *rows: dict) -> None:
        with open(self.folder / f"seed-{seed}.jsonl", "a", encoding="utf-8") as file:
            for row in rows:
                row = dict(seed=seed, against="", parameters=1000, seconds=2.0) | row
                file.write(json.dumps(row) + "\n")

    def test_medians_gains_and_noise(self):
        for seed, loss in ((1, 2.0), (2, 2.2), (3, 2.1)):
            self.write(seed, dict(rung="a", loss=loss), dict(rung="b", loss=loss - 0.5),
                       dict(rung="c", loss=loss - 0.505, loss_in_time=loss),
                       dict(rung="d", loss=loss, against="b"))
        table = report.format_table(report.read_results(self.folder)).splitlines()
        self.assertEqual(table[2:], [
            "| a | 1,000 | 2.0 | 2.1000 (2.000 to 2.200) |  |  |",
            "| b | 1,000 | 2.0 | 1.6000 (1.500 to 1.700) | +0.500 |  |",
            "| c | 1,000 | 2.0 | 1.5950 (1.495 to 1.695) | noise | 2.1000 (2.000 to 2.200) |",
            "| d | 1,000 | 2.0 | 2.1000 (2.000 to 2.200) | -0.500 |  |",
        ])

    def test_of_several_runs_with_a_seed_the_last_counts(self):
        self.write(1, dict(rung="a", loss=2.0), dict(rung="a", loss=1.0))
        self.assertIn("| 1.0000 |", report.format_table(report.read_results(self.folder)))

    def test_an_empty_folder(self):
        status, _, errors = run_here(report.main, str(self.folder))
        self.assertEqual(status, 2)
        self.assertIn("there are no results in", errors)


if __name__ == "__main__":
    unittest.main()
