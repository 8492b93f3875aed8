"""projects/ladder: the rungs and the parts of ModernGPT against plain formulas, and the table."""

import itertools
import json
import unittest

import numpy as np
import torch

from common import Folder, tiny_config, uses_cache
from mingpt.model import GPT

import ladder
import modern
import report

V, T = 11, 16
SWITCHES = ("rotary", "rms_norm", "qk_norm", "relu_squared", "zero_init")


def settings(**changes):
    return tiny_config(block_size=T, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, **changes)


def tiny_modern(**switches) -> modern.ModernGPT:
    """Returns a ModernGPT in double precision, with weights that make a difference."""
    model = modern.ModernGPT(settings(**switches)).double().eval()
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
        for rung in ladder.RUNGS:
            with self.subTest(rung.name):
                model = rung.make(settings())
                logits, loss = model(idx, targets)
                log_p = logits.log_softmax(2)[:, 1::2]
                expected = -log_p.gather(2, targets[:, 1::2, None]).mean()
                torch.testing.assert_close(loss, expected)
                self.assertIsNone(model(idx)[1])

    def test_how_far_back_each_looks_and_none_looks_ahead(self):
        reach = {"counted pairs": 1, "pairs by gradient": 1, "last 8 characters": 8}
        idx = torch.randint(V, (1, T))
        place = 5
        changed = idx.clone()
        changed[0, place] = (changed[0, place] + 1) % V
        for rung in ladder.RUNGS:
            # The blocks of a fresh ModernGPT add nothing.
            model = tiny_modern().float() if "Modern" in rung.name else rung.make(settings())
            differences = (model(changed)[0] - model(idx)[0]).abs().amax(2)[0]  # (T,)
            places = torch.nonzero(differences > 1e-5).flatten().tolist()
            end = min(T, place + reach.get(rung.name, T))
            self.assertEqual(places, list(range(place, end)), rung.name)

    def test_pairs_are_counted(self):
        pairs = ladder.Pairs(3)
        pairs.count(np.array([0, 1, 0, 1, 0, 2], dtype=np.uint8))
        # After a 0 comes 1 twice and 2 once, and each pair counts once more.
        shares = pairs(torch.tensor([[0]]))[0].softmax(2)
        torch.testing.assert_close(shares, torch.tensor([[[1 / 6, 3 / 6, 2 / 6]]]))

    def test_the_mean_is_that_of_itself_and_all_before(self):
        x = torch.randn(2, T, 8)
        mean = ladder.Mean(8)
        for t in range(T):
            torch.testing.assert_close(mean(x)[:, t], mean.value(x)[:, :t + 1].mean(1))

    def test_attention_is_that_of_mingpt(self):
        theirs = GPT(settings()).transformer.h[0].attn
        ours = ladder.Attention(16, n_head=2)
        for name, weight in zip(("query", "key", "value"), theirs.c_attn.weight.chunk(3)):
            getattr(ours, name).weight.data = weight.data
            torch.nn.init.zeros_(getattr(ours, name).bias)
        theirs.c_proj = torch.nn.Identity()
        x = torch.randn(2, T, 16)
        torch.testing.assert_close(ours(x), theirs(x))


def attend_by_hand(x: torch.Tensor, attention: modern.ModernAttention) -> torch.Tensor:
    """Computes attention for one row (T, C), head by head and token by token."""
    heads = []
    for q, k, v in zip(*(part.chunk(2, dim=1) for part in attention.c_attn(x).chunk(3, dim=1))):
        if attention.qk_norm:
            q = q / q.square().mean(1, keepdim=True).sqrt()
            k = k / k.square().mean(1, keepdim=True).sqrt()
        if attention.rotary:
            # A pair of numbers is a complex one, and turning it is a product.
            speeds = torch.tensor([10_000 ** (-i / 4) for i in range(4)], dtype=torch.float64)
            turns = torch.exp(1j * torch.arange(len(x))[:, None] * speeds)  # (T, 4)
            q, k = (torch.complex(*part.chunk(2, dim=1)) * turns for part in (q, k))
        scores = (q @ k.T.conj()).real / 8 ** 0.5  # (T, T)
        rows = [scores[t, :t + 1].softmax(0) @ v[:t + 1] for t in range(len(x))]
        heads.append(torch.stack(rows))
    return attention.c_proj(torch.cat(heads, dim=1))


class Modern(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(1)

    def test_without_any_change_it_is_a_gpt(self):
        idx = torch.randint(V, (2, T))
        torch.manual_seed(1)
        gpt = GPT(settings())
        torch.manual_seed(1)
        model = modern.ModernGPT(settings(**dict.fromkeys(SWITCHES, False)))
        torch.testing.assert_close(model(idx)[0], gpt(idx)[0])

    def test_attention_is_its_formula(self):
        x = torch.randn(1, T, 16, dtype=torch.float64)
        for rotary, qk_norm, fused in itertools.product((True, False), repeat=3):
            attention = tiny_modern(rotary=rotary, qk_norm=qk_norm).transformer.h[0].attn
            attention.fused = fused
            with self.subTest(rotary=rotary, qk_norm=qk_norm, fused=fused):
                # The angles are rounded to float32.
                torch.testing.assert_close(
                    attention(x)[0], attend_by_hand(x[0], attention), atol=1e-5, rtol=0)

    def test_a_block_is_its_formula(self):
        x = torch.randn(1, T, 16, dtype=torch.float64)
        block = tiny_modern().transformer.h[0]

        def norm(x, weight):
            return x / x.square().mean(2, keepdim=True).sqrt() * weight

        middle = x + block.attn(norm(x, block.ln_1.weight))
        hidden = block.mlp.c_fc(norm(middle, block.ln_2.weight)).clamp(min=0) ** 2
        torch.testing.assert_close(block(x), middle + block.mlp.c_proj(hidden))
        # Before it has learned, it adds nothing.
        block = modern.ModernGPT(settings()).transformer.h[0]
        self.assertTrue(torch.equal(block(x.float()), x.float()))

    def test_generation_with_the_cache_is_that_without(self):
        idx = torch.randint(V, (3, 4))
        for switches in ({}, *({name: False} for name in SWITCHES)):
            with self.subTest(switches):
                model = tiny_modern(**switches)
                self.assertTrue(uses_cache(model))
                # The window slides from the 17th token on.
                with_cache = model.generate(idx, T)
                self.assertTrue(torch.equal(with_cache, model.generate(idx, T, use_cache=False)))


class Report(Folder):
    def test_the_table_has_medians_gains_and_noise_and_of_equal_seeds_the_last(self):
        for seed, loss in ((1, 9.0), (1, 2.0), (2, 2.2), (3, 2.1)):
            rows = [dict(rung="a", loss=loss), dict(rung="b", loss=1.6),
                    dict(rung="c", loss=loss - 0.505, loss_in_time=loss),
                    dict(rung="d", loss=loss, against="b")]
            with open(self.folder / f"seed-{seed}.jsonl", "a", encoding="utf-8") as file:
                for row in rows:
                    row = dict(seed=seed, against="", parameters=1000, seconds=2.0) | row
                    file.write(json.dumps(row) + "\n")
        table = report.format_table(report.read_results(self.folder)).splitlines()
        self.assertEqual(table[2:], [
            "| a | 1,000 | 2.0 | 2.1000 (2.000 to 2.200) |  |  |",
            "| b | 1,000 | 2.0 | 1.6000 (1.600 to 1.600) | +0.500 |  |",
            "| c | 1,000 | 2.0 | 1.5950 (1.495 to 1.695) | noise | 2.1000 (2.000 to 2.200) |",
            "| d | 1,000 | 2.0 | 2.1000 (2.000 to 2.200) | -0.500 |  |",
        ])
