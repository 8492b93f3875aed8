"""projects/reinforce: the gradient against its formula, and what rewards can and cannot teach."""

import tempfile
import unittest
from unittest import mock

import numpy as np
import torch
from torch.utils.data import Subset

from common import run_here, tiny_gpt

import reinforce
from reinforce import Reinforce, adder


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
    """Computes the gradient for given sums, (B * S, 2), as one vector."""
    rows = torch.cat((x[:, :2].repeat_interleave(3, dim=0), written), dim=1)
    run.model.zero_grad(set_to_none=False)
    with mock.patch.object(run.model, "generate", lambda *args, **settings: rows):
        run.compute(run.model, x, y)[1].backward()
    return torch.cat([p.grad.flatten() for p in run.model.parameters()])


class Gradient(unittest.TestCase):
    def test_it_is_the_mean_of_advantage_times_gradient_of_the_log_probability(self):
        for baseline in (True, False):
            run, dataset = make_run(baseline=baseline, offset=-0.25)
            x, y = dataset.__getitems__([3, 70])
            truth = y[:, 1:]  # (2, 2)
            # Of three sums each, two are right for the first problem, none for
            # the second.
            one_wrong = truth ^ torch.tensor([0, 1])
            written = torch.stack((truth[0], truth[0], one_wrong[0], *[one_wrong[1]] * 3))
            found = gradient(run, x, y, written)

            expected = torch.zeros_like(found)
            for i, rewards in enumerate(([0.75, 0.75, -0.25], [-0.25, -0.25, -0.25])):
                for j in range(3):
                    advantage = rewards[j] - (sum(rewards) / 3 if baseline else 0.0)
                    tokens = x[i, :2].tolist()
                    log_p = 0.0
                    for digit in written[3 * i + j].tolist():
                        logits = run.model(torch.tensor([tokens]))[0][0, -1]
                        log_p = log_p + logits.log_softmax(-1)[digit]
                        tokens.append(digit)
                    parts = torch.autograd.grad(log_p, list(run.model.parameters()))
                    expected -= advantage * torch.cat([part.flatten() for part in parts]) / 6
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    def test_nothing_is_learned_where_all_sums_of_a_problem_are_right_or_all_wrong(self):
        run, dataset = make_run()
        x, y = dataset.__getitems__([3, 70])
        truth = y[:, 1:].repeat_interleave(3, dim=0)
        for written in (truth, truth ^ 1):
            self.assertEqual(float(gradient(run, x, y, written).abs().max()), 0.0)
        # Without the baseline, right sums still become likelier.
        run.config.baseline = False
        self.assertGreater(float(gradient(run, x, y, truth).abs().max()), 0.0)

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


class Problems(unittest.TestCase):
    def test_the_second_part_has_problems_of_the_given_carries(self):
        with (tempfile.TemporaryDirectory() as folder, mock.patch.object(reinforce.Run, "run"),
              mock.patch.object(reinforce, "Subset", side_effect=Subset) as subset):
            run_here(reinforce.main, "--data.carries=2", f"--system.work_dir={folder}")
        dataset, places = subset.call_args.args
        expected = [a + b >= 100 and a % 10 + b % 10 >= 10
                    for a, b in zip(*np.divmod(dataset.problems(range(len(dataset))), 100))]
        self.assertEqual(places, np.flatnonzero(expected).tolist())
