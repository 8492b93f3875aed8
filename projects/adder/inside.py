"""
Looks inside the trained adder: at its heads, and for the block that finds the carry.

    python projects/adder/adder.py     trains it
    python projects/adder/inside.py    prints tables and draws out/adder/heads.png

The digits of a problem are called by their places: a10 a1 b10 b1 and, from the last digit
on, the sum's s1 s10 s100. Blocks and heads are counted from 0. Needs matplotlib.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from adder import AdditionDataset, answer, draw_problems
from matplotlib.figure import Figure

from mingpt.checkpoint import read_checkpoint
from mingpt.model import GPT
from mingpt.utils import CfgNode, run_script


@torch.no_grad()
def mean_attention(model: GPT, x: torch.Tensor) -> torch.Tensor:
    """Computes where the heads look, on average: tokens (B, T) -> (n_layer, nh, T, T)."""
    for block in model.transformer.h:
        block.attn.fused = False
    model(x)
    return torch.stack([block.attn.att.mean(dim=0) for block in model.transformer.h])


def share_without(model: GPT, dataset: AdditionDataset, layer: int, head: int) -> float:
    """Returns the share of a split that is right while one head of a block adds nothing."""
    attn = model.transformer.h[layer].attn
    hs = attn.n_embd // attn.n_head

    def switch_off(module, inputs):
        # The heads stand side by side.
        inputs[0][:, :, head * hs:(head + 1) * hs] = 0  # (B, T, hs)

    hook = attn.c_proj.register_forward_pre_hook(switch_off)
    _, right = answer(model, dataset, dataset.problems(range(len(dataset))))
    hook.remove()
    return float(right.mean())


@torch.no_grad()
def find_carry(model: GPT, dataset: AdditionDataset) -> list[float]:
    """Finds out where the vector of s1 knows the carry: after the embedding, after each block.

    62 + 33 = 95 and 67 + 38 = 105 are alike up to s1 but for a1 and b1; only the second has
    a carry. Its vector at s1 takes the place of the first one's. Returns how often the model
    then writes the second one's s10: always, if the vector knows the carry.
    """
    n = dataset.config.ndigit
    problems = draw_problems(dataset)
    has_small_digits = (problems // 10 ** n % 10 < 5) & (problems % 10 < 5)
    first = dataset.digits(problems[has_small_digits])  # (B, 3n + 1)
    second = dataset.digits(problems[has_small_digits] + 5 * 10 ** n + 5)  # (B, 3n + 1)
    both = torch.cat([first, second])[:, :2 * n + 1]  # (2B, 2n + 1)
    B = len(first)

    def replace_first(module, inputs, x):
        x[:B, -1] = x[B:, -1]  # (B, C)

    shares = []
    for part in [model.transformer.drop, *model.transformer.h]:
        hook = part.register_forward_hook(replace_first)
        written = model(both)[0][:B, -1].argmax(dim=-1)  # (B,)
        hook.remove()
        shares.append(float((written == second[:, 2 * n + 1]).float().mean()))
    return shares


def draw_heads(att: torch.Tensor, names: list[str], path: Path) -> None:
    """Draws how much each head looks at each digit while it writes the digits of the sum."""
    n_layer, n_head, T, _ = att.shape
    figure = Figure(figsize=(3 * n_head, 1.8 * n_layer), layout="constrained")
    axes = figure.subplots(n_layer, n_head, sharex=True, sharey=True, squeeze=False)

    for (layer, head), panel in np.ndenumerate(axes):
        weights = att[layer, head, T * 2 // 3 - 1:]  # (n + 1, T)
        # The mask hides later digits: their weight is 0, their cells stay gray.
        image = panel.imshow(np.ma.masked_equal(weights, 0), cmap="Blues", vmin=0, vmax=1)
        panel.set_facecolor("0.85")
        panel.set_title(f"block {layer}, head {head}", fontsize=10)

    panel.set_xticks(range(T), names[:T])
    panel.set_yticks(range(T // 3 + 1), names[T * 2 // 3:])
    figure.supxlabel("looks at")
    figure.supylabel("to write")
    figure.colorbar(image, ax=axes, label="mean weight")
    figure.savefig(path, dpi=110)


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Looks inside the model of a run of adder.py.")
    parser.add_argument("folder", type=Path, nargs="?", default="out/adder", help="of the run")
    folder = parser.parse_args(args).folder
    checkpoint = read_checkpoint(folder / "checkpoint.pt")
    model = GPT(CfgNode(**checkpoint["model_config"])).eval()
    model.load_state_dict(checkpoint["model"])
    n = model.block_size // 3
    config = AdditionDataset.get_default_config()
    config.ndigit = n
    dataset = AdditionDataset(config, "test")
    x = dataset.digits(dataset.problems(range(len(dataset))))[:, :-1]  # (B, 3n)
    att = mean_attention(model, x)  # (n_layer, nh, 3n, 3n)

    print("                 weight on a1 and b1 to write s10   right without this head")
    for layer, head in np.ndindex(att.shape[:2]):
        weight = att[layer, head, 2 * n, [n - 1, 2 * n - 1]].sum()
        right = share_without(model, dataset, layer, head)
        print(f"block {layer}, head {head} {weight:20.0%} {right:27.1%}")
    shares = find_carry(model, AdditionDataset(config, "train"))
    parts = ["the embedding", *[f"block {layer}" for layer in range(len(att))]]
    for part, share in zip(parts, shares):
        print(f"the vector of s1 carries after {part:13} {share:6.1%}")
    names = [f"{number}{10 ** i}" for number in "ab" for i in reversed(range(n))]
    draw_heads(att, names + [f"s{10 ** i}" for i in range(n + 1)], folder / "heads.png")


if __name__ == "__main__":
    run_script(main)
