"""projects/adder: problems and their splits, scores, and the script that looks inside."""

import unittest
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from common import tiny_gpt

import adder
import inside


def make_dataset(split: str, **changes) -> adder.AdditionDataset:
    config = adder.AdditionDataset.get_default_config()
    config.merge_from_dict(changes)
    return adder.AdditionDataset(config, split)


def toy_gpt():
    """Returns a tiny GPT that reads problems of two digits; it has learned nothing."""
    torch.manual_seed(1)
    return tiny_gpt(vocab_size=10, block_size=6)


class Problems(unittest.TestCase):
    def test_every_problem_is_in_one_split_once(self):
        for ndigit, count in ((1, 20), (2, 500)):
            splits = [make_dataset(split, ndigit=ndigit) for split in ("train", "test")]
            problems = [split.problems(range(len(split))).tolist() for split in splits]
            self.assertEqual(len(problems[1]), count)
            self.assertEqual(sorted(problems[0] + problems[1]), list(range(10 ** (2 * ndigit))))

    def test_the_digits_of_the_sum_are_the_targets(self):
        for order in (1, -1):
            dataset = make_dataset("test", ndigit=3, reverse=order == -1)
            x, y = dataset.__getitems__([0, 7, 499])
            for i, problem in enumerate(dataset.problems([0, 7, 499]).tolist()):
                a, b = divmod(problem, 1000)
                text = f"{a:03d}{b:03d}" + f"{a + b:04d}"[::order]
                digits = [int(digit) for digit in text]
                self.assertEqual(x[i].tolist(), digits[:-1])
                self.assertEqual(y[i].tolist(), [-1] * 5 + digits[6:])
            self.assertEqual(dataset[499][1].tolist(), y[2].tolist())

    def test_carries_are_counted(self):
        cases = ((2, 85, 50, 1), (2, 85, 57, 2), (2, 0, 0, 0), (2, 99, 1, 2),
                 (3, 555, 555, 3), (3, 500, 500, 1), (3, 129, 870, 0))
        for n, a, b, carries in cases:
            self.assertEqual(adder.count_carries(np.array([a * 10 ** n + b]), n), carries)


class Scores(unittest.TestCase):
    def test_a_mistake_is_found(self):
        for reverse in (True, False):
            dataset = make_dataset("test", reverse=reverse)
            problems = dataset.problems(range(500))
            rows = dataset.digits(problems)
            ones = 4 if reverse else 6
            rows[3, ones] = 9 - rows[3, ones]
            model = SimpleNamespace(generate=lambda prompt, count: rows, lm_head=toy_gpt().lm_head)
            sums, right = adder.answer(model, dataset, problems)
            self.assertEqual(np.flatnonzero(~right).tolist(), [3])
            wrong = np.flatnonzero(sums != problems // 100 + problems % 100)
            self.assertEqual(wrong.tolist(), [3])

    def test_problems_are_drawn_from_the_whole_split(self):
        # Two digits: all there are, each once.
        dataset = make_dataset("train")
        drawn = adder.draw_problems(dataset)
        self.assertEqual(sorted(drawn.tolist()), dataset.problems(range(9500)).tolist())
        # More digits: of every size, and the same ones each time.
        for ndigit in (3, 9):
            dataset = make_dataset("train", ndigit=ndigit)
            drawn = adder.draw_problems(dataset)
            self.assertEqual(len(set(drawn.tolist())), 10_000)
            shares = np.bincount(drawn // 10 ** (2 * ndigit - 1), minlength=10) / len(drawn)
            self.assertTrue((abs(shares - 0.1) < 0.02).all(), shares)
            self.assertEqual(drawn.tolist(), adder.draw_problems(dataset).tolist())
            self.assertFalse(np.isin(drawn, dataset.test).any())

    def test_a_line_fits_into_80_columns_and_shows_what_is_wrong(self):
        for n in range(1, 10):
            problems = np.full(10_000, 10 ** (2 * n) - 1)
            for wrong in (0, 1, 10_000):
                text = adder.describe(problems, problems * 0, np.arange(10_000) >= wrong, n)
                self.assertLessEqual(len("train: " + text), 80)
                self.assertIn(f"{10_000 - wrong:,} of 10,000 sums exact", text)
                self.assertEqual(f"; wrong: {'9' * n} + {'9' * n} = 0" in text, wrong > 0)


class Inside(unittest.TestCase):
    """Tests the script that looks inside, on a model that has learned nothing."""

    def test_a_head_switched_off_is_a_head_whose_columns_of_c_proj_are_0(self):
        dataset = make_dataset("test")
        x = dataset.digits(dataset.problems(range(50)))[:, :-1]
        model = toy_gpt()
        before = model(x)[0]
        seen = []

        def answer(model, dataset, problems):
            seen.append(model(x)[0])
            return None, np.array([True, False])

        for layer, head in ((0, 0), (1, 1)):
            with mock.patch.object(inside, "answer", answer):
                self.assertEqual(inside.share_without(model, dataset, layer, head), 0.5)
            cut = toy_gpt()
            cut.transformer.h[layer].attn.c_proj.weight.data[:, head * 8:(head + 1) * 8] = 0
            torch.testing.assert_close(seen.pop(), cut(x)[0])
        self.assertTrue(torch.equal(model(x)[0], before))

    def test_the_carry_is_not_in_the_embedding_and_is_all_there_after_the_last_block(self):
        dataset = make_dataset("train")
        problems = adder.draw_problems(dataset)
        small = problems[(problems // 100 % 10 < 5) & (problems % 10 < 5)]
        first = dataset.digits(small)
        second = dataset.digits(small + 505)
        # Both have the same tokens but for the last digits of a and b, and the
        # sum's tens.
        self.assertTrue(torch.equal(first[:, [0, 2, 4]], second[:, [0, 2, 4]]))
        self.assertFalse((first[:, 5] == second[:, 5]).any())

        model = toy_gpt()
        shares = inside.find_carry(model, dataset)
        self.assertEqual(len(shares), 3)
        # The vectors are the same after the embedding, and nothing follows the
        # last block.
        for share, rows in ((shares[0], first), (shares[-1], second)):
            written = model(rows[:, :5])[0][:, -1].argmax(-1)
            expected = (written == second[:, 5]).float().mean()
            self.assertAlmostEqual(share, float(expected), delta=1e-3)
