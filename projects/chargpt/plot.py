"""
Draws the validation losses of chargpt's small runs beside nanoGPT's published result.

    python projects/chargpt/plot.py     # from results/small*.jsonl, makes loss.png

Needs matplotlib.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent
RUNS = {"small-adamw": "this GPT, AdamW", "small": "this GPT, Muon"}
# From nanoGPT's readme: the same text, size and number of characters.
NANOGPT = 1.88


def read_losses(path: Path) -> tuple[list[int], list[float]]:
    """Returns the steps and the validation losses of a run's metrics."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] == "val"]
    return [row["iteration"] for row in rows], [row["loss"] for row in rows]


def main() -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in RUNS.items():
        steps, losses = read_losses(FOLDER / "results" / f"{name}.jsonl")
        axes.plot(steps, losses, "o-", ms=3, label=label)
        axes.annotate(f"{losses[-1]:.2f}", (steps[-1], losses[-1]), xytext=(6, -3),
                      textcoords="offset points")

    axes.axhline(NANOGPT, color="gray", linestyle="--")
    axes.text(2130, NANOGPT + 0.01, f"nanoGPT after 2,000 steps: {NANOGPT}", color="gray",
              ha="right")
    axes.set_xlim(0, 2150)
    axes.set_ylim(1.5, 2.4)
    axes.set_xlabel("steps of 12 x 64 characters")
    axes.set_ylabel("validation loss, nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FOLDER / "loss.png", dpi=110)


if __name__ == "__main__":
    main()
