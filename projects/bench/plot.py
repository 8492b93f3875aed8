"""
Draws the loss and the learning rate of runs from the metrics.jsonl that the trainer writes into work_dir.

    python projects/bench/plot.py out/adder/metrics.jsonl                   # beside it, as metrics.png
    python projects/bench/plot.py a/metrics.jsonl b/metrics.jsonl --out both.png

Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mingpt.utils import run_script

def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics file that have a loss; ValueError if it is another kind of file."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if "loss" in row and row["iteration"] >= 0 and row["split"] in ("train", "val")]
    except (ValueError, KeyError, TypeError):
        rows = []
    if not rows:
        raise ValueError(f"{path} has no rows with iteration, split and loss; give a metrics.jsonl from a work_dir")
    return rows

def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="the picture; default: metrics.png beside the first file")
    args = parser.parse_args(args)
    figure, (losses, rates) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=(3, 1))
    for i, path in enumerate(args.metrics):
        rows = read_rows(path)
        train, val = ([row for row in rows if row["split"] == split] for split in ("train", "val"))
        run = path.parent.name if path.stem == "metrics" else path.stem
        name, steps = f"{run}, " if len(args.metrics) > 1 else "", [row["iteration"] for row in train]
        losses.plot(steps, [row["loss"] for row in train], color=f"C{i}", lw=0.8, alpha=0.6,
                    label=f"{name}training batch")
        if val:
            losses.plot([row["iteration"] for row in val], [row["loss"] for row in val], "o-", color=f"C{i}", ms=3,
                        label=f"{name}validation")
        rates.plot(steps, [row.get("lr") for row in train], color=f"C{i}")
    losses.set_ylabel("loss (nats)")
    losses.legend()
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    out = args.out or args.metrics[0].with_suffix(".png")
    figure.savefig(out, dpi=110)
    print(out)

if __name__ == "__main__":
    run_script(main)
