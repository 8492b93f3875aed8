"""
Draws the loss and the learning rate of runs, from the metrics.jsonl in their work_dir.

    python projects/plot.py out/adder/metrics.jsonl                 # makes out/adder/metrics.png
    python projects/plot.py a/metrics.jsonl b/metrics.jsonl --out both.png
    python projects/plot.py out/chat/metrics.jsonl --log            # for a loss that comes near 0

Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from mingpt.utils import run_script


def read_rows(path: Path) -> list[dict]:
    """Reads the rows of training and validation that have a loss.

    The last line may be cut, as the run may be writing it. ValueError for another file.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()

    try:
        rows = [json.loads(line) for line in lines]
        rows = [row for row in rows if row.get("split") in ("train", "val")]
    except (ValueError, AttributeError):
        rows = []

    # A loss that was not finite is written as null.
    rows = [row for row in rows if row.get("loss") is not None]
    if not rows:
        raise ValueError(f"{path} has no row with a loss; give the metrics.jsonl of a run")
    return rows


def draw_run(losses, rates, rows: list[dict], color: str, name: str) -> None:
    """Draws a run into two panels: its losses above, its learning rate below."""
    train = [row for row in rows if row["split"] == "train"]
    val = [row for row in rows if row["split"] == "val"]
    steps = [row["iteration"] for row in train]
    losses.plot(steps, [row["loss"] for row in train], color=color, lw=0.8, alpha=0.6,
                label=f"{name}training batch")
    rates.plot(steps, [row.get("lr") for row in train], color=color)
    if val:
        losses.plot([row["iteration"] for row in val], [row["loss"] for row in val], "o-",
                    color=color, ms=3, label=f"{name}validation")


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="the picture; metrics.png beside the first file")
    parser.add_argument("--log", action="store_true", help="draw the loss on a logarithmic axis")
    options = parser.parse_args(args)

    figure = Figure(figsize=(8, 5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for i, path in enumerate(options.metrics):
        run = path.parent.name if path.stem == "metrics" else path.stem
        name = f"{run}, " if len(options.metrics) > 1 else ""
        draw_run(losses, rates, read_rows(path), f"C{i}", name)
    losses.set_ylabel("loss, nats per token (lower is better)")
    if options.log:
        losses.set_yscale("log")
        losses.yaxis.set_major_formatter("{x:g}")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2)

    out = options.out
    if out is None:
        out = options.metrics[0].with_suffix(".png")
    figure.savefig(out, dpi=110)
    print(out)


if __name__ == "__main__":
    run_script(main)
