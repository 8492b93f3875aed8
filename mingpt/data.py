"""
From a text to the batches of a step: text -> tokens in a file -> windows -> batches.

    encode_file(get_encoder(), "corpus.txt", "corpus.bin")
    tokens = np.memmap("corpus.bin", dtype=np.uint16, mode="r")
    train_dataset = TokenDataset(tokens[:-100_000], block_size=128)
    val_dataset = TokenDataset(tokens[-100_000:], block_size=128, stride=128)
"""

import functools
import math
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import regex
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from mingpt.processes import STOP_SIGNALS
from mingpt.utils import progress, replacing

PART_CHARACTERS = 1 << 16


def read_text(path: str | Path) -> str:
    """Reads a text file in UTF-8; ValueError if there is none or it has another encoding.

    A byte order mark is dropped, and each line end becomes \\n.
    """
    return "".join(_read_parts(path))


def _read_parts(path: str | Path) -> Iterator[str]:
    """Yields a text file in parts, cut before white space, which never continues a word."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no text file {path}")

    last_cut = regex.compile(r"(?r)\S(?=\s)")
    rest = ""
    with open(path, encoding="utf-8-sig") as file:
        try:
            for part in iter(lambda: file.read(PART_CHARACTERS), ""):
                rest += part
                # Earlier parts were searched already.
                cut = last_cut.search(rest, max(0, len(rest) - len(part) - 1))
                if cut is not None:
                    yield rest[:cut.end()]
                    rest = rest[cut.end():]
        except UnicodeDecodeError as error:
            # The bytes of error.object end where the file is read to.
            place = file.buffer.tell() - len(error.object) + error.start  # type: ignore
            raise ValueError(f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} "
                             f"at position {place}; save it as UTF-8 first") from None
    yield rest


def encode_file(encoder, path: str | Path, out: str | Path,
                allowed_special: str | Iterable[str] = ()) -> int:
    """Encodes a text file to a file of uint16 tokens, and returns their number.

    They are the tokens of encoder.encode(read_text(path), allowed_special), but memory
    holds only a part of the text, up to some white space. ValueError for a text that is
    not UTF-8 or too large a vocabulary; an older `out` then stays as it is.
    """
    path = Path(path).expanduser()
    out = Path(out).expanduser()
    if out.is_dir() or out.resolve() == path.resolve():
        raise ValueError(f"got {out} for the tokens of {path}, expected the name of another file")
    if max(encoder.decoder) > 65535:
        raise ValueError(f"the vocabulary goes up to {max(encoder.decoder)}, uint16 to 65535")
    if not isinstance(allowed_special, str):
        allowed_special = list(allowed_special)
    if regex.search(r"\s", "".join(allowed_special)):
        raise ValueError(f"got {allowed_special}, expected special tokens without white space")

    count = path.stat().st_size // PART_CHARACTERS + 1
    with replacing(out) as new, open(new, "wb") as file:
        for part in progress(_read_parts(path), f"encoding {path}", count):
            tokens = encoder.encode(part, allowed_special)
            np.array(tokens, dtype=np.uint16).tofile(file)
    return out.stat().st_size // 2


class TokenDataset(Dataset):
    """Cuts a row of tokens into windows: x (T,), and y (T,), which is one token later.

    T is block_size; windows are `stride` apart. The last one would pass the end, so it
    starts earlier; targets it shares with the one before are ignored (-1). With 4 and 4:

        tokens    0 1 2 3 4 5 6 7 8 9
        x         0 1 2 3                y   1  2  3  4
                          4 5 6 7            5  6  7  8
                            5 6 7 8         -1 -1 -1  9
    """

    def __init__(self, tokens, block_size: int, stride: int = 1):
        self.tokens = np.asarray(tokens)
        self.block_size = block_size
        self.stride = stride
        self.last_start = len(self.tokens) - block_size - 1
        if not 1 <= stride <= block_size:
            raise ValueError(f"got block_size={block_size} and stride={stride}, "
                             "expected a stride from 1 to block_size")
        if self.last_start < 0:
            raise ValueError(f"got a text of {len(self.tokens)} tokens, expected {block_size + 1} "
                             f"or more: take a longer one, or a block_size below {block_size}")

    def __len__(self) -> int:
        return math.ceil(self.last_start / self.stride) + 1

    def __getitems__(self, indices: list[int]) -> Any:
        """Returns a batch, x (B, T) and y (B, T)."""
        # A subclass may change single examples.
        if type(self).__getitem__ is not TokenDataset.__getitem__:
            return [self[index] for index in indices]
        return self._windows(indices)

    def _windows(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        # A range refuses numbers past its end, and counts back from it.
        all_starts = range(0, len(self) * self.stride, self.stride)
        wanted = np.array([all_starts[index] for index in indices])[:, None]  # (B, 1)
        starts = np.minimum(wanted, self.last_start)  # (B, 1)
        places = starts + np.arange(self.block_size + 1)  # (B, T + 1)
        windows = self.tokens[places].astype(np.int64)  # (B, T + 1)

        repeated = np.arange(self.block_size) < wanted - starts  # (B, T)
        targets = np.where(repeated, -1, windows[:, 1:])  # (B, T)
        return torch.from_numpy(windows[:, :-1]), torch.from_numpy(targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self._windows([index])  # (1, T)
        return x[0], y[0]


def draw_examples(step: int, seed: int, size: int, batch_size: int, replacement=True) -> np.ndarray:
    """Draws a step's examples, (batch_size,); without replacement each once before any again."""
    if replacement:
        return np.random.default_rng((seed, step)).integers(size, size=batch_size)
    places = range(step * batch_size, (step + 1) * batch_size)
    return np.array([_permutation(seed, place // size, size)[place % size] for place in places])


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def count_examples(dataset) -> int:
    """Returns the length of a dataset; ValueError if it has none or is empty."""
    has_length = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
    if not has_length or len(dataset) == 0:
        raise ValueError(f"got a {type(dataset).__name__} that is empty or has no length, "
                         "expected one with examples (x, y) by number")
    return len(dataset)


def load_batches(dataset, index_lists: Iterable[list[int]], num_workers: int = 0,
                 pin_memory: bool = False, seed: int = 0) -> Iterator[tuple]:
    """Yields a batch (x, y) of tensors for each list of indices.

    A dataset may build batches itself: __getitems__(indices) -> (x, y). Its workers draw
    from `seed`, and torch's own generator stays as it is. ValueError for other batches.
    """
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(dataset, batch_sampler=index_lists, num_workers=num_workers,
                        collate_fn=_collate, pin_memory=pin_memory, generator=generator,
                        worker_init_fn=_ignore_signals)

    for batch in loader:
        match batch:
            case torch.Tensor(), torch.Tensor():
                yield batch
            case _:
                raise ValueError(f"got a batch of type {type(batch).__name__}, expected tensors "
                                 "(x, y), which __getitems__(indices) of a dataset may return")


def _collate(examples):
    # All but a list of examples is a batch that the dataset has built.
    return default_collate(examples) if isinstance(examples, list) else examples


def _ignore_signals(worker: int) -> None:
    # The trainer finishes its step after a signal, then it ends its workers.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
