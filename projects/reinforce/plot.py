"""
Draws the picture of the readme, scores.png, from the metric rows in results/.

    python projects/reinforce/plot.py

Needs matplotlib.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SEEDS = (3407, 1, 2)


def read_scores(name: str) -> tuple[list[int], list[float]]:
    """Reads a run's steps, and the per cent of held-out sums that were right after them."""
    text = (HERE / "results" / f"{name}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    rows = [row for row in rows if row["split"] == "test"]
    return [row["iteration"] for row in rows], [100 * row["exact"] for row in rows]


def main() -> None:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, label, color in (("targets", "told the sums", "C1"),
                               ("reward", "told right or wrong", "C0")):
        runs = [read_scores(f"{name}-{seed}") for seed in SEEDS]
        for steps, scores in runs:
            axes.plot(steps, scores, color=color, alpha=0.3, lw=1)
        mean = np.mean([scores for _, scores in runs], axis=0)
        axes.plot(runs[0][0], mean, color=color, lw=2, label=f"{label}: mean of three seeds")
    axes.set_xlabel("step of the second part")
    axes.set_ylabel("held-out sums right, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(HERE / "scores.png", dpi=110)
    print(HERE / "scores.png")


if __name__ == "__main__":
    main()
