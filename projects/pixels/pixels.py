"""
Teaches a GPT to draw handwritten digits pixel by pixel, and recognises digits with it.

    python projects/pixels/pixels.py            # a minute or two on a CPU
    python projects/pixels/pixels.py --help     # every setting

A picture of 8 x 8 pixels becomes a row of 64 tokens, line by line, each one of 17 grey levels. The token in front says
which digit it is. A model that predicts the next token then predicts the next pixel: Image GPT (Chen et al. 2020,
"Generative Pretraining from Pixels"). Needs matplotlib, and scikit-learn, which has 1,797 such pictures.
"""

import logging
import math
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.utils.data import ConcatDataset, TensorDataset

from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode, run_script, set_seed, setup_logging

sys.path.append(str(Path(__file__).resolve().parents[1])) # where projects keep what they share
from muon import MuonGPT

logger = logging.getLogger("mingpt.pixels")
GREYS = 17 # 0 is white, 16 is black
MOVES = [(0, 0), (-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)] # pixels down and to the right
HELD_OUT = 360 # pictures

def get_config() -> CfgNode:
    C = CfgNode()
    C.system = CfgNode()
    C.system.seed = 3407
    C.system.work_dir = "./out/pixels" # where the log, the metrics, the model and the pictures go
    C.system.validation = False # True holds out other pictures, to choose settings; those of the test go unused

    C.model = MuonGPT.get_default_config()
    del C.model.vocab_size, C.model.block_size # the pictures decide
    C.model.n_layer, C.model.n_head, C.model.n_embd = 4, 4, 64
    C.model.resid_pdrop, C.model.attn_pdrop = 0.05, 0.0

    C.trainer = Trainer.get_default_config()
    del C.trainer.work_dir # it is system.work_dir
    C.trainer.optimizer = "muon" # for the matrices of the blocks; 'adamw' for all
    C.trainer.max_iters, C.trainer.batch_size = 2000, 16
    C.trainer.learning_rate, C.trainer.betas = 1e-2, (0.9, 0.99)
    C.trainer.schedule, C.trainer.eval_interval = "linear", 500

    return C

def load_pictures(validation: bool) -> tuple[np.ndarray, np.ndarray]:
    """All pictures (N, 64) and their digits (N,), always in the same mixed order; the last HELD_OUT are held out."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[HELD_OUT if validation else 0:][::-1]
    return data.data[order].astype(np.int64), data.target[order].astype(np.int64)

def move(pictures: np.ndarray, down: int, right: int) -> np.ndarray:
    """Pictures (N, 64), moved by at most one pixel; what comes from beyond the edge is white."""
    padded = np.pad(pictures.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1))) # (N, 64) -> (N, 10, 10)
    return padded[:, 1 - down:9 - down, 1 - right:9 - right].reshape(-1, 64) # (N, 8, 8) -> (N, 64)

def to_tokens(pictures: np.ndarray, digits: np.ndarray, way: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, moved by MOVES[way]: x (N, 64), digit and move as one token, then pixels; y (N, 64), the pixels."""
    rows = torch.from_numpy(np.column_stack((GREYS + 10 * way + digits, move(pictures, *MOVES[way])))) # (N, 65)
    return rows[:, :-1], rows[:, 1:]

def count_bits(contexts: np.ndarray, pictures: np.ndarray) -> float:
    """Bits per held-out pixel if a grey level is as likely as it was frequent in the same context; both are (N, 64)."""
    counts = np.ones((contexts.max() + 1, GREYS)) # one more than seen, so that nothing is impossible: Laplace's rule
    np.add.at(counts, (contexts[:-HELD_OUT], pictures[:-HELD_OUT]), 1)
    p = counts / counts.sum(axis=1, keepdims=True)
    return float(-np.log2(p[contexts[-HELD_OUT:], pictures[-HELD_OUT:]]).mean())

@torch.no_grad()
def log_likelihoods(model: GPT, pictures: np.ndarray, pixels: int = 64) -> torch.Tensor:
    """log p(the first pixels | digit) in nats: pictures (N, 64) -> (N, 10), a column per digit."""
    x, y = to_tokens(np.repeat(pictures, 10, axis=0), np.tile(np.arange(10), len(pictures))) # (N * 10, 64)
    log_p = model(x)[0].log_softmax(-1).gather(-1, y[:, :, None]) # (N * 10, 64, V) -> (N * 10, 64, 1)
    return log_p[:, :pixels].sum(dim=(1, 2)).view(-1, 10) # (N * 10) -> (N, 10)

def report(model: GPT, pictures: np.ndarray, digits: np.ndarray) -> None:
    """Logs how well the model predicts and recognises the held-out pictures, beside plain ways to do so."""
    place = np.tile(np.arange(64), (len(pictures), 1)) # (N, 64)
    neighbours = GREYS * move(pictures, 0, 1) + move(pictures, 1, 0) # (N, 64), the left and the upper one
    held_out, truth = pictures[-HELD_OUT:], digits[-HELD_OUT:]
    log_p = log_likelihoods(model, held_out) # (N, 10)
    bits = (math.log(10) - log_p.logsumexp(1).mean()) / math.log(2) / 64 # p(picture) is the mean of p(picture | digit)
    bits_told = -log_p[range(HELD_OUT), truth].mean() / math.log(2) / 64
    logger.info(f"bits per held-out pixel: {bits:.4f}, told the digit {bits_told:.4f}; by place alone "
                f"{count_bits(place, pictures):.4f}, by neighbours alone {count_bits(neighbours, pictures):.4f}")
    logistic = LogisticRegression(max_iter=5000).fit(pictures[:-HELD_OUT], digits[:-HELD_OUT])
    right = (log_p.argmax(1).numpy() == truth).mean() # p(digit | picture) is highest where p(picture | digit) is
    logger.info(f"held-out digits recognised: {right:.2%}; logistic regression {logistic.score(held_out, truth):.2%}")

@torch.no_grad()
def attention(model: GPT, x: torch.Tensor) -> torch.Tensor:
    """How much the last token of a row looks at each of them: x (T,) -> shares (n_layer, nh, T)."""
    shares = []
    h = model.transformer.wte(x) + model.transformer.wpe.weight[:len(x)] # (T, C)
    for block in model.transformer.h:
        qkv = block.attn.c_attn(block.ln_1(h)).unflatten(-1, (3, model.config.n_head, -1)) # (T, 3C) -> (T, 3, nh, hs)
        scores = torch.einsum("hd,thd->ht", qkv[-1, 0], qkv[:, 1]) / math.sqrt(qkv.size(-1)) # the last query, all keys
        shares.append(scores.softmax(-1))
        h = block(h[None])[0] # (T, C) -> (1, T, C) -> (T, C)
    return torch.stack(shares)

def draw_sheet(path: Path, pictures: torch.Tensor, columns: list, rows: list) -> None:
    """Draws pictures (rows, columns, 64) in black on white; pixels that are nan have the colour of the gaps."""
    tiles = torch.full((len(rows), 9, len(columns), 9), math.nan) # the ninth line and the ninth column are gaps
    tiles[:, :8, :, :8] = pictures.unflatten(-1, (8, 8)).transpose(1, 2) # -> (rows, 8, columns, 8)
    grid = tiles.flatten(2).flatten(0, 1)[:-1, :-1] # (9 * rows - 1, 9 * columns - 1)
    axes = Figure(figsize=(0.7 * len(columns) + 0.6, 0.7 * len(rows) + 0.3)).subplots()
    axes.set_facecolor("lightsteelblue") # shows where the grid is nan
    axes.imshow(grid, cmap="gray_r", vmin=0, vmax=GREYS - 1)
    axes.set_xticks(9 * np.arange(len(columns)) + 3.5, columns)
    axes.set_yticks(9 * np.arange(len(rows)) + 3.5, rows)
    axes.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
    axes.figure.savefig(path, dpi=110, bbox_inches="tight")

def draw(model: GPT, pictures: np.ndarray, folder: Path) -> None:
    """Draws samples.png, completions.png and attention.png; pictures (10, 64) are held-out ones of 0 to 9."""
    truth = torch.from_numpy(pictures)
    samples = model.generate(GREYS + torch.arange(10).repeat_interleave(12)[:, None], 64, do_sample=True) # (120, 65)
    draw_sheet(folder / "samples.png", samples[:, 1:].reshape(10, 12, 64), [""] * 12, [*range(10)])
    guesses = log_likelihoods(model, pictures, 32).softmax(1).multinomial(8, replacement=True) # (10, 8), of the digit
    prompts = torch.cat((GREYS + guesses[:, :, None], truth[:, None, :32].expand(-1, 8, -1)), dim=2) # (10, 8, 1 + 32)
    completions = model.generate(prompts.flatten(0, 1), 32, do_sample=True)[:, 1:].view(10, 8, 64) # of (10 * 8, 65)
    given = truth.float().index_fill(1, torch.arange(32, 64), math.nan) # (10, 64)
    sheet = torch.cat((given[:, None], completions, truth[:, None]), dim=1) # (10, 1 + 8 + 1, 64)
    draw_sheet(folder / "completions.png", sheet, ["given"] + [""] * 8 + ["truth"], [*range(10)])
    pixel = 36 # the fifth in the fifth line, of a 3
    shares = attention(model, to_tokens(pictures, np.arange(10))[0][3, :pixel + 1])[:, :, 1:] # (n_layer, nh, pixel)
    n_layer, n_head, _ = shares.shape
    sheet = truth[3].float().repeat(n_layer, 1 + n_head, 1) # (n_layer, 1 + nh, 64)
    sheet[:, 0, pixel] = sheet[:, 1:, pixel:] = math.nan
    sheet[:, 1:, :pixel] = (GREYS - 1) * shares / shares.amax(-1, keepdim=True) # black is where the head looks most
    draw_sheet(folder / "attention.png", sheet, ["pixel"] + [""] * n_head, [f"layer {i}" for i in range(n_layer)])

def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    set_seed(config.system.seed)
    pictures, digits = load_pictures(config.system.validation)
    ways = [0] * 7 + [*range(len(MOVES))] # half of the pictures that it learns from are moved
    parts = [to_tokens(pictures[:-HELD_OUT], digits[:-HELD_OUT], way) for way in ways]
    train_dataset = ConcatDataset([TensorDataset(x, y) for x, y in parts])
    val_dataset = TensorDataset(*to_tokens(pictures[-HELD_OUT:], digits[-HELD_OUT:]))
    config.model.vocab_size, config.model.block_size = GREYS + 10 * len(MOVES), 64
    if config.trainer.lr_decay_iters is None:
        config.trainer.lr_decay_iters = config.trainer.max_iters
    config.trainer.work_dir = config.system.work_dir
    model = MuonGPT(config.model)
    config.model = model.config
    trainer = Trainer(config.trainer, model, train_dataset, val_dataset)
    setup_logging(config) # only now: a refused resume changes no file
    trainer.run()
    model.cpu().eval()
    report(model, pictures, digits)
    _, places = np.unique(digits[-HELD_OUT:], return_index=True) # of the first held-out picture of each digit
    draw(model, pictures[-HELD_OUT:][places], Path(config.system.work_dir))
    logger.info(f"the model and the pictures are in {config.system.work_dir}")

if __name__ == "__main__":
    run_script(main)
