"""
Teaches a GPT to add two numbers of n digits.

    python projects/adder/adder.py            two digits, 10 to 20 seconds
    python projects/adder/adder.py --help     every setting with its default

The problem 85 + 50 = 135 becomes the row of tokens 8 5 5 0 5 3 1. It has no
signs, since each number has a fixed length. The sum begins with its last
digit, as on paper: a carry then comes from digits that are already written.
The model learns to predict the digits of the sum; the problem's digits do not
count.
"""

import logging
import math

import numpy as np
import torch
from torch.utils.data import Dataset

from mingpt.model import GPT
from mingpt.run import Run
from mingpt.utils import CfgNode, run_script, set_seed, setup_logging

logger = logging.getLogger("mingpt.adder")


def get_config() -> CfgNode:
    C = CfgNode()

    C.system = CfgNode()
    C.system.seed = 3407
    C.system.work_dir = "./out/adder"  # for the log, the metrics and the model

    C.data = AdditionDataset.get_default_config()

    C.model = GPT.get_default_config()
    C.model.model_type = "gpt-nano"
    # The data has no noise, so that dropout only slows learning down.
    C.model.embd_pdrop = 0.0
    C.model.resid_pdrop = 0.0
    C.model.attn_pdrop = 0.0
    # The number of digits decides these two, so nobody can set them.
    del C.model.vocab_size
    del C.model.block_size

    C.trainer = Run.get_default_config()
    C.trainer.optimizer = "muon"
    C.trainer.max_iters = 500
    C.trainer.batch_size = 256
    C.trainer.learning_rate = 1e-2
    C.trainer.schedule = "linear"
    C.trainer.eval_interval = 100

    return C


class AdditionDataset(Dataset):
    """Holds the problems a + b of two numbers with n digits each, in two splits.

    The test split has 500 of them, or a fifth of all where there are fewer than
    2,500. Problem number p is a = p // 10^n and b = p % 10^n: no list of all is
    kept, so n can be large.
    """

    @staticmethod
    def get_default_config() -> CfgNode:
        C = CfgNode()
        C.ndigit = 2  # digits of a and of b
        C.reverse = True  # the sum begins with its last digit
        return C

    def __init__(self, config: CfgNode, split: str):
        """Chooses the test problems; `split` is "train" or "test".

        Raises ValueError for more than 9 digits, which int64 cannot count.
        """
        if not 1 <= config.ndigit <= 9:
            raise ValueError(f"got --data.ndigit={config.ndigit}, expected 1 to 9")
        self.config = config
        self.split = split
        self.total = 10 ** (2 * config.ndigit)
        # The seed is fixed, so that all runs have the same test problems.
        rng = np.random.default_rng(1337)
        self.test = np.sort(rng.choice(self.total, min(500, self.total // 5), replace=False))

    def get_vocab_size(self) -> int:
        """Returns the number of different tokens: the digits 0 to 9."""
        return 10

    def get_block_size(self) -> int:
        """Returns the length of an input: a, b and the n + 1 digits of the sum but the last."""
        return 3 * self.config.ndigit

    def __len__(self) -> int:
        return len(self.test) if self.split == "test" else self.total - len(self.test)

    def problems(self, indices) -> np.ndarray:
        """Returns the numbers of the problems at these places of the split, (B,) -> (B,)."""
        indices = np.asarray(indices)
        if self.split == "test":
            return self.test[indices]
        # Place i of the training split is problem i + the number of test
        # problems before it; `smaller` counts training problems before each.
        smaller = self.test - np.arange(len(self.test))
        return indices + np.searchsorted(smaller, indices, side="right")

    def digits(self, problems: np.ndarray) -> torch.Tensor:
        """Writes problems with their sums as digits, (B,) -> (B, 3n + 1)."""
        n = self.config.ndigit
        a, b = np.divmod(problems, 10 ** n)
        places = 10 ** np.arange(n, -1, -1)  # (n + 1,), the largest first
        a_digits, b_digits, sum_digits = (
            number[:, None] // places % 10 for number in (a, b, a + b))  # (B, n + 1) each
        if self.config.reverse:
            sum_digits = sum_digits[:, ::-1]
        rows = np.concatenate((a_digits[:, 1:], b_digits[:, 1:], sum_digits), axis=1)
        return torch.from_numpy(rows)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Builds a batch, x and y (B, 3n) each; y is -1 where the next token is of the problem."""
        digits = self.digits(self.problems(indices))
        x = digits[:, :-1]
        y = digits[:, 1:].clone()
        y[:, :2 * self.config.ndigit - 1] = -1
        return x, y

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.__getitems__([index])
        return x[0], y[0]


def answer(model: GPT, dataset: AdditionDataset,
           problems: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Has the model add problems (B,), each digit the likeliest.

    Returns the sums (B,), and which of them are right (B,).
    """
    n = dataset.config.ndigit
    device = model.lm_head.weight.device
    written = []
    for part in np.array_split(problems, math.ceil(len(problems) / 1000)):
        prompt = dataset.digits(part)[:, :2 * n].to(device)  # (B, 2n)
        written.append(model.generate(prompt, n + 1)[:, 2 * n:].cpu().numpy())  # (B, n + 1)

    digits = np.concatenate(written)
    if dataset.config.reverse:
        digits = digits[:, ::-1]
    sums = digits @ 10 ** np.arange(n, -1, -1)
    return sums, sums == problems // 10 ** n + problems % 10 ** n


def draw_problems(dataset: AdditionDataset, most: int = 10_000) -> np.ndarray:
    """Draws different problems of a split, always the same ones: all, if there are few."""
    rng = np.random.default_rng(0)
    return dataset.problems(rng.choice(len(dataset), min(len(dataset), most), replace=False))


def count_carries(problems: np.ndarray, n: int) -> np.ndarray:
    """Counts the carries in each a + b, (B,) -> (B,): 85 + 50 has 1, 85 + 57 has 2."""
    a, b = np.divmod(problems, 10 ** n)
    # A place gets a carry if the digits below it add up to one of that place.
    places = 10 ** np.arange(1, n + 1)
    return (a[:, None] % places + b[:, None] % places >= places).sum(axis=1)


def share_by_carries(right: np.ndarray, problems: np.ndarray, n: int) -> dict[int, float]:
    """Returns the share of right sums for each number of carries: {0: 0.98, 1: 0.91, 2: 0.9}."""
    carries = count_carries(problems, n)
    counts = np.unique(carries).tolist()
    return {count: round(float(right[carries == count].mean()), 4) for count in counts}


def describe(problems: np.ndarray, sums: np.ndarray, right: np.ndarray, n: int) -> str:
    """Writes how many sums are right, and as many wrong ones as fit into 73 columns."""
    text = f"{right.sum():,} of {len(right):,} sums exact"
    a, b = np.divmod(problems, 10 ** n)
    wrong = [f"{a[i]} + {b[i]} = {sums[i]}" for i in np.flatnonzero(~right)]
    # A mistake has at most 3n + 7 characters, and a separator has two.
    shown = (73 - len(text) - len("; wrong")) // (3 * n + 9)
    if wrong:
        text += "; wrong: " + "; ".join(wrong[:shown])
    return text


def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    set_seed(config.system.seed)
    train_dataset = AdditionDataset(config.data, "train")
    test_dataset = AdditionDataset(config.data, "test")
    config.model.vocab_size = train_dataset.get_vocab_size()
    config.model.block_size = train_dataset.get_block_size()
    model = GPT(config.model)
    run = Run(config.trainer, model, train_dataset, test_dataset, work_dir=config.system.work_dir)
    # Only now does a file change: Run has refused what it cannot do.
    setup_logging(config)

    def report(run: Run) -> None:
        n = config.data.ndigit
        for name, dataset in (("train", train_dataset), ("test", test_dataset)):
            problems = draw_problems(dataset)
            sums, right = answer(model, dataset, problems)
            logger.info(f"{name:>5}: {describe(problems, sums, right, n)}")
            run.write_metrics(split=name, exact=round(float(right.mean()), 4),
                              by_carries=share_by_carries(right, problems, n))

    run.add_callback("on_eval_end", report)
    run.run()
    logger.info(f"the model is in {config.system.work_dir}")


if __name__ == "__main__":
    run_script(main)
