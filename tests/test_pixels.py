"""projects/pixels: its parts against slow plain ones."""

import math
import sys
import unittest
from unittest import mock

import numpy as np
import torch

from common import run_here, tiny_gpt

import pixels


def toy_gpt():
    """Returns a tiny GPT that reads pictures."""
    torch.manual_seed(1)
    return tiny_gpt(vocab_size=pixels.GREYS + 10 * len(pixels.MOVES), block_size=64)


class Pictures(unittest.TestCase):
    def test_test_pictures_are_not_used_to_choose_settings(self):
        all_pictures, all_digits = pixels.load_pictures(validation=False)
        pictures, digits = pixels.load_pictures(validation=True)
        self.assertEqual(all_pictures.shape, (1797, 64))
        self.assertTrue(np.array_equal(all_pictures[:-pixels.HELD_OUT], pictures))
        self.assertTrue(np.array_equal(all_digits[:-pixels.HELD_OUT], digits))
        # All digits are among the held-out ones.
        self.assertTrue((np.bincount(all_digits[-pixels.HELD_OUT:]) > 20).all())

    def test_moves(self):
        picture = np.random.default_rng(1).integers(1, 17, size=(1, 64))
        for down, right in pixels.MOVES:
            moved = pixels.move(picture, down, right).reshape(8, 8)
            for y in range(8):
                for x in range(8):
                    inside = 0 <= y - down < 8 and 0 <= x - right < 8
                    expected = picture[0, 8 * (y - down) + x - right] if inside else 0
                    self.assertEqual(moved[y, x], expected)

    def test_a_row_is_a_token_of_digit_and_move_and_then_the_pixels(self):
        pictures, _ = pixels.load_pictures(validation=False)
        first = set()
        for way, move in enumerate(pixels.MOVES):
            x, y = pixels.to_tokens(pictures[:3], np.array([0, 1, 9]), way)
            self.assertEqual(y.tolist(), pixels.move(pictures[:3], *move).tolist())
            self.assertTrue(torch.equal(x[:, 1:], y[:, :-1]))
            first.update(x[:, 0].tolist())
        self.assertEqual(len(first), 3 * len(pixels.MOVES))
        self.assertGreaterEqual(min(first), pixels.GREYS)

    def test_help_needs_no_scikit_learn(self):
        with mock.patch.dict(sys.modules, {"sklearn": None, "matplotlib": None}):
            status, _, errors = run_here(pixels.main, "--help")
        self.assertEqual((status, errors), (0, ""))


class Scores(unittest.TestCase):
    def test_counting(self):
        rng = np.random.default_rng(1)
        pictures = rng.integers(17, size=(9, 64))
        contexts = rng.integers(5, size=(9, 64))
        # For each context the grey levels that were seen in it.
        seen = {context: pictures[:6][contexts[:6] == context].tolist() for context in range(5)}
        bits = []
        for context, grey in zip(contexts[6:].flat, pictures[6:].flat):
            share = (seen[context].count(grey) + 1) / (len(seen[context]) + 17)
            bits.append(-math.log2(share))
        with mock.patch.object(pixels, "HELD_OUT", 3):
            self.assertAlmostEqual(pixels.count_bits(contexts, pictures), np.mean(bits))

    def test_likelihoods_pixel_by_pixel(self):
        model = toy_gpt()
        pictures = pixels.load_pictures(validation=False)[0][:2]
        found = pixels.log_likelihoods(model, pictures, pixels=20)
        self.assertEqual(found.shape, (2, 10))
        for n, digit in ((0, 0), (1, 9)):
            tokens = [pixels.GREYS + digit]
            total = 0.0
            for pixel in pictures[n, :20].tolist():
                logits, _ = model(torch.tensor([tokens]))
                total += logits[0, -1].log_softmax(-1)[pixel].item()
                tokens.append(pixel)
            self.assertAlmostEqual(found[n, digit].item(), total, delta=1e-3)

    def test_the_report_is_that_of_plain_probabilities(self):
        pictures, digits = (part[-200:] for part in pixels.load_pictures(validation=False))
        truth = digits[-50:]
        log_p = torch.from_numpy(np.random.default_rng(1).normal(-70, 3, size=(50, 10)))
        log_p[range(50), truth] += 4
        with mock.patch.multiple(pixels, HELD_OUT=50, log_likelihoods=lambda *_: log_p):
            with self.assertLogs("mingpt.pixels") as logs:
                pixels.report(None, pictures, digits)
        p = log_p.exp().numpy()
        bits = -np.log2(p.mean(axis=1)).mean() / 64
        told = -np.log2(p[range(50), truth]).mean() / 64
        printed = "\n".join(logs.output)
        self.assertIn(f"the model                 {bits:.4f}", printed)
        self.assertIn(f"told the digit {told:.4f}", printed)
        self.assertIn(f"the model                 {(p.argmax(1) == truth).mean():.2%}", printed)
