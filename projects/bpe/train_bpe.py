"""
Learns a vocabulary from a text by byte-pair encoding, in GPT-2's way.

    python projects/bpe/train_bpe.py                          # from Python's own help texts
    python projects/bpe/train_bpe.py --data.path=input.txt    # from a text file
    python projects/bpe/train_bpe.py --help                   # every setting

    from train_bpe import train_bpe
    encoder = train_bpe(text, vocab_size=2048)                # a mingpt.bpe.Encoder

mingpt/bpe.py says what words, bytes and merges are. Needs matplotlib for the picture.
"""

import heapq
import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from mingpt.bpe import WORD, Encoder, bytes_to_unicode
from mingpt.data import read_text
from mingpt.pretrained import save_encoder
from mingpt.utils import CfgNode, check_config, run_script

logger = logging.getLogger("mingpt.bpe")

BYTES = bytes_to_unicode()


def get_config() -> CfgNode:
    """Returns the settings with their defaults."""
    C = CfgNode()

    C.system = CfgNode()
    C.system.work_dir = "./out/bpe"  # where the vocabulary and the picture go

    C.data = CfgNode()
    C.data.path = ""  # a text file in UTF-8; empty takes Python's help texts
    C.data.vocab_size = 2048  # 256 bytes, <|endoftext|>, and a token for each merge

    return C


def learn_merges(text: str) -> Iterator[tuple[tuple[str, str], int]]:
    """Yields merges in the order they are learned, each with how often its pair stood there.

    Equal words change alike, so each is kept once, with its count. A merge touches only the words
    that contain its pair. It stops when no pair stands twice.
    """
    counts = Counter(WORD.findall(text))
    times = list(counts.values())
    words = [[BYTES[byte] for byte in word.encode("utf-8")] for word in counts]
    pair_counts: Counter = Counter()
    places = defaultdict(set)
    for i, symbols in enumerate(words):
        for pair in itertools.pairwise(symbols):
            pair_counts[pair] += times[i]
            places[pair].add(i)

    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    while heap:
        count, pair = heapq.heappop(heap)
        # A count in the heap may be too high: later merges break pairs up.
        if -count != pair_counts[pair]:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        if -count < 2:
            return
        yield pair, -count

        joined = "".join(pair)
        new_pairs = set()
        for i in places.pop(pair):
            symbols = words[i]
            j = 0
            while j < len(symbols) - 1:
                if (symbols[j], symbols[j + 1]) == pair:
                    # The pair goes: both neighbours form other pairs now.
                    before = max(j - 1, 0)
                    for old in itertools.pairwise(symbols[before : j + 3]):
                        pair_counts[old] -= times[i]
                    symbols[j : j + 2] = [joined]
                    for new in itertools.pairwise(symbols[before : j + 2]):
                        pair_counts[new] += times[i]
                        places[new].add(i)
                        new_pairs.add(new)
                j += 1
        for new in new_pairs:
            heapq.heappush(heap, (-pair_counts[new], new))


def train_bpe(text: str, vocab_size: int) -> Encoder:
    """Learns a vocabulary: the bytes, then a token a merge, and at last <|endoftext|>.

    A short text gives fewer tokens than vocab_size. ValueError for less than 257.
    """
    if vocab_size < 257:
        raise ValueError(f"got vocab_size={vocab_size}, expected 257 or more: bytes take 256")
    vocabulary = {symbol: number for number, symbol in enumerate(BYTES.values())}
    merges = []

    for pair, _ in learn_merges(text):
        if len(vocabulary) == vocab_size - 1:
            break
        merges.append(pair)
        # Two merges may give the same token: a + bc, ab + c.
        vocabulary.setdefault("".join(pair), len(vocabulary))
    vocabulary["<|endoftext|>"] = len(vocabulary)
    return Encoder(vocabulary, merges)


def measure(encoder: Encoder, text: str) -> tuple[list[int], list[float]]:
    """Returns sizes of vocabularies that know only the first merges, and characters per token."""
    merges = list(encoder.bpe_ranks)
    largest = 257 + len(merges)
    sizes = [257, *(2**k for k in range(9, 17) if 2**k < largest), largest]
    ratios = []
    for size in sizes:
        smaller = Encoder(encoder.encoder, merges[: size - 257])
        ratios.append(len(text) / len(smaller.encode(text)))
    return sizes, ratios


def draw(path: Path, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    """Draws characters per token over the size of the vocabulary, a curve for each text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, (sizes, ratios) in curves.items():
        axes.plot(sizes, ratios, "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlabel("tokens in the vocabulary")
    axes.set_ylabel("characters per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    rules = [("vocab_size", lambda size: size >= 257, "257 or more, since the bytes take 256")]
    check_config(config.data, rules)
    if config.data.path:
        text = read_text(config.data.path)
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    # The last tenth is held out: text that the vocabulary was not learned from.
    split = len(text) * 9 // 10
    encoder = train_bpe(text[:split], config.data.vocab_size)

    logger.info("the first merges, and how often each pair stood there:")
    for (left, right), count in itertools.islice(learn_merges(text[:split]), 12):
        logger.info(f"{count:9,}  {left} + {right} -> {left}{right}")
    words = [encoder.decode([number]).strip(" ") for number in encoder.decoder]
    longest = sorted(filter(str.isalpha, words), key=len, reverse=True)[:5]
    logger.info(f"the longest words: {' '.join(longest)}")

    curves = {
        "text it was learned from": measure(encoder, text[:split]),
        "held-out text": measure(encoder, text[split:]),
    }
    for name, (sizes, ratios) in curves.items():
        logger.info(f"{name}, characters per token:")
        for size, ratio in zip(sizes, ratios):
            logger.info(f"{size:9,} tokens  {ratio:.2f}")
    work_dir = Path(config.system.work_dir).expanduser()
    save_encoder(encoder, work_dir)
    draw(work_dir / "characters.png", curves)
    logger.info(f"vocab.json, merges.txt and characters.png are in {work_dir}")


if __name__ == "__main__":
    run_script(main)
