"""A training run that the trainer's tests start as a process: a tiny GPT with dropout on random pairs. Arguments: --name=value."""

import atexit
import hashlib
import time
from pathlib import Path

import numpy as np
import torch

from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode, run_script, set_seed

def print_threads():
    """Those of gloo, which connects the processes; Linux alone tells them."""
    names = [path.read_text(encoding="utf-8") for path in Path("/proc/self/task").glob("*/comm")]
    print(f"threads of gloo at the end: {sum('gloo' in name for name in names)}\n", end="") # at once: two processes print

class Pairs(torch.utils.data.Dataset):
    """Rows of 9 tokens, each a function of its number alone."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        row = np.random.default_rng(index).integers(5, size=5)
        row = torch.from_numpy(np.concatenate((row, row[:4])))
        return row[:-1], row[1:]

class Masked(Pairs):
    """Between none and all of the targets count, and none in two rows of three."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        y = y.clone()
        y[np.random.default_rng(index).integers(9) if index % 3 == 0 else 0:] = -1
        return x, y

def main(args):
    config = CfgNode(trainer=Trainer.get_default_config(), pause=0.0, digest=True, dropout=0.1, fail_at=0, masked=False,
                     threads=False)
    config.trainer.merge_from_dict(dict(batch_size=8, max_iters=30, learning_rate=3e-3, log_interval=1, device="cpu", seed=5))
    config.merge_from_args(args)
    set_seed(1)
    if config.threads:
        atexit.register(print_threads) # before those of the trainer, so that it runs after them
    model_config = GPT.get_default_config()
    model_config.merge_from_dict(dict(n_layer=2, n_head=2, n_embd=16, vocab_size=5, block_size=8, embd_pdrop=config.dropout,
                                      resid_pdrop=config.dropout, attn_pdrop=config.dropout))
    dataset = Masked() if config.masked else Pairs()
    trainer = Trainer(config.trainer, GPT(model_config), dataset, dataset)

    def on_batch_end(trainer):
        time.sleep(config.pause)
        np.random.rand() # a callback may draw from any generator: these states are restored, too
        if config.fail_at and trainer.iter_num == config.fail_at:
            with torch.no_grad():
                trainer.model.transformer.wte.weight.fill_(torch.nan)
    trainer.add_callback("on_batch_end", on_batch_end)
    trainer.run()
    if trainer.rank == 0 and config.digest:
        weights = b"".join(tensor.numpy().tobytes() for tensor in trainer.model.state_dict().values())
        print("digest", hashlib.sha256(weights + repr(np.random.rand()).encode()).hexdigest())

if __name__ == "__main__":
    run_script(main)
