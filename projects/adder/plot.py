"""
Draws the pictures of the readme from the metric rows in results/.

    python projects/adder/plot.py

Needs matplotlib.
"""

import json
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent

def read_scores(name: str) -> list[dict]:
    """The rows of a run that hold exact scores on the held-out problems."""
    lines = (HERE / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == "test"]

def draw(axes, name: str, label: str, **style) -> None:
    rows = read_scores(name)
    axes.plot([0] + [row["iteration"] for row in rows], [0] + [100 * row["exact"] for row in rows], label=label, **style)

def main() -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for n in (1, 2, 3, 4):
        draw(left, f"digits{n}", f"{n} digit{'s' * (n > 1)}", color=f"C{n}")
    left.set_title("held-out sums exact")
    for n in (2, 3):
        draw(middle, f"digits{n}", f"{n} digits, last digit first", color=f"C{n}")
        draw(middle, f"digits{n}-forward", f"{n} digits, first digit first", color=f"C{n}", ls="--")
    middle.set_title("what reversing the sum is worth")
    rows = read_scores("digits3")
    for carries in range(4):
        right.plot([0] + [row["iteration"] for row in rows], [0] + [100 * row["by_carries"][str(carries)] for row in rows],
                   label=f"{carries} carr{'y' if carries == 1 else 'ies'}", color=plt.cm.viridis(carries / 3.5))
    right.set_title("three digits, by number of carries")
    left.set_ylabel("per cent")
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.set_ylim(-2, 102)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(HERE / "scores.png", dpi=110)
    print(HERE / "scores.png")

if __name__ == "__main__":
    main()
