"""projects/adder: problems and their splits, scores, the log, and the script that looks inside."""

import json
import sys
import unittest
from unittest import mock

import numpy as np
import torch

from common import ROOT, Folder, run_here, tiny_gpt

sys.path.insert(0, str(ROOT / "projects" / "adder"))
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


class Oracle:
    """Adds problems of two digits without a mistake, except for one of them."""

    def __init__(self, spoiled: int, reverse: bool):
        self.lm_head = torch.nn.Linear(1, 1)
        self.spoiled = spoiled
        self.reverse = reverse

    def generate(self, digits: torch.Tensor, count: int) -> torch.Tensor:
        rows = []
        for row in digits.tolist():
            a = 10 * row[0] + row[1]
            b = 10 * row[2] + row[3]
            total = a + b + 5 * (100 * a + b == self.spoiled)
            text = f"{total:03d}"
            if self.reverse:
                text = text[::-1]
            rows.append(row + [int(digit) for digit in text])
        return torch.tensor(rows)


class Problems(unittest.TestCase):
    def test_every_problem_is_in_one_split_once(self):
        for ndigit, tests in ((1, 20), (2, 500)):
            train = make_dataset("train", ndigit=ndigit)
            test = make_dataset("test", ndigit=ndigit)
            self.assertEqual(len(test), tests)
            problems = [dataset.problems(range(len(dataset))).tolist() for dataset in (train, test)]
            self.assertEqual(sorted(problems[0] + problems[1]), list(range(10 ** (2 * ndigit))))

    def test_many_digits(self):
        train = make_dataset("train", ndigit=9)
        test = make_dataset("test", ndigit=9)
        self.assertEqual(len(train) + len(test), 10 ** 18)
        # Around each test problem a training problem is stepped over.
        near = np.unique(np.clip(test.test[:, None] + np.arange(-600, 3), 0, len(train) - 1))
        problems = set(train.problems(near).tolist())
        self.assertEqual(len(problems), len(near))
        self.assertFalse(problems & set(test.test.tolist()))
        with self.assertRaisesRegex(ValueError, "got --data.ndigit=10, expected 1 to 9"):
            make_dataset("train", ndigit=10)

    def test_digits(self):
        for reverse, expected in ((True, [8, 5, 5, 0, 5, 3, 1]), (False, [8, 5, 5, 0, 1, 3, 5])):
            dataset = make_dataset("train", reverse=reverse)
            self.assertEqual(dataset.digits(np.array([8550])).tolist(), [expected])

    def test_the_digits_of_the_sum_are_the_targets(self):
        dataset = make_dataset("test", ndigit=3)
        places = [0, 7, 499]
        x, y = dataset.__getitems__(places)
        for i, problem in enumerate(dataset.problems(places).tolist()):
            a, b = divmod(problem, 1000)
            text = f"{a:03d}{b:03d}" + f"{a + b:04d}"[::-1]
            digits = [int(digit) for digit in text]
            self.assertEqual(x[i].tolist(), digits[:-1])
            self.assertEqual(y[i].tolist(), [-1] * 5 + digits[6:])
            self.assertEqual(dataset[places[i]][1].tolist(), y[i].tolist())

    def test_how_many_held_out_problems_are_in_training_with_the_numbers_exchanged(self):
        for ndigit, count in ((2, 468), (3, 500)):
            test = make_dataset("test", ndigit=ndigit).test
            a, b = np.divmod(test, 10 ** ndigit)
            exchanged = b * 10 ** ndigit + a
            self.assertEqual((~np.isin(exchanged, test)).sum(), count)

    def test_carries(self):
        cases = ((2, 85, 50, 1), (2, 85, 57, 2), (2, 0, 0, 0), (2, 99, 1, 2),
                 (3, 555, 555, 3), (3, 500, 500, 1), (3, 129, 870, 0))
        for n, a, b, carries in cases:
            self.assertEqual(adder.count_carries(np.array([a * 10 ** n + b]), n).tolist(), [carries])


class Scores(unittest.TestCase):
    def test_a_mistake_is_found(self):
        for reverse in (True, False):
            dataset = make_dataset("test", reverse=reverse)
            problems = dataset.problems(range(500))
            sums, right = adder.answer(Oracle(problems[3], reverse), dataset, problems)
            self.assertEqual(np.flatnonzero(~right).tolist(), [3])
            truth = problems // 100 + problems % 100
            self.assertEqual(sums.tolist(), (truth + 5 * ~right).tolist())

    def test_problems_are_drawn_from_the_whole_split(self):
        # Two digits: all there are, each once.
        dataset = make_dataset("train")
        drawn = adder.draw_problems(dataset)
        self.assertEqual(sorted(drawn.tolist()), dataset.problems(range(9500)).tolist())
        # More digits: of every size, and the same ones each time.
        for ndigit in (3, 5, 9):
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
            nines = "9" * n
            for wrong in (0, 1, 10_000):
                right = np.arange(10_000) >= wrong
                text = adder.describe(problems, problems * 0, right, n)
                self.assertLessEqual(len("train: " + text), 80)
                self.assertTrue(text.startswith(f"{10_000 - wrong:,} of 10,000 sums exact"))
                self.assertEqual(f"; wrong: {nines} + {nines} = 0" in text, wrong > 0)


class Script(Folder):
    def test_short_run(self):
        work_dir = self.folder / "sums"
        sizes = ("--model.model_type=gpt", "--model.n_layer=1", "--model.n_head=1", "--model.n_embd=8")
        status, printed, errors = run_here(
            adder.main, "--data.ndigit=1", "--trainer.max_iters=3", "--trainer.eval_interval=2",
            f"--system.work_dir={work_dir}", *sizes)
        self.assertEqual((status, errors), (0, ""))
        self.assertEqual(sorted(path.name for path in work_dir.iterdir()),
                         ["args.txt", "checkpoint.pt", "config.json", "log.txt", "metrics.jsonl"])
        config = json.loads((work_dir / "config.json").read_text(encoding="utf-8"))
        self.assertEqual((config["model"]["vocab_size"], config["model"]["block_size"]), (10, 3))
        lines = (work_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        scores = [row for row in rows if "exact" in row]
        self.assertEqual([(row["iteration"], row["split"]) for row in scores],
                         [(2, "train"), (2, "test"), (3, "train"), (3, "test")])
        self.assertEqual(list(scores[0]["by_carries"]), ["0", "1"])

    def test_mistakes_on_the_command_line(self):
        for argument, message in (
                ("--data.ndigits=3", "error: there is no setting --data.ndigits; did you mean --data.ndigit"),
                ("--data.ndigit=0", "error: got --data.ndigit=0, expected 1 to 9")):
            status, _, errors = run_here(
                adder.main, argument, f"--system.work_dir={self.folder / 'sums'}")
            self.assertEqual(status, 2)
            self.assertIn(message, errors)
            self.assertEqual(errors.count("\n"), 1)
        # Nothing was begun.
        self.assertEqual(list(self.folder.iterdir()), [])


class Inside(Folder):
    """The script that looks inside a model, on a model that has learned nothing."""

    def test_where_heads_look(self):
        att = inside.mean_attention(toy_gpt(), make_dataset("test").digits(np.arange(50))[:, :-1])
        self.assertEqual(att.shape, (2, 2, 6, 6))
        self.assertTrue(torch.allclose(att.sum(-1), torch.ones(2, 2, 6)))
        self.assertEqual(float(att.triu(1).abs().max()), 0.0)

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
            with torch.no_grad():
                cut.transformer.h[layer].attn.c_proj.weight[:, head * 8:(head + 1) * 8] = 0
            self.assertTrue(torch.allclose(seen.pop(), cut(x)[0], atol=1e-5))
        self.assertTrue(torch.equal(model(x)[0], before))

    def test_exchanging_the_vector_of_a_token(self):
        dataset = make_dataset("train")
        problems = adder.draw_problems(dataset)
        small = [p for p in problems.tolist() if p // 100 % 10 < 5 and p % 10 < 5]
        first = dataset.digits(np.array(small))
        second = dataset.digits(np.array(small) + 505)
        # Both have the same tokens but for the last digits of a and b, and the sum's tens.
        self.assertTrue(torch.equal(first[:, [0, 2, 4]], second[:, [0, 2, 4]]))
        self.assertFalse((first[:, 5] == second[:, 5]).any())

        model = toy_gpt()
        shares = inside.find_carry(model, dataset)
        self.assertEqual(len(shares), 3)
        # After the embedding both vectors are the same; after the last block nothing follows.
        for share, rows in ((shares[0], first), (shares[-1], second)):
            written = model(rows[:, :5])[0][:, -1].argmax(-1)
            expected = (written == second[:, 5]).float().mean()
            self.assertAlmostEqual(share, float(expected), delta=0.01)

    def test_script(self):
        run_here(adder.main, "--trainer.max_iters=1", f"--system.work_dir={self.folder}",
                 "--model.model_type=gpt", "--model.n_layer=1", "--model.n_head=2",
                 "--model.n_embd=8")
        status, printed, errors = run_here(inside.main, self.folder)
        self.assertEqual((status, errors), (0, ""))
        self.assertIn("block 0, head 1", printed)
        self.assertIn("the vector of s1 carries after block 0", printed)
        self.assertTrue((self.folder / "heads.png").exists())
        status, _, errors = run_here(inside.main, self.folder / "nothing")
        self.assertEqual(status, 2)
        self.assertIn("error: there is no checkpoint at", errors)
