"""
How fast a GPT generates: this one, without and with its cache, and transformers' GPT2LMHeadModel with the same weights.

    python projects/bench/generate.py                       # small models, half a minute
    python projects/bench/generate.py --sizes=gpt2          # 124M parameters, with memory bandwidth, bfloat16 and loading; minutes

Needs `pip install -e ".[test]"`. All ways take turns in one process; the figures are medians, so that a busy machine slows all alike.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers

from mingpt.model import GPT

SIZES = { # n_layer, n_head, n_embd, vocab_size, block_size
    "gpt-nano": (3, 3, 48, 65, 256),
    "gpt-mini": (6, 6, 192, 65, 256),
    "6x384": (6, 6, 384, 65, 256),
    "gpt2": (12, 12, 768, 50257, 1024),
}

def medians(ways: dict, rounds: int) -> dict:
    """The median time in seconds of each way, run in turns."""
    times = {name: [] for name in ways}
    for name, way in ways.items(): # one round to warm up
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}

def make_pair(size: str, folder: str):
    """A GPT as from_pretrained gives it, and the same in transformers."""
    config = GPT.get_default_config()
    config.merge_from_dict(dict(zip(("n_layer", "n_head", "n_embd", "vocab_size", "block_size"), SIZES[size])))
    GPT(config).save_pretrained(folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    theirs.generation_config.eos_token_id = None
    return GPT.from_pretrained(folder), theirs

def bench_size(size: str, batch: int, tokens: int, rounds: int, ours, theirs) -> None:
    idx = torch.randint(ours.config.vocab_size, (batch, 8))
    attention_mask = torch.ones_like(idx)
    ways = {
        "mingpt": lambda: ours.generate(idx, tokens),
        "transformers": lambda: theirs.generate(idx, attention_mask=attention_mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0),
    }
    if size != "gpt2":
        ways["mingpt without cache"] = lambda: ours.generate(idx, tokens, use_cache=False)
    times = medians(ways, rounds)
    cells = [f"{name} {batch * tokens / times[name]:,.1f}" for name in ways]
    print(f"{size}, batch {batch}: {' | '.join(cells)} tokens/s | mingpt / transformers {times['transformers'] / times['mingpt']:.2f}", flush=True)

def bench_bounds(ours, folder: str, tokens: int, rounds: int) -> None:
    """One row at a time reads every weight once a token: the memory's speed bounds it. And bfloat16, and loading."""
    weights = sum(p.numel() for p in ours.parameters())
    block = torch.ones(weights) # as much memory as the weights in float32
    half = GPT.from_pretrained(folder).bfloat16()
    idx = torch.randint(ours.config.vocab_size, (1, 8))
    times = medians({"read": block.sum, "float32": lambda: ours.generate(idx, tokens), "bfloat16": lambda: half.generate(idx, tokens)}, rounds)
    bound = 1 / times["read"]
    print(f"memory read at {weights * 4 / times['read'] / 1e9:.1f} GB/s allows {bound:.1f} tokens/s; float32 reaches {tokens / times['float32'] / bound:.0%}")
    print(f"bfloat16 {tokens / times['bfloat16']:.1f} tokens/s, {times['float32'] / times['bfloat16']:.2f} x float32")
    path = Path(folder) / "pytorch_model.bin"
    times = medians({
        "load": lambda: GPT.from_pretrained(folder),
        "load and use": lambda: GPT.from_pretrained(folder).generate(idx, 1),
        "read and copy": lambda: [tensor.clone() for tensor in torch.load(path, weights_only=True).values()],
    }, rounds)
    print("loading: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in times.items()) +
          f"; load / read and copy {times['load'] / times['read and copy']:.2f}")

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["gpt-nano", "gpt-mini", "6x384"])
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
          f"{args.tokens} tokens, medians of {args.rounds} rounds")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = make_pair(size, folder)
            for batch in (1, 8):
                bench_size(size, batch, args.tokens, args.rounds, ours, theirs)
            if size == "gpt2":
                bench_bounds(ours, folder, args.tokens, args.rounds)

if __name__ == "__main__":
    main()
