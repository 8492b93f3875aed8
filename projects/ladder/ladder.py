"""
The ladder: from counting pairs of characters to a GPT, each step measured.

    python projects/ladder/ladder.py                               # all rungs
    python projects/ladder/ladder.py --data.path=input.txt         # a text of your own
    python projects/ladder/ladder.py --system.rungs="four heads,+ MLP"
    python projects/ladder/ladder.py --help                        # every setting

All rungs learn to predict the next character: once from the same characters, once for
the same seconds of the processor. No rung learns from the last tenth of the text, which
the loss is measured on. report.py draws the picture.
In shapes: B batch, T time, C channels, V vocabulary, nh heads, hs head size.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
# An optimizer's first step would load this for a second: no rung should pay.
from torch import Tensor, _dynamo, nn  # noqa: F401
from torch.nn import functional as F

from mingpt.data import TokenDataset, read_text
from mingpt.model import GPT
from mingpt.run import Run
from mingpt.utils import CfgNode, check_config, eval_mode, run_script, set_seed
from modern import ModernGPT
from report import format_table, read_results


def get_config() -> CfgNode:
    """Returns the settings of the script with their defaults."""
    C = CfgNode()
    C.system = CfgNode()
    C.system.seed = 3407
    C.system.work_dir = "./out/ladder"  # where the results go, a file for each seed
    C.system.rungs = ""  # names of rungs, separated by commas; empty takes all
    C.system.seconds = 20.0  # of the processor, for the second column; 0 leaves it out
    C.data = CfgNode()
    C.data.path = ""  # a text file; empty takes Python's help texts
    # The first rungs have one layer, and take n_embd and block_size alone.
    C.model = CfgNode(n_layer=4, n_head=4, n_embd=128, block_size=64,
                      embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    C.trainer = CfgNode(max_iters=1000, batch_size=12, betas=(0.9, 0.99), momentum=0.85,
                        schedule="linear", log_interval=0)
    return C


# The rungs. Each is a module that returns (logits, loss), as a Trainer expects.


def measure(logits: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Adds the mean cross-entropy in nats: logits (B, T, V) and targets (B, T)."""
    if targets is None:
        return logits, None
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class Pairs(nn.Module):
    """Predicts from the last character alone: a table has a score for every pair."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def count(self, tokens: np.ndarray) -> None:
        """Fills the table by counting: softmax of the logarithms gives the shares."""
        V = self.table.num_embeddings
        # Each pair has a number of its own.
        pairs = tokens[:-1].astype(np.int64) * V + tokens[1:]  # (characters - 1,)
        counts = np.bincount(pairs, minlength=V * V).reshape(V, V)
        # One more of each, since a pair that was never seen is not impossible.
        self.table.weight.data = torch.from_numpy(np.log(counts + 1.0)).float()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple:
        return measure(self.table(idx), targets)  # (B, T) -> (B, T, V)


class LastEight(nn.Module):
    """Predicts from the last 8 characters, side by side (Bengio et al. 2003)."""

    def __init__(self, vocab_size: int, n_embd: int):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd // 4)
        self.hidden = nn.Linear(8 * (n_embd // 4), 4 * n_embd)
        self.head = nn.Linear(4 * n_embd, vocab_size)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple:
        x = F.pad(self.wte(idx), (0, 0, 7, 0))  # (B, T, C) -> (B, 7 + T, C)
        x = x.unfold(1, 8, 1).flatten(2)  # -> (B, T, C, 8) -> (B, T, 8C)
        return measure(self.head(self.hidden(x).tanh()), targets)  # -> (B, T, V)


class Mean(nn.Module):
    """Gives each character the mean of itself and all before it."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.value = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.size(1) + 1)[:, None]  # (T, 1)
        return self.value(x).cumsum(dim=1) / count  # (B, T, C)


class Attention(nn.Module):
    """Gives each character a mean of the past, by weights it chooses (Vaswani et al. 2017)."""

    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.query = nn.Linear(n_embd, n_embd)
        self.key = nn.Linear(n_embd, n_embd)
        self.value = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        layers = (self.query, self.key, self.value)
        # Each (B, T, C) -> (B, T, nh, hs) -> (B, nh, T, hs)
        q, k, v = [layer(x).view(heads).transpose(1, 2) for layer in layers]

        scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3))  # (B, nh, T, T)
        # No character may look at those after it.
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=3)
        # The heads come side by side.
        return (weights @ v).transpose(1, 2).reshape(B, T, C)  # (B, T, C)


class OneLayer(nn.Module):
    """Collects from the past by `mix`; switches add the other parts of a GPT's block."""

    def __init__(self, vocab_size: int, block_size: int, n_embd: int, mix: nn.Module,
                 mlp: bool = False, residual: bool = False, norm: bool = False):
        super().__init__()
        make_norm = nn.LayerNorm if norm else nn.Identity
        self.residual = residual
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.norm_1 = make_norm(n_embd)
        self.mix = mix
        self.norm_2 = make_norm(n_embd)

        self.mlp = None
        if mlp:
            self.mlp = nn.Sequential(
                nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))
        self.norm_f = make_norm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))  # (B, T, C)
        x = self.add(x, self.mix(self.norm_1(x)))
        if self.mlp is not None:
            x = self.add(x, self.mlp(self.norm_2(x)))
        return measure(self.head(self.norm_f(x)), targets)  # (B, T, V)

    def add(self, x: Tensor, new: Tensor) -> Tensor:
        """Adds to the residual stream, or puts the new in its place where there is none."""
        return x + new if self.residual else new


class Rung(NamedTuple):
    """Describes a row of the table."""

    name: str
    make: Callable[[CfgNode], nn.Module]  # builds the module, from the settings of a model
    learning_rate: float  # 0 for a module that counts, and does not learn by gradient
    optimizer: str = "adamw"
    against: str = ""  # the rung that it is compared with; empty: the one before


def one_layer(mix: Callable[[int], nn.Module], **parts: bool) -> Callable[[CfgNode], nn.Module]:
    """Returns a function that builds a OneLayer around mix(n_embd), with these parts."""
    return lambda c: OneLayer(c.vocab_size, c.block_size, c.n_embd, mix(c.n_embd), **parts)


def without(part: str) -> Rung:
    """Returns the rung of a ModernGPT that lacks one of its changes."""
    def make(config: CfgNode) -> nn.Module:
        return ModernGPT(CfgNode(**vars(config), **{part: False}))
    return Rung(f"ModernGPT without {part}", make, 1e-2, "muon", "ModernGPT")


def one_layer_gpt(config: CfgNode) -> nn.Module:
    return GPT(CfgNode(**vars(config) | {"n_layer": 1}))


FOUR_HEADS = partial(Attention, n_head=4)
# Each learning rate is the best of several on tiny Shakespeare: see log.md.
RUNGS = [
    Rung("counted pairs", lambda c: Pairs(c.vocab_size), 0.0),
    Rung("pairs by gradient", lambda c: Pairs(c.vocab_size), 1e-1),
    Rung("last 8 characters", lambda c: LastEight(c.vocab_size, c.n_embd), 1e-2),
    Rung("mean of the past", one_layer(Mean), 1e-2),
    Rung("one head of attention", one_layer(partial(Attention, n_head=1)), 1e-2),
    Rung("four heads", one_layer(FOUR_HEADS), 1e-2),
    Rung("+ MLP", one_layer(FOUR_HEADS, mlp=True), 1e-2),
    Rung("+ residual stream", one_layer(FOUR_HEADS, mlp=True, residual=True), 1e-2),
    Rung("+ LayerNorm", one_layer(FOUR_HEADS, mlp=True, residual=True, norm=True), 1e-2),
    Rung("GPT", GPT, 6e-3),
    Rung("one-layer GPT", one_layer_gpt, 6e-3, "adamw", "GPT"),
    Rung("GPT with Muon", GPT, 1e-2, "muon"),
    Rung("one-layer GPT with Muon", one_layer_gpt, 1e-2, "muon", "GPT with Muon"),
    Rung("ModernGPT", ModernGPT, 1e-2, "muon"),
    without("rotary"),
    without("rms_norm"),
    without("qk_norm"),
    without("relu_squared"),
    without("zero_init"),
    Rung("ModernGPT without Muon", ModernGPT, 6e-3, "adamw", "ModernGPT"),
]


def train(rung: Rung, config: CfgNode, max_iters: int, train_tokens: np.ndarray,
          val_tokens: np.ndarray) -> tuple[nn.Module, float, float]:
    """Builds a rung and trains it; returns the module, its loss and the seconds it took."""
    set_seed(config.system.seed)
    model = rung.make(CfgNode(**vars(config.model)))
    T = config.model.block_size
    # Seconds of the processor are compared, so no rung may use another device.
    settings = CfgNode(**vars(config.trainer), device="cpu")
    settings.max_iters = max_iters
    # All rungs see the same examples.
    settings.seed = config.system.seed
    settings.optimizer = rung.optimizer
    settings.learning_rate = rung.learning_rate
    if rung.optimizer == "adamw":
        # AdamW's first steps would be too large, Muon's are not.
        settings.warmup_iters = max_iters // 10
    run = Run(settings, model, TokenDataset(train_tokens, T))

    start = time.process_time()
    if rung.learning_rate == 0:
        model.count(train_tokens[:max_iters * settings.batch_size * T])
    else:
        run.run()
    seconds = time.process_time() - start
    return model, run.evaluate(TokenDataset(val_tokens, T, stride=T)), seconds


def write(model: nn.Module, start: Tensor, length: int) -> list[int]:
    """Draws characters one by one, as every rung can: start (T,) -> new tokens (length,)."""
    tokens = start[None]  # (T,) -> (1, T)
    with torch.no_grad(), eval_mode(model):
        for _ in range(length):
            logits, _ = model(tokens[:, -len(start):])  # (1, T, V)
            # A temperature of 0.8 favours the likely.
            probs = (logits[:, -1] / 0.8).softmax(dim=-1)  # (1, V)
            tokens = torch.cat([tokens, probs.multinomial(1)], dim=1)  # (1, T + 1)
    return tokens[0, len(start):].tolist()


def find_text(path: str) -> str:
    """Reads a file, or Python's help texts for an empty path."""
    if path:
        return read_text(path)
    from pydoc_data.topics import topics
    return "\n".join(topics[topic] for topic in sorted(topics))


def climb(config: CfgNode) -> None:
    """Trains the rungs, prints what they reach, and adds a row for each to the results."""
    text = find_text(config.data.path)
    chars = sorted(set(text))
    places = {char: place for place, char in enumerate(chars)}
    tokens = np.array([places[char] for char in text])
    texts = np.split(tokens, [int(0.9 * len(tokens))])
    start = torch.from_numpy(texts[1][:config.model.block_size])  # (T,)
    config.model.vocab_size = len(chars)
    path = Path(config.system.work_dir) / f"seed-{config.system.seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)

    for rung in RUNGS:
        if config.system.rungs and rung.name not in config.system.rungs.split(","):
            continue
        max_iters = config.trainer.max_iters
        model, loss, seconds = train(rung, config, max_iters, *texts)
        sample = "".join(chars[token] for token in write(model, start, 120))
        count = sum(p.numel() for p in model.parameters())
        print(f"{rung.name}: loss {loss:.4f}, {count:,} parameters, {seconds:.1f} s\n{sample}\n")

        row = dict(rung=rung.name, against=rung.against, seed=config.system.seed, steps=max_iters,
                   parameters=count, seconds=seconds, loss=loss, sample=sample)
        if config.system.seconds > 0 and rung.learning_rate > 0 and not rung.against:
            row["steps_in_time"] = max(1, round(max_iters * config.system.seconds / seconds))
            row["loss_in_time"] = train(rung, config, row["steps_in_time"], *texts)[1]
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    names = [rung.name for rung in RUNGS]
    check_config(config.system, (
        ("rungs", lambda v: v == "" or set(v.split(",")) <= set(names), f"some of {names}"),))
    logging.getLogger("mingpt").setLevel(logging.WARNING)
    climb(config)
    print(format_table(read_results(Path(config.system.work_dir))))


if __name__ == "__main__":
    run_script(main)
