"""
The table and the picture of the ladder, from the rows that ladder.py has written.

    python projects/ladder/report.py                           # of out/ladder
    python projects/ladder/report.py projects/ladder/results   # of another folder

Several seeds stand side by side. The picture needs matplotlib.
"""

import argparse
import json
import statistics
from pathlib import Path

from mingpt.utils import run_script


def read_results(folder: Path) -> dict[str, list[dict]]:
    """Reads rung -> its rows, one for each seed; of several with one seed the last counts."""
    rows = {}
    for path in sorted(folder.glob("seed-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["rung"], row["seed"]] = row
    if not rows:
        raise ValueError(f"there are no results in {folder}; run ladder.py first")

    results = {}
    for (name, _), row in rows.items():
        results.setdefault(name, []).append(row)
    return results


def format_table(results: dict[str, list[dict]]) -> str:
    """Formats the table in Markdown: medians over the seeds, and the gain of each rung.

    The gain is against the rung that a row names, or else the one before without such a
    name. Below 0.01 it is called noise: seeds differ by as much.
    """
    lines = ["| rung | parameters | seconds | loss | gain | loss in the same time |",
             "|---|---|---|---|---|---|"]
    before = ""

    for name, rows in results.items():
        against = rows[0]["against"]
        if against == "":
            against = before
            before = name
        gain = ""
        if against in results:
            difference = median(results[against], "loss") - median(rows, "loss")
            gain = f"{difference:+.3f}" if abs(difference) >= 0.01 else "noise"
        cells = [name, f"{rows[0]['parameters']:,}", f"{median(rows, 'seconds'):.1f}",
                 format_losses(rows, "loss"), gain, format_losses(rows, "loss_in_time")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def median(rows: list[dict], field: str) -> float:
    return statistics.median(row[field] for row in rows)


def format_losses(rows: list[dict], field: str) -> str:
    """Formats the median over the seeds, the least and the largest: 1.7012 (1.695 to 1.710)."""
    values = [row[field] for row in rows if field in row]
    if not values:
        return ""
    text = f"{statistics.median(values):.4f}"
    if len(values) > 1:
        text += f" ({min(values):.3f} to {max(values):.3f})"
    return text


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Draws the losses: all rungs in a panel above, ModernGPT without its parts below."""
    from matplotlib.figure import Figure
    rungs = [name for name in results if "ModernGPT without" not in name]
    variants = [name for name in results if "ModernGPT" in name]

    heights = [max(1, len(rungs)), max(1, len(variants))]
    figure = Figure(figsize=(8, 1.4 + 0.3 * sum(heights)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=heights)
    draw_losses(above, rungs, results, "loss", "C0", "the same characters")
    draw_losses(above, rungs, results, "loss_in_time", "C1", "the same time")
    draw_losses(below, variants, results, "loss", "C0", "the same characters")
    above.legend(title="a dot is a seed; each rung had", loc="lower right")
    below.set_title("ModernGPT without its parts, on a finer scale", fontsize=10)
    for axes in (above, below):
        axes.set_xlabel("loss on the held-out text, nats per character (lower is better)")
    figure.savefig(path, dpi=110)


def draw_losses(axes, names: list[str], results: dict[str, list[dict]], field: str, color: str,
                label: str) -> None:
    """Draws a dot for each rung and seed."""
    dots = [(row[field], y) for y, name in enumerate(names)
            for row in results[name] if field in row]
    axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=color, ms=5, alpha=0.7,
              label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    axes.grid(alpha=0.3)


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Prints and draws what the rungs have reached.")
    parser.add_argument("folder", type=Path, nargs="?", default="out/ladder", help="of the rows")
    folder = Path(parser.parse_args(args).folder)
    results = read_results(folder)
    print(format_table(results))
    draw(results, folder / "ladder.png")
    print(f"the picture is {folder / 'ladder.png'}")


if __name__ == "__main__":
    run_script(main)
