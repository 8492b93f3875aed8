"""projects/reinforce: the loss against plain loops, what it cannot learn from, and the script."""

import json
import sys
import unittest
from unittest import mock

import torch
from torch.utils.data import Subset

from common import ROOT, Folder, run_here, tiny_gpt

sys.path.insert(0, str(ROOT / "projects" / "reinforce"))
import reinforce
from reinforce import Reinforce, adder

TOY = ("--model.model_type=gpt", "--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16")


def make_run(**changes) -> tuple[Reinforce, adder.AdditionDataset]:
    """Returns a run on problems of one digit, with a tiny model that has learned nothing."""
    torch.manual_seed(1)
    config = Reinforce.get_default_config()
    config.merge_from_dict(dict(batch_size=4, samples=3, log_interval=0, seed=1) | changes)
    data = adder.AdditionDataset.get_default_config()
    data.ndigit = 1
    dataset = adder.AdditionDataset(data, "train")
    return Reinforce(config, tiny_gpt(vocab_size=10, block_size=3), dataset), dataset


def gradient(run: Reinforce, x: torch.Tensor, y: torch.Tensor, written: torch.Tensor):
    """Computes the loss and the gradient for given sums, (B * S, 2), as one vector."""
    rows = torch.cat((x[:, :2].repeat_interleave(run.config.samples, dim=0), written), dim=1)
    run.model.zero_grad(set_to_none=False)
    with mock.patch.object(run.model, "generate", lambda *args, **settings: rows):
        right, loss = run.compute(run.model, x, y)
    loss.backward()
    parts = [p.grad.flatten() for p in run.model.parameters()]
    return right, loss, torch.cat(parts)


class Loss(unittest.TestCase):
    def test_loss_by_plain_loops(self):
        for baseline in (True, False):
            run, dataset = make_run(baseline=baseline, offset=-0.25)
            x, y = dataset.__getitems__([3, 70])
            truth = y[:, 1:]  # (2, 2)
            # Of three sums each, two are right for the first problem, none for the second.
            written = torch.stack((truth[0], truth[0], truth[0].flip(0) + 1, *[truth[1] ^ 1] * 3))
            right, loss, _ = gradient(run, x, y, written)
            self.assertEqual(right.tolist(), [[1, 1, 0], [0, 0, 0]])

            total = 0.0
            for i in range(2):
                rewards = [value - 0.25 for value in right[i].tolist()]
                for j in range(3):
                    advantage = rewards[j] - (sum(rewards) / 3 if baseline else 0.0)
                    tokens = x[i, :2].tolist()
                    for digit in written[3 * i + j].tolist():
                        logits = run.model(torch.tensor([tokens]))[0][0, -1]
                        total -= advantage * float(logits.detach().log_softmax(-1)[digit])
                        tokens.append(digit)
            self.assertAlmostEqual(float(loss.detach()), total / 6, places=4)

    def test_nothing_is_learned_where_all_sums_of_a_problem_are_right_or_all_wrong(self):
        run, dataset = make_run()
        x, y = dataset.__getitems__([3, 70])
        truth = y[:, 1:].repeat_interleave(3, dim=0)
        for written in (truth, truth ^ 1):
            self.assertEqual(float(gradient(run, x, y, written)[2].abs().max()), 0.0)
        # Without the baseline, right sums still become likelier.
        run.config.baseline = False
        self.assertGreater(float(gradient(run, x, y, truth)[2].abs().max()), 0.0)
        self.assertEqual(float(gradient(run, x, y, truth ^ 1)[2].abs().max()), 0.0)

    def test_with_the_baseline_only_differences_of_rewards_count(self):
        run, dataset = make_run()
        x, y = dataset.__getitems__([3, 70])
        written = y[:, 1:].repeat_interleave(3, dim=0)
        written[::2] ^= 1
        _, _, plain = gradient(run, x, y, written)
        run.config.offset = -1.0
        _, _, moved = gradient(run, x, y, written)
        self.assertTrue(torch.allclose(plain, moved, atol=1e-5))
        run.config.baseline = False
        _, _, moved = gradient(run, x, y, written)
        self.assertFalse(torch.allclose(plain, moved, atol=1e-2))

    def test_a_sum_is_learned_from_its_reward_alone(self):
        run, dataset = make_run(max_iters=60, batch_size=8, samples=16, optimizer="muon",
                                learning_rate=0.01)
        run.train_dataset = Subset(dataset, [42])
        x, y = dataset[42]

        def p_right() -> float:
            log_p = run.model(x[None])[0].log_softmax(-1)[0, 1:]  # (2, V)
            return float(log_p.gather(-1, y[1:, None]).detach().sum().exp())

        self.assertLess(p_right(), 0.2)
        run.run()
        self.assertGreater(p_right(), 0.9)


class Script(Folder):
    def run_script(self, *args) -> list[dict]:
        status, printed, errors = run_here(
            reinforce.main, "--data.ndigit=1", "--system.start=0.01", "--trainer.max_iters=4",
            "--trainer.log_interval=2", f"--system.work_dir={self.folder}", *TOY, *args)
        self.assertEqual((status, errors), (0, ""))
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def test_rewards_then_targets(self):
        rows = self.run_script()
        scores = [row["iteration"] for row in rows if row["split"] == "test"]
        self.assertEqual(scores, [0, 2, 4])
        reported = [row for row in rows if row["split"] == "train"]
        self.assertEqual([row["iteration"] for row in reported], [1, 2, 4])
        for row in reported:
            self.assertTrue(0 <= row["right"] <= 1 and 0 <= row["mixed"] <= 1)

        rows = self.run_script("--system.rewards=False", "--data.carries=1")
        self.assertEqual([row["iteration"] for row in rows if row["split"] == "test"], [0, 2, 4])
        self.assertTrue(all("loss" in row for row in rows if row["split"] == "train"))

    def test_problems_by_carries(self):
        with mock.patch.object(reinforce.Run, "run"):
            with mock.patch.object(reinforce, "Subset", side_effect=Subset) as subset:
                run_here(reinforce.main, "--data.carries=2", f"--system.work_dir={self.folder}", *TOY)
        dataset, places = subset.call_args.args
        problems = dataset.problems(places)
        self.assertEqual(set(adder.count_carries(problems, 2).tolist()), {2})
        a, b = problems // 100, problems % 100
        # Units that carry, and tens that then reach 10: 45 of 100 pairs and 55 of 100.
        self.assertAlmostEqual(len(places) / 9500, 0.45 * 0.55, delta=0.01)
        self.assertTrue(((a % 10 + b % 10 >= 10) & (a + b >= 100)).all())
