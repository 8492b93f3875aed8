"""
A training run that tests start in processes of their own: a tiny GPT on random pairs.

    python tests/train_script.py --trainer.max_iters=5      # and any other --name=value
"""

import atexit
import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from mingpt.model import GPT
from mingpt.run import Run
from mingpt.utils import CfgNode, run_script, set_seed


class Pairs(torch.utils.data.Dataset):
    """Holds rows of 9 tokens, each a function of its number alone; notes which are drawn."""

    def __init__(self):
        self.drawn = []

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        self.drawn.append(index)
        row = np.random.default_rng(index).integers(5, size=5)
        row = torch.from_numpy(np.concatenate((row, row[:4])))  # (9,)
        return row[:-1], row[1:]


class Masked(Pairs):
    """Lets none to all of the targets count, and none in two rows of three."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        y = y.clone()
        first = np.random.default_rng(index).integers(9) if index % 3 == 0 else 0
        y[first:] = -1
        return x, y


def print_threads() -> None:
    """Prints how many threads of gloo are left; Linux alone tells them."""
    names = [path.read_text(encoding="utf-8") for path in Path("/proc/self/task").glob("*/comm")]
    # One write, as several processes print.
    print(f"threads of gloo at the end: {sum('gloo' in name for name in names)}\n", end="")


def die_after(calls: int) -> None:
    """Kills this process after so many function calls, in the middle of whatever it does."""
    left = calls

    def count(frame, event, arg):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def digest(model: torch.nn.Module) -> str:
    """Returns a short text that differs unless weights and random numbers are equal bit by bit."""
    weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(weights + repr(np.random.rand()).encode()).hexdigest()


def main(args: list[str]) -> None:
    config = CfgNode(trainer=Run.get_default_config(), work_dir="", pause=0.0, dropout=0.1,
                     masked=False, die_after=0, threads=False)
    config.trainer.merge_from_dict(dict(
        batch_size=8, max_iters=30, learning_rate=3e-3, log_interval=1, device="cpu", seed=5))
    config.merge_from_args(args)
    set_seed(1)
    if config.threads:
        # The last one that registers runs first, and the trainer has not
        # registered yet.
        atexit.register(print_threads)

    model_config = GPT.get_default_config()
    model_config.merge_from_dict(dict(
        n_layer=2, n_head=2, n_embd=16, vocab_size=5, block_size=8, embd_pdrop=config.dropout,
        resid_pdrop=config.dropout, attn_pdrop=config.dropout))
    dataset = Masked() if config.masked else Pairs()
    run = Run(config.trainer, GPT(model_config), dataset, dataset, work_dir=config.work_dir)

    def on_batch_end(run):
        time.sleep(config.pause)
        # A callback may draw from any generator: all are restored.
        np.random.rand()

    run.add_callback("on_batch_end", on_batch_end)
    if config.die_after:
        die_after(config.die_after)
    run.run()
    if run.rank == 0:
        print("digest", digest(run.model))


if __name__ == "__main__":
    run_script(main)
