"""
Draws the picture of the readme, scores.png, from the metric rows in results/.

    python projects/adder/plot.py

Needs matplotlib.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent


def read_scores(path: Path) -> tuple[list[int], list[float]]:
    """Reads a run's steps, and the per cent of held-out sums that were right after them."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] == "test"]
    return [row["iteration"] for row in rows], [100 * row["exact"] for row in rows]


def main() -> None:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, label in (("digits1", "1 digit"), ("digits2", "2 digits"), ("digits3", "3 digits")):
        steps, scores = read_scores(HERE / "results" / f"{name}.jsonl")
        axes.plot([0, *steps], [0, *scores], label=label)

    axes.set_xlabel("step")
    axes.set_ylabel("held-out sums right, % (higher is better)")
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(HERE / "scores.png", dpi=110)
    print(HERE / "scores.png")


if __name__ == "__main__":
    main()
