"""
Teaches a GPT to add numbers of n digits.

    python projects/adder/adder.py                          # two digits, ten seconds on a CPU
    python projects/adder/adder.py --data.ndigit=3          # three
    python projects/adder/adder.py --help                   # every setting

The problem 85 + 50 = 135 is written as the digits 8 5 5 0 5 3 1: no signs, since each number has its fixed length, and the
sum from its last digit on, so that the model can carry as one does on paper: the digit that it writes next depends on
digits that it has seen. It is trained to predict the sum's digits; those of the problem are not counted.
"""

import logging
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode, run_script, set_seed, setup_logging

sys.path.append(str(Path(__file__).resolve().parents[1])) # where projects keep what they share
from muon import MuonGPT

logger = logging.getLogger("mingpt.adder")

# -----------------------------------------------------------------------------

def get_config() -> CfgNode:
    C = CfgNode()

    C.system = CfgNode()
    C.system.seed = 3407
    C.system.work_dir = "./out/adder" # where the log, the metrics and the model go

    C.data = AdditionDataset.get_default_config()

    C.model = GPT.get_default_config()
    C.model.model_type = "gpt-nano"
    del C.model.vocab_size, C.model.block_size # the problems decide
    C.model.embd_pdrop = C.model.resid_pdrop = C.model.attn_pdrop = 0.0 # the data has no noise: nothing to guard against

    C.trainer = Trainer.get_default_config()
    del C.trainer.work_dir # it is system.work_dir
    C.trainer.optimizer = "muon" # for the matrices of the blocks; 'adamw' for all
    C.trainer.max_iters = 500
    C.trainer.batch_size = 256
    C.trainer.learning_rate = 1e-2
    C.trainer.schedule = "linear"
    C.trainer.eval_interval = 100

    return C

class AdditionDataset(Dataset):
    """The problems a + b of two numbers with n digits each; 500 of them (or a fifth of all) are the test set.

    Problem number p is a = p // 10^n, b = p % 10^n. No list of all is kept, so n can be large.
    """

    @staticmethod
    def get_default_config() -> CfgNode:
        C = CfgNode()
        C.ndigit = 2 # digits of a and b
        C.reverse = True # write the sum from its last digit on
        return C

    def __init__(self, config: CfgNode, split: str):
        if not 1 <= config.ndigit <= 9:
            raise ValueError(f"got --data.ndigit={config.ndigit}, expected 1 to 9")
        self.config, self.split = config, split
        self.total = 10 ** (2 * config.ndigit) # problems that there are
        rng = np.random.default_rng(1337) # always the same test set
        self.test = np.sort(rng.choice(self.total, min(500, self.total // 5), replace=False))

    def get_vocab_size(self) -> int:
        return 10

    def get_block_size(self) -> int:
        return 3 * self.config.ndigit # a, b and the n + 1 digits of the sum, of which the last is never an input

    def __len__(self) -> int:
        return len(self.test) if self.split == "test" else self.total - len(self.test)

    def problems(self, indices) -> np.ndarray:
        """The numbers of the problems at these places of the split."""
        indices = np.asarray(indices)
        if self.split == "test":
            return self.test[indices]
        before = self.test - np.arange(len(self.test)) # training problems before each test problem
        return indices + np.searchsorted(before, indices, side="right") # step over the test problems

    def digits(self, problems: np.ndarray) -> torch.Tensor:
        """The digits of problems and sums: (B,) -> (B, 3n + 1)."""
        n = self.config.ndigit
        a, b = np.divmod(problems, 10 ** n)
        places = 10 ** np.arange(n, -1, -1) # of n + 1 digits, the largest first
        parts = [x[:, None] // places % 10 for x in (a, b, a + b)] # (B, n + 1) each
        total = parts[2][:, ::-1] if self.config.reverse else parts[2]
        return torch.from_numpy(np.concatenate((parts[0][:, 1:], parts[1][:, 1:], total), axis=1))

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: x (B, 3n), y (B, 3n), where y is -1 up to the last digit of b."""
        digits = self.digits(self.problems(indices))
        x, y = digits[:, :-1], digits[:, 1:].clone()
        y[:, : 2 * self.config.ndigit - 1] = -1
        return x, y

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.__getitems__([index])
        return x[0], y[0]

# -----------------------------------------------------------------------------

def find_mistakes(model: GPT, dataset: AdditionDataset, device,
                  max_problems: int = 10_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Has the model answer the first problems of a split: their numbers (B,), its sums (B,), and which are right (B,)."""
    n = dataset.config.ndigit
    problems = dataset.problems(np.arange(min(len(dataset), max_problems)))
    answers = []
    for part in np.array_split(problems, math.ceil(len(problems) / 1000)):
        digits = dataset.digits(part)[:, :2 * n].to(device) # (B, 2n)
        answers.append(model.generate(digits, n + 1)[:, 2 * n:].cpu().numpy()) # (B, n + 1), greedy
    answers = np.concatenate(answers)
    if dataset.config.reverse:
        answers = answers[:, ::-1]
    sums = answers @ 10 ** np.arange(n, -1, -1)
    return problems, sums, sums == problems // 10 ** n + problems % 10 ** n

def count_carries(problems: np.ndarray, n: int) -> np.ndarray:
    """How many digits are carried in adding a and b: 85 + 50 has 1, 85 + 57 has 2."""
    a, b = np.divmod(problems, 10 ** n)
    places = 10 ** np.arange(1, n + 1) # a digit is carried to a place if the digits below it add up to that much
    return (a[:, None] % places + b[:, None] % places >= places).sum(axis=1)

def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    set_seed(config.system.seed)
    train_dataset, test_dataset = AdditionDataset(config.data, "train"), AdditionDataset(config.data, "test")
    config.model.vocab_size, config.model.block_size = train_dataset.get_vocab_size(), train_dataset.get_block_size()
    if config.trainer.lr_decay_iters is None:
        config.trainer.lr_decay_iters = config.trainer.max_iters
    config.trainer.work_dir = config.system.work_dir
    model = MuonGPT(config.model)
    config.model = model.config
    trainer = Trainer(config.trainer, model, train_dataset, test_dataset)
    setup_logging(config) # only now: a refused resume changes no file

    def report(trainer: Trainer) -> None:
        n = config.data.ndigit
        for name, dataset in (("train", train_dataset), ("test", test_dataset)):
            problems, sums, right = find_mistakes(model, dataset, trainer.device)
            wrong = [f"{p // 10 ** n} + {p % 10 ** n} = {p // 10 ** n + p % 10 ** n}, not {s}"
                     for p, s in zip(problems[~right], sums[~right])]
            logger.info(f"{name:>12}: {right.sum()} of {len(right)} sums exact ({right.mean():.2%})"
                        + "".join(f"; {mistake}" for mistake in wrong[:5]))
            carries = count_carries(problems, n)
            by_carries = {int(count): round(float(right[carries == count].mean()), 4) for count in np.unique(carries)}
            trainer.write_metrics(split=name, exact=round(float(right.mean()), 4), by_carries=by_carries)

    trainer.add_callback("on_eval_end", report)
    trainer.run()
    logger.info(f"the model is in {config.system.work_dir}")

if __name__ == "__main__":
    run_script(main)
