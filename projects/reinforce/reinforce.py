"""
Improves a half-trained adder by right or wrong alone: learning from a reward.

    python projects/reinforce/reinforce.py                            half a minute on a CPU
    python projects/reinforce/reinforce.py --system.rewards=False     told the sums instead

For each problem the model writes several sums, each digit drawn by its probability. A
right sum has reward 1, a wrong one 0. A sum with more reward than the mean of its group,
the sums for the same problem, becomes likelier; one with less becomes less likely: the
policy gradient (REINFORCE, Williams 1992) with the group's mean as its baseline, as in
GRPO without its clip (Shao et al. 2024, "DeepSeekMath", section 4.1).
"""

import importlib.util
import logging
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Subset

from mingpt.model import GPT
from mingpt.run import Run
from mingpt.utils import CfgNode, run_script, set_seed, setup_logging

# Each project is a script in its own folder: the adder is loaded by its path.
path = Path(__file__).resolve().parent.parent / "adder" / "adder.py"
spec = importlib.util.spec_from_file_location("adder", path)
adder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(adder)

logger = logging.getLogger("mingpt.reinforce")


def get_config() -> CfgNode:
    C = adder.get_config()
    C.system.work_dir = "./out/reinforce"  # for the log, the metrics and the model
    C.system.start = 0.5  # share of sums right at which the second part begins
    C.system.rewards = True  # in the second part; False tells the sums, as in the first
    C.data.carries = None  # of the problems in the second part; None takes all

    C.first = C.trainer  # settings of the first part, which are the adder's but for these
    C.first.learning_rate = 5e-3
    C.first.schedule = "constant"

    C.trainer = Reinforce.get_default_config()
    C.trainer.optimizer = "muon"
    C.trainer.max_iters = 200
    C.trainer.batch_size = 32
    C.trainer.learning_rate = 1e-3
    C.trainer.schedule = "linear"
    C.trainer.log_interval = 20
    return C


class Reinforce(Run):
    """Trains on the rewards of sums that the model writes itself."""

    @staticmethod
    def get_default_config() -> CfgNode:
        C = Run.get_default_config()
        C.samples = 8  # sums that the model writes for each problem
        C.baseline = True  # compare each sum with the others for the same problem
        C.offset = 0.0  # added to every reward
        return C

    def compute(self, network: GPT, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns which of S sums for each problem are right, (B, S), and the loss.

        x and y are (B, 3n). The loss has the policy gradient; its value says nothing.
        """
        S = self.config.samples
        is_sum = y[0] != -1  # (3n,)
        length = int(is_sum.sum())
        prompt = x[:, :1 - length].repeat_interleave(S, dim=0)  # (B, 2n) -> (B * S, 2n)
        truth = y[:, is_sum].repeat_interleave(S, dim=0)  # (B, n + 1) -> (B * S, n + 1)
        rows = self.model.generate(prompt, length, do_sample=True)  # (B * S, 3n + 1)
        written = rows[:, -length:]  # (B * S, n + 1)
        self.right = (written == truth).all(dim=1).float().view(-1, S)  # (B * S,) -> (B, S)

        advantages = self.right + self.config.offset
        if self.config.baseline:
            advantages = advantages - advantages.mean(dim=1, keepdim=True)
        log_p = network(rows[:, :-1])[0].log_softmax(dim=-1)  # (B * S, 3n, V)
        log_p = log_p[:, -length:].gather(-1, written[:, :, None])  # (B * S, n + 1, 1)
        log_p = log_p.sum(dim=(1, 2)).view(-1, S)  # of each sum, (B * S,) -> (B, S)
        return self.right, -(advantages * log_p).mean()

    def report(self) -> None:
        """Reports how many of the drawn sums are right, in place of the loss."""
        right = float(self.right.mean())
        mixed = float((self.right.amax(dim=1) != self.right.amin(dim=1)).float().mean())
        logger.info(f"step {self.steps_done:>6}  drawn {right:.1%}; mixed groups {mixed:.0%}")
        self.write_metrics(split="train", right=right, mixed=mixed)


def train_first(config: CfgNode, model: GPT, dataset: Dataset) -> None:
    """Tells the model sums until it gets a share of them right by itself."""
    problems = adder.draw_problems(dataset, 500)

    def stop_if_reached(run: Run) -> None:
        if run.steps_done % 5 == 0:
            _, right = adder.answer(model, dataset, problems)
            if right.mean() >= config.system.start:
                run.stop()

    run = Run(config.first, model, dataset)
    run.add_callback("on_batch_end", stop_if_reached)
    run.run()


def report_scores(run: Run, dataset: Dataset) -> None:
    """Reports the share of held-out sums that are right, in all and by their carries."""
    if run.steps_done % run.config.log_interval == 0:
        problems = dataset.problems(range(len(dataset)))
        _, right = adder.answer(run.model, dataset, problems)
        by_carries = adder.share_by_carries(right, problems, dataset.config.ndigit)
        shares = " ".join(f"{100 * share:.0f}" for share in by_carries.values())
        logger.info(f"step {run.steps_done:>6}  held out {right.mean():.1%}; by carries {shares}")
        run.write_metrics(split="test", exact=float(right.mean()), by_carries=by_carries)


def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    set_seed(config.system.seed)
    train_dataset = adder.AdditionDataset(config.data, "train")
    test_dataset = adder.AdditionDataset(config.data, "test")
    config.model.vocab_size = train_dataset.get_vocab_size()
    config.model.block_size = train_dataset.get_block_size()
    model = GPT(config.model)

    practice = train_dataset
    if config.data.carries is not None:
        problems = train_dataset.problems(range(len(train_dataset)))
        carries = adder.count_carries(problems, config.data.ndigit)
        practice = Subset(train_dataset, np.flatnonzero(carries == config.data.carries).tolist())
    second = Reinforce if config.system.rewards else Run
    run = second(config.trainer, model, practice, work_dir=config.system.work_dir)
    setup_logging(config)
    train_first(config, model, train_dataset)

    for event in ("on_train_start", "on_batch_end"):
        run.add_callback(event, lambda run: report_scores(run, test_dataset))
    run.run()
    logger.info(f"the model is in {config.system.work_dir}")


if __name__ == "__main__":
    run_script(main)
