"""
Draws the picture of the readme, scores.png, from the metric rows in results/.

    python projects/reinforce/plot.py

Needs matplotlib.
"""

import runpy
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SEEDS = (3407, 1, 2)
# The adder writes the same rows, and its plot reads them.
read_scores = runpy.run_path(str(HERE.parent / "adder" / "plot.py"))["read_scores"]


def main() -> None:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, label, color in (("targets", "told the sums", "C1"),
                               ("reward", "told right or wrong", "C0")):
        runs = [read_scores(HERE / "results" / f"{name}-{seed}.jsonl") for seed in SEEDS]
        for steps, scores in runs:
            axes.plot(steps, scores, color=color, alpha=0.3, lw=1)
        mean = np.mean([scores for _, scores in runs], axis=0)
        axes.plot(runs[0][0], mean, color=color, lw=2, label=f"{label}: mean of three seeds")

    axes.set_xlabel("step of the second part")
    axes.set_ylabel("held-out sums right, % (higher is better)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(HERE / "scores.png", dpi=110)
    print(HERE / "scores.png")


if __name__ == "__main__":
    main()
