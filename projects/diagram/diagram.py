"""
Draws the picture of a GPT that the README shows: the path of the tokens, and one block opened.

    python projects/diagram/diagram.py      # writes gpt-light.svg and gpt-dark.svg beside this file

Needs matplotlib.
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

matplotlib.use("Agg")
# These settings keep random identifiers and the date out of the files.
matplotlib.rcParams["svg.hashsalt"] = "minGPT"
METADATA = {"Date": None}

# The colours have the names of the parts: here for a white page, then for a
# dark one.
LIGHT = {
    "text": "#1f2328", "shape": "#59636e", "edge": "#8c959f", "panel": "#f6f8fa",
    "embedding": "#ddf4ff", "attention": "#fff1cc", "mlp": "#dafbe1", "head": "#fbe4f2",
    "stream": "#0969da",
}
DARK = {
    "text": "#f0f6fc", "shape": "#9fa9b4", "edge": "#6e7681", "panel": "#161b22",
    "embedding": "#0c3a5e", "attention": "#4d3800", "mlp": "#0f3d1e", "head": "#4a1f3d",
    "stream": "#58a6ff",
}


class Pen:
    """Draws boxes, arrows and words of the diagram in one set of colours."""

    def __init__(self, axes: Axes, colours: dict[str, str]):
        self.axes = axes
        self.colours = colours

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """Draws a box whose lower left corner is (x, y)."""
        style = "round,pad=0,rounding_size=1"
        self.axes.add_patch(FancyBboxPatch(
            (x, y), width, height, boxstyle=style, lw=1,
            facecolor=self.colours[fill], edgecolor=self.colours["edge"]))

    def write(self, x: float, y: float, text: str, size: float = 9.5, colour: str = "text",
              **settings) -> None:
        """Writes a text in the middle of (x, y), or at its right with ha="left"."""
        settings = {"ha": "center", "va": "center", **settings}
        self.axes.text(x, y, text, fontsize=size, color=self.colours[colour], **settings)

    def shape(self, x: float, y: float, text: str) -> None:
        """Writes the shape of a tensor, to the right of (x, y)."""
        self.write(x, y, text, 8.5, "shape", ha="left", family="monospace")

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draws an arrow of something that leaves the stream or comes back to it."""
        self.axes.annotate("", end, start, arrowprops=dict(
            arrowstyle="-|>", color=self.colours["edge"], lw=1.3, shrinkA=0, shrinkB=0))

    def stream(self, x: float, start: float, end: float) -> None:
        """Draws a piece of the residual stream, downwards."""
        self.axes.annotate("", (x, end), (x, start), arrowprops=dict(
            arrowstyle="-|>,head_width=0.35,head_length=0.6", color=self.colours["stream"],
            lw=3, shrinkA=0, shrinkB=0))

    def plus(self, x: float, y: float) -> None:
        """Draws the place where a result is added to the stream."""
        self.axes.add_patch(Circle((x, y), 1.7, lw=1.5, zorder=3, facecolor=self.colours["panel"],
                                   edgecolor=self.colours["stream"]))
        self.write(x, y - 0.1, "+", 13, "stream", zorder=4)


def draw_model(pen: Pen) -> None:
    """Draws the whole model: tokens, embedding, blocks, logits."""
    x = 16
    for i, token in enumerate(("To", "be", "or", "not")):
        pen.box(x - 14 + 7 * i, 83, 6.4, 5, "panel")
        pen.write(x - 10.8 + 7 * i, 85.5, token)
    pen.write(x, 91, "tokens (numbers of pieces of text)")
    pen.shape(x + 15.5, 85.5, "(B, T)")

    pen.arrow((x, 83), (x, 79.3))
    pen.box(x - 14, 71, 28, 8, "embedding")
    pen.write(x, 76.6, "token embedding wte", 9)
    pen.write(x, 73.2, "+ position embedding wpe", 9)
    pen.stream(x, 71, 65.2)
    pen.shape(x + 15.5, 75, "(B, T, C)")

    for y, name in ((57, "block 0"), (44.5, "block 1"), (25, "block n_layer − 1")):
        pen.box(x - 14, y, 28, 8, "panel")
        pen.write(x, y + 4, name)
        pen.shape(x + 15.5, y + 4, "(B, T, C)")
    pen.stream(x, 57, 52.7)
    pen.stream(x, 44.5, 40.5)
    pen.write(x, 38.2, "⋮", 13, "stream")
    pen.stream(x, 36.5, 33.2)
    pen.stream(x, 25, 21.7)

    pen.box(x - 14, 13.5, 28, 8, "head")
    pen.write(x, 19.1, "LayerNorm ln_f")
    pen.write(x, 15.7, "Linear lm_head")
    pen.shape(x + 15.5, 17.5, "(B, T, V)")
    pen.arrow((x, 13.5), (x, 10.7))
    pen.write(x, 9.3, "logits: a score for each possible next token")
    pen.arrow((x, 7.9), (x, 5.3))
    for i, token in enumerate(("be", "or", "not", "to")):
        pen.box(x - 14 + 7 * i, 0, 6.4, 5, "panel")
        pen.write(x - 10.8 + 7 * i, 2.5, token)
    pen.write(x, -2, "the likeliest next tokens")


def draw_mask(pen: Pen, x: float, y: float) -> None:
    """Draws the mask of four tokens: a token looks at itself and those before it."""
    side = 2.1
    for row in range(4):
        for column in range(4):
            seen = column <= row
            pen.axes.add_patch(Rectangle(
                (x + side * column, y - side * (row + 1)), side, side, lw=0.8,
                facecolor=pen.colours["stream"] if seen else "none", alpha=0.75 if seen else 1,
                edgecolor=pen.colours["edge"]))


def draw_block(pen: Pen) -> None:
    """Draws one block opened: attention and MLP beside the residual stream."""
    x = 55
    pen.box(47, 3, 72, 89, "panel")
    pen.write(58, 89.3, "a block, opened", 10.5, ha="left", weight="bold")
    pen.write(50, 47, "residual stream (B, T, C)", 9, "stream", rotation=90)
    pen.stream(x, 95, 43.8)
    pen.plus(x, 42)
    pen.stream(x, 40.2, 11.8)
    pen.plus(x, 10)
    pen.stream(x, 8.2, -1)

    draw_part(pen, x, 37, 49, "attention", "attention: collect from earlier tokens", (
        (77, "LayerNorm ln_1", "(B, T, C)"),
        (71.5, "query, key, value = c_attn", "(B, nh, T, hs) each"),
        (66, "scores = query · key / √hs", "(B, nh, T, T)"),
        (53, "weights = softmax(scores)", "(B, nh, T, T)"),
        (47.5, "weights · value", "(B, nh, T, hs)"),
        (42, "c_proj: heads to channels", "(B, T, C)"),
    ))
    pen.write(66, 60.9, "mask: a token (row) looks", 8.5, "shape", ha="left")
    pen.write(66, 57.9, "at blue; all else gets −∞", 8.5, "shape", ha="left")
    draw_mask(pen, 96, 63.6)
    draw_part(pen, x, 5, 28, "mlp", "MLP: work on what was collected", (
        (25, "LayerNorm ln_2", "(B, T, C)"),
        (20, "c_fc: four times as wide", "(B, T, 4C)"),
        (15, "GELU", "(B, T, 4C)"),
        (10, "c_proj", "(B, T, C)"),
    ))


def draw_part(pen: Pen, x: float, y: float, height: float, fill: str, title: str,
              lines: tuple[tuple[float, str, str], ...]) -> None:
    """Draws a part of a block: it reads from the stream at x and adds to it."""
    pen.box(62, y, 55, height, fill)
    pen.write(64, y + height - 3.5, title, ha="left", weight="bold")
    for row, text, shape in lines:
        pen.write(64, row, text, ha="left")
        pen.shape(95, row, shape)
    first = lines[0][0]
    last = lines[-1][0]
    pen.arrow((x, first), (62, first))
    pen.arrow((62, last), (x + 1.8, last))


def draw(colours: dict[str, str], path: Path) -> None:
    """Draws the diagram and writes it to a file, without a background."""
    figure, axes = plt.subplots(figsize=(10, 8.2))
    axes.set_axis_off()
    axes.set_xlim(0, 120)
    axes.set_ylim(-7, 96)

    pen = Pen(axes, colours)
    draw_model(pen)
    draw_block(pen)
    letters = "B batch · T time (tokens) · C channels · V vocabulary · nh heads · hs = C / nh"
    pen.write(59.5, -5.5, letters, 9, "shape")
    figure.savefig(path, transparent=True, bbox_inches="tight", pad_inches=0.05, metadata=METADATA)
    plt.close(figure)
    print(path)


def main() -> None:
    folder = Path(__file__).parent
    draw(LIGHT, folder / "gpt-light.svg")
    draw(DARK, folder / "gpt-dark.svg")


if __name__ == "__main__":
    main()
