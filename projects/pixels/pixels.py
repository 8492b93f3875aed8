"""
Teaches a GPT to draw handwritten digits pixel by pixel, and recognises digits with it.

    python projects/pixels/pixels.py            # a minute or two on a CPU
    python projects/pixels/pixels.py --help     # every setting

A picture of 8 x 8 pixels becomes a row of 64 tokens, line by line, each one of 17 grey
levels. The token in front says which digit it is. A model that predicts the next token
then predicts the next pixel: Image GPT (Chen et al. 2020, "Generative Pretraining from
Pixels"). Needs matplotlib, and scikit-learn, which has 1,797 such pictures.
"""

import logging
import math
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import ConcatDataset, TensorDataset

from mingpt.model import GPT
from mingpt.run import Run
from mingpt.utils import CfgNode, run_script, set_seed, setup_logging

logger = logging.getLogger("mingpt.pixels")
# 0 is white, 16 is black.
GREYS = 17
# How far a picture is moved: pixels down, pixels to the right.
MOVES = [(0, 0), (-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
# So many pictures are held out.
HELD_OUT = 360


def get_config() -> CfgNode:
    C = CfgNode()
    C.system = CfgNode()
    C.system.seed = 3407
    C.system.work_dir = "./out/pixels"  # where the log, the metrics, the model and the pictures go
    C.system.validation = False  # True holds out other pictures, to choose settings with

    C.model = GPT.get_default_config()
    # The pictures decide these two.
    del C.model.vocab_size
    del C.model.block_size
    C.model.n_layer = 4
    C.model.n_head = 4
    C.model.n_embd = 64
    C.model.resid_pdrop = 0.05
    C.model.attn_pdrop = 0.0

    C.trainer = Run.get_default_config()
    C.trainer.optimizer = "muon"
    C.trainer.max_iters = 2000
    C.trainer.batch_size = 16
    C.trainer.learning_rate = 1e-2
    C.trainer.betas = (0.9, 0.99)
    C.trainer.schedule = "linear"
    C.trainer.eval_interval = 500
    return C


# -----------------------------------------------------------------------------
# Pictures and tokens. N pictures are (N, 64): the pixels of each, line by line.

def load_pictures(validation: bool) -> tuple[np.ndarray, np.ndarray]:
    """Loads pictures (N, 64) and their digits (N,), always in the same mixed order.

    The last HELD_OUT are held out. With `validation` these are other pictures than
    without, and the ones that test the model are not among the N.
    """
    # Imported here, so that --help needs no scikit-learn.
    from sklearn.datasets import load_digits
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    if validation:
        order = order[HELD_OUT:]
    order = order[::-1]
    return data.data[order].astype(np.int64), data.target[order].astype(np.int64)


def move(pictures: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moves pictures (N, 64) by one pixel at most; white comes in from the edge."""
    squares = pictures.reshape(-1, 8, 8)  # (N, 64) -> (N, 8, 8)
    padded = np.pad(squares, ((0, 0), (1, 1), (1, 1)))  # (N, 10, 10)
    moved = padded[:, 1 - down:9 - down, 1 - right:9 - right]  # (N, 8, 8)
    return moved.reshape(-1, 64)  # (N, 8, 8) -> (N, 64)


def to_tokens(pictures: np.ndarray, digits: np.ndarray,
              way: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns pictures, moved by MOVES[way], into x (N, 64) and y (N, 64).

    x is the token of digit and move, then the pixels; y is the same one token later.
    """
    first = GREYS + 10 * way + digits  # (N,)
    rows = np.column_stack((first, move(pictures, *MOVES[way])))  # (N, 65)
    tokens = torch.from_numpy(rows)
    return tokens[:, :-1], tokens[:, 1:]


# -----------------------------------------------------------------------------
# How good the model is

def count_bits(contexts: np.ndarray, pictures: np.ndarray) -> float:
    """Predicts held-out pixels by counting alone, and returns the bits per pixel.

    A grey level is as likely as it was frequent in the same context. Both are (N, 64).
    """
    # Laplace's rule: one more than was seen, so that nothing is impossible.
    counts = np.ones((contexts.max() + 1, GREYS))
    np.add.at(counts, (contexts[:-HELD_OUT], pictures[:-HELD_OUT]), 1)
    p = counts / counts.sum(axis=1, keepdims=True)  # (contexts, GREYS)
    return float(-np.log2(p[contexts[-HELD_OUT:], pictures[-HELD_OUT:]]).mean())


@torch.no_grad()
def log_likelihoods(model: GPT, pictures: np.ndarray, pixels: int = 64) -> torch.Tensor:
    """Computes log p(the first pixels | digit) in nats: (N, 64) -> (N, 10), a column a digit."""
    N = len(pictures)
    x, y = to_tokens(np.repeat(pictures, 10, axis=0), np.tile(np.arange(10), N))  # (N * 10, 64)
    log_p = model(x)[0].log_softmax(-1)  # (N * 10, 64, V)
    log_p = log_p.gather(-1, y[:, :, None])  # (N * 10, 64, 1)
    return log_p[:, :pixels].sum(dim=(1, 2)).view(N, 10)  # (N * 10,) -> (N, 10)


def report(model: GPT, pictures: np.ndarray, digits: np.ndarray) -> None:
    """Logs how well the model predicts and recognises held-out pictures, beside plain ways."""
    held_out = pictures[-HELD_OUT:]
    truth = digits[-HELD_OUT:]
    log_p = log_likelihoods(model, held_out)  # (N, 10)
    # The mean of p(picture | digit) over the ten digits is p(picture).
    log_picture = log_p.logsumexp(1) - math.log(10)  # (N,)
    log_told = log_p[range(HELD_OUT), truth]  # (N,)
    place = np.tile(np.arange(64), (len(pictures), 1))  # (N, 64)
    # The neighbour at the left, and the one above.
    neighbours = GREYS * move(pictures, 0, 1) + move(pictures, 1, 0)  # (N, 64)

    nats_to_bits = 1 / math.log(2) / 64
    logger.info("bits per held-out pixel, lower is better")
    logger.info(f"  the model                 {-log_picture.mean() * nats_to_bits:.4f}")
    logger.info(f"  the model, told the digit {-log_told.mean() * nats_to_bits:.4f}")
    logger.info(f"  counts by place           {count_bits(place, pictures):.4f}")
    logger.info(f"  counts by two neighbours  {count_bits(neighbours, pictures):.4f}")

    # Bayes: p(digit | picture) is highest where p(picture | digit) is.
    right = (log_p.argmax(1).numpy() == truth).mean()
    from sklearn.linear_model import LogisticRegression
    logistic = LogisticRegression(max_iter=5000).fit(pictures[:-HELD_OUT], digits[:-HELD_OUT])
    logger.info("held-out digits recognised, higher is better")
    logger.info(f"  the model                 {right:.2%}")
    logger.info(f"  logistic regression       {logistic.score(held_out, truth):.2%}")


# -----------------------------------------------------------------------------
# Pictures of the result

@torch.no_grad()
def attention(model: GPT, x: torch.Tensor) -> torch.Tensor:
    """Returns how much the last token of x (T,) looks at each token: (n_layer, nh, T)."""
    for block in model.transformer.h:
        block.attn.fused = False
    model(x[None])  # (T,) -> (1, T)
    shares = [block.attn.att[0, :, -1] for block in model.transformer.h]  # (nh, T) each
    for block in model.transformer.h:
        block.attn.fused = True
    return torch.stack(shares)


def draw_sheet(pictures: torch.Tensor, columns: list[str], rows: list[str], inches: float = 0.7):
    """Draws pictures (rows, columns, 64), black on white, and returns the axes.

    Pixels that are nan have the colour of the gaps. A tile is `inches` wide.
    """
    R, C, _ = pictures.shape
    # The ninth line and the ninth column of a tile are the gap.
    tiles = torch.full((R, 9, C, 9), math.nan)
    tiles[:, :8, :, :8] = pictures.view(R, C, 8, 8).transpose(1, 2)  # (R, 8, C, 8)
    grid = tiles.view(9 * R, 9 * C)[:-1, :-1]  # (R, 9, C, 9) -> (9R - 1, 9C - 1)

    from matplotlib.figure import Figure
    axes = Figure(figsize=(inches * C + 0.6, inches * R + 0.3)).subplots()
    axes.set_facecolor("lightsteelblue")
    axes.imshow(grid.numpy(), cmap="gray_r", vmin=0, vmax=GREYS - 1)
    axes.set_xticks(9 * np.arange(C) + 3.5, columns)
    axes.set_yticks(9 * np.arange(R) + 3.5, rows)
    axes.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
    return axes


def save(axes, path: Path) -> None:
    """Writes the picture that `axes` belong to."""
    axes.figure.savefig(path, dpi=110, bbox_inches="tight")


def draw_samples(model: GPT, pictures: np.ndarray, digits: np.ndarray, path: Path) -> None:
    """Draws eight digits by the model beside eight held-out ones, a row for each digit."""
    prompts = GREYS + torch.arange(10).repeat_interleave(8)[:, None]  # (10 * 8, 1)
    samples = model.generate(prompts, 64, do_sample=True)[:, 1:]  # (10 * 8, 64)
    real = np.stack([pictures[digits == digit][:8] for digit in range(10)])  # (10, 8, 64)
    gap = torch.full((10, 1, 64), math.nan)
    sheet = torch.cat((samples.view(10, 8, 64), gap, torch.from_numpy(real)), dim=1)
    columns = [""] * 17
    columns[4] = "drawn by the model"
    columns[13] = "real, held out"
    save(draw_sheet(sheet, columns, [str(digit) for digit in range(10)]), path)


def draw_completions(model: GPT, pictures: np.ndarray, path: Path) -> None:
    """Draws lower halves for the upper halves of ten held-out pictures, 0 to 9.

    Which digit each completion is meant to be stands in its corner.
    """
    # The digit is drawn by p(digit | upper half).
    likely = log_likelihoods(model, pictures, pixels=32).softmax(1)  # (10, 10)
    guesses = likely.multinomial(8, replacement=True)  # (10, 8)
    truth = torch.from_numpy(pictures)  # (10, 64)
    upper = truth[:, None, :32].expand(10, 8, 32)
    prompts = torch.cat((GREYS + guesses[:, :, None], upper), dim=2)  # (10, 8, 1 + 32)
    completed = model.generate(prompts.view(80, 33), 32, do_sample=True)[:, 1:]  # (80, 64)

    given = truth.float()
    given[:, 32:] = math.nan
    sheet = torch.cat((given[:, None], completed.view(10, 8, 64), truth[:, None]), dim=1)
    columns = ["given"] + [""] * 8 + ["truth"]
    columns[4] = "completed by the model, as the digit in the corner"
    axes = draw_sheet(sheet, columns, [str(digit) for digit in range(10)])
    for row in range(10):
        for column in range(8):
            axes.text(9 * column + 16.3, 9 * row + 7.3, str(guesses[row, column].item()),
                      color="tab:blue", fontsize=8, ha="right",
                      bbox=dict(color="white", alpha=0.7, pad=0.5))
    save(axes, path)


def draw_attention(model: GPT, picture: np.ndarray, digit: int, path: Path) -> None:
    """Draws where each head looks when it predicts the fifth pixel of the fifth line."""
    pixel = 36
    x, _ = to_tokens(picture[None], np.array([digit]))  # (1, 64)
    shares = attention(model, x[0, :pixel + 1])[:, :, 1:]  # (n_layer, nh, pixel)
    n_layer, n_head, _ = shares.shape

    sheet = torch.from_numpy(picture).float().repeat(n_layer, 1 + n_head, 1)
    sheet[:, 0, pixel:] = math.nan
    sheet[:, 1:, pixel:] = math.nan
    # Black is where the head looks most.
    sheet[:, 1:, :pixel] = (GREYS - 1) * shares / shares.amax(-1, keepdim=True)
    columns = ["seen so far"] + [f"head {head}" for head in range(n_head)]

    axes = draw_sheet(sheet, columns, [f"block {i}" for i in range(n_layer)], inches=1.4)
    for row in range(n_layer):
        for column in range(1 + n_head):
            x = 9 * column + pixel % 8
            y = 9 * row + pixel // 8
            axes.fill([x - 0.5, x + 0.5, x + 0.5, x - 0.5], [y - 0.5, y - 0.5, y + 0.5, y + 0.5],
                      color="red", linewidth=0)
    save(axes, path)


def draw(model: GPT, pictures: np.ndarray, digits: np.ndarray, folder: Path) -> None:
    """Draws samples.png, completions.png and attention.png, with held-out pictures."""
    # The first picture of each digit.
    _, places = np.unique(digits, return_index=True)
    first = pictures[places]  # (10, 64)
    draw_samples(model, pictures, digits, folder / "samples.png")
    draw_completions(model, first, folder / "completions.png")
    draw_attention(model, first[3], 3, folder / "attention.png")


# -----------------------------------------------------------------------------

def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    set_seed(config.system.seed)
    pictures, digits = load_pictures(config.system.validation)
    # Half of the pictures that the model learns from are moved.
    ways = [0] * 7 + list(range(len(MOVES)))
    parts = [to_tokens(pictures[:-HELD_OUT], digits[:-HELD_OUT], way) for way in ways]
    train_dataset = ConcatDataset([TensorDataset(x, y) for x, y in parts])
    val_dataset = TensorDataset(*to_tokens(pictures[-HELD_OUT:], digits[-HELD_OUT:]))

    config.model.vocab_size = GREYS + 10 * len(MOVES)
    config.model.block_size = 64
    model = GPT(config.model)
    work_dir = config.system.work_dir
    run = Run(config.trainer, model, train_dataset, val_dataset, work_dir=work_dir)
    # Only now, so that a refused resume changes no file.
    setup_logging(config)
    run.run()

    model.cpu().eval()
    report(model, pictures, digits)
    draw(model, pictures[-HELD_OUT:], digits[-HELD_OUT:], run.work_dir)
    logger.info(f"the model and the pictures are in {work_dir}")


if __name__ == "__main__":
    run_script(main)
