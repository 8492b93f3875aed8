"""
Draws the metrics of one or more training runs into a PNG.

    python projects/bench/plot.py out/chargpt/metrics.jsonl                      # beside it, as metrics.png
    python projects/bench/plot.py a/metrics.jsonl b/metrics.jsonl --out both.png

Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

def read_rows(path: Path, split: str) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["split"] == split and "loss" in row]

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="the picture; default: metrics.png beside the first file")
    args = parser.parse_args()
    figure, (losses, rates) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=(3, 1))
    for i, path in enumerate(args.metrics):
        train, val = read_rows(path, "train"), read_rows(path, "val")
        run = path.parent.name if path.stem == "metrics" else path.stem
        name = f"{run}, " if len(args.metrics) > 1 else ""
        losses.plot([row["iteration"] for row in train], [row["loss"] for row in train], color=f"C{i}", lw=0.8, alpha=0.6, label=f"{name}training batch")
        if val:
            losses.plot([row["iteration"] for row in val], [row["loss"] for row in val], "o-", color=f"C{i}", ms=3, label=f"{name}validation")
        rates.plot([row["iteration"] for row in train], [row["lr"] for row in train], color=f"C{i}")
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
    main()
