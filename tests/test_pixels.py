"""projects/pixels: the script at toy size, and its parts against slow plain ones."""

import math
import sys
import unittest
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

from common import ROOT, Folder, run_python, tiny_gpt

PIXELS = ROOT / "projects" / "pixels" / "pixels.py"

sys.path.insert(0, str(PIXELS.parent))
import pixels

def toy_gpt():
    torch.manual_seed(1)
    return tiny_gpt(vocab_size=pixels.GREYS + 10 * len(pixels.MOVES), block_size=64)


class Pictures(unittest.TestCase):
    def test_test_pictures_are_not_used_to_choose_settings(self):
        (all_pictures, all_digits), (pictures, digits) = pixels.load_pictures(False), pixels.load_pictures(True)
        self.assertEqual(all_pictures.shape, (1797, 64))
        self.assertEqual((all_pictures.min(), all_pictures.max()), (0, pixels.GREYS - 1))
        self.assertTrue(np.array_equal(all_pictures[:-pixels.HELD_OUT], pictures))
        self.assertTrue(np.array_equal(all_digits[:-pixels.HELD_OUT], digits))
        self.assertTrue((np.bincount(all_digits[-pixels.HELD_OUT:]) > 20).all()) # mixed well

    def test_moves(self):
        pictures = np.random.default_rng(1).integers(17, size=(2, 64))
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                moved = pixels.move(pictures, down, right)
                for n in range(2):
                    for y in range(8):
                        for x in range(8):
                            from_y, from_x = y - down, x - right
                            inside = 0 <= from_y < 8 and 0 <= from_x < 8
                            expected = pictures[n, 8 * from_y + from_x] if inside else 0
                            self.assertEqual(moved[n, 8 * y + x], expected)

    def test_tokens(self):
        x, y = pixels.to_tokens(np.arange(128).reshape(2, 64) % 17, np.array([3, 9]))
        self.assertEqual(x[:, 0].tolist(), [20, 26])
        self.assertEqual(y.flatten().tolist(), [i % 17 for i in range(128)])
        self.assertTrue(torch.equal(x[:, 1:], y[:, :-1]))
        pictures, first = pixels.load_pictures(False)[0][:2], []
        for way, (down, right) in enumerate(pixels.MOVES):
            x, y = pixels.to_tokens(pictures, np.array([0, 9]), way)
            self.assertEqual(y.tolist(), pixels.move(pictures, down, right).tolist())
            first += x[:, 0].tolist()
        self.assertEqual(len(set(first)), 18) # each digit and move has a token of its own
        self.assertTrue(min(first) >= pixels.GREYS)


class Scores(unittest.TestCase):
    def test_counting(self):
        rng = np.random.default_rng(1)
        pictures, contexts = rng.integers(17, size=(9, 64)), rng.integers(5, size=(9, 64))
        seen = {} # context -> the grey levels that followed
        for picture in range(6):
            for i in range(64):
                seen.setdefault(contexts[picture, i], []).append(pictures[picture, i])
        bits = [-math.log2((seen[contexts[n, i]].count(pictures[n, i]) + 1) / (len(seen[contexts[n, i]]) + 17))
                for n in range(6, 9) for i in range(64)]
        with mock.patch.object(pixels, "HELD_OUT", 3):
            self.assertAlmostEqual(pixels.count_bits(contexts, pictures), sum(bits) / len(bits))

    def test_likelihoods_pixel_by_pixel(self):
        model, pictures = toy_gpt(), pixels.load_pictures(False)[0][:2]
        for count in (20, 64):
            found = pixels.log_likelihoods(model, pictures, count)
            self.assertEqual(found.shape, (2, 10))
            for n, digit in ((0, 0), (1, 0), (0, 7), (1, 9)):
                tokens, total = [pixels.GREYS + digit], 0.0
                for pixel in pictures[n, :count].tolist():
                    logits, _ = model(torch.tensor([tokens]))
                    total += logits[0, -1].softmax(-1)[pixel].log().item()
                    tokens.append(pixel)
                self.assertAlmostEqual(found[n, digit].item(), total, delta=1e-3)

    def test_report(self):
        """The model's part by plain probabilities, with a p(picture | digit) of our own choice."""
        pictures, digits = (part[-200:] for part in pixels.load_pictures(False))
        rng = np.random.default_rng(1)
        log_p = torch.from_numpy(rng.normal(-70, 3, size=(50, 10)))
        log_p[range(50), digits[-50:]] += 4 # of the right digit
        with mock.patch.multiple(pixels, HELD_OUT=50, log_likelihoods=lambda *_: log_p):
            with self.assertLogs("mingpt.pixels") as logs:
                pixels.report(None, pictures, digits)
        p = log_p.exp().tolist()
        bits = [-math.log2(sum(row) / 10) / 64 for row in p]
        told = [-math.log2(row[digit]) / 64 for row, digit in zip(p, digits[-50:])]
        right = [max(range(10), key=lambda digit: row[digit]) == truth for row, truth in zip(p, digits[-50:])]
        self.assertIn(f"pixel: {sum(bits) / 50:.4f}, told the digit {sum(told) / 50:.4f}; by", logs.output[0])
        self.assertIn(f"recognised: {sum(right) / 50:.2%};", logs.output[1])
        self.assertTrue(5 < sum(right) < 50)


class Attention(unittest.TestCase):
    def test_against_the_weights_that_the_model_uses(self):
        used = [] # (1, nh, T, T) of each layer

        def plain_attention(q, k, v, mask, dropout_p, is_causal):
            T = q.size(2)
            scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3)) # (1, nh, T, T)
            used.append(scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf).softmax(-1))
            return used[-1] @ v

        model, x = toy_gpt(), torch.arange(12) % 17
        with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", plain_attention):
            model(x[None])
        expected = torch.stack([weights[0, :, -1] for weights in used]) # (n_layer, nh, T)
        found = pixels.attention(model, x)
        self.assertEqual(found.shape, (2, 2, 12))
        torch.testing.assert_close(found, expected)


class Sheet(Folder):
    def test_pictures_are_in_their_places(self):
        pictures = torch.arange(6.0)[:, None].expand(6, 64).reshape(2, 3, 64)
        with mock.patch("matplotlib.axes.Axes.imshow") as imshow:
            pixels.draw_sheet(self.folder / "sheet.png", pictures, ["a", "b", "c"], [0, 1])
        grid = imshow.call_args.args[0]
        self.assertEqual(grid.shape, (17, 26))
        for row in range(2):
            for column in range(3):
                self.assertTrue((grid[9 * row:9 * row + 8, 9 * column:9 * column + 8] == 3 * row + column).all())
        self.assertTrue(grid[8].isnan().all() and grid[:, 8].isnan().all() and grid[:, 17].isnan().all())


class Script(Folder):
    def test_trains_scores_and_draws(self):
        printed = run_python(PIXELS, "--model.n_layer=1", "--model.n_head=1", "--model.n_embd=16",
                             "--trainer.max_iters=20", "--trainer.eval_interval=0", cwd=self.folder).stdout
        self.assertRegex(printed, r"pixel: \d\.\d{4}, told the digit \d\.\d{4}; "
                                  r"by place alone 2\.\d{4}, by neighbours alone 2\.\d{4}")
        self.assertRegex(printed, r"digits recognised: \d+\.\d\d%; logistic regression 9\d\.\d\d%")
        folder = self.folder / "out" / "pixels"
        for name in ("samples", "completions", "attention"):
            picture = (folder / f"{name}.png").read_bytes()
            self.assertTrue(picture.startswith(b"\x89PNG") and len(picture) > 1000)
