"""
A row of tokens: encode_file makes one from a text file, TokenDataset cuts it into examples to train on.

    encode_file(get_encoder(), "corpus.txt", "corpus.bin")      # in a script: under `if __name__ == "__main__":`
    tokens = np.memmap("corpus.bin", dtype=np.uint16, mode="r")
    train_dataset = TokenDataset(tokens[:-100_000], block_size=128)
    val_dataset = TokenDataset(tokens[-100_000:], block_size=128, stride=128)
"""

import os
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset

from mingpt.utils import progress, replacing

class TokenDataset(Dataset):
    """Windows of a row of tokens (array, memmap, tensor), `stride` apart: x (T,) and y (T,), which is one token later.

    With stride = block_size, as for validation, every token but the first is a target once: repeated targets are -1.
    """

    def __init__(self, tokens, block_size: int, stride: int = 1):
        self.tokens, self.block_size, self.stride = np.asarray(tokens), block_size, stride
        self.last = len(self.tokens) - block_size - 1 # the last window begins here, as it ends with the row
        if self.last < 0 or not 1 <= stride <= block_size:
            raise ValueError(f"got a row of {len(self.tokens)} tokens for a block_size of {block_size}; take a longer "
                             f"text or a smaller block_size, and a stride from 1 to block_size (got {stride})")

    def __len__(self) -> int:
        return len(range(0, self.last, self.stride)) + 1

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: x (B, T) and y (B, T)."""
        starts = np.asarray(indices)[:, None] * self.stride # (B, 1)
        repeated = np.maximum(starts - self.last, 0) # the last window begins so much earlier
        windows = self.tokens[starts - repeated + np.arange(self.block_size + 1)].astype(np.int64) # (B, T + 1)
        targets = np.where(np.arange(self.block_size) < repeated, -1, windows[:, 1:]) # (B, T)
        return torch.from_numpy(windows[:, :-1]), torch.from_numpy(targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.__getitems__([range(len(self))[index]]) # range raises IndexError past the end
        return x[0], y[0]

BLOCK = 1 << 22 # bytes of text that are encoded at a time, or more if there is no place to cut
CUT = re.compile(rb"[!-~](?=[ \n])") # before white space, where no word goes on: see bpe.PIECE

def encode_file(encoder, path, out, allowed_special=(), workers: int | None = None) -> int:
    """Encodes a UTF-8 file of any size into a flat file of uint16 and returns the number of tokens.

    They are those of encoder.encode(text, allowed_special). `workers` processes share the work, by default one for each
    core; 1 is this process. Raises ValueError for a text that is not UTF-8, and leaves an older `out` as it is.
    """
    if not os.path.isfile(path) or os.path.isdir(out) or os.path.realpath(path) == os.path.realpath(out):
        raise ValueError(f"got {path} to encode into {out}, expected a text file and the name of another file")
    if max(encoder.decoder) >= 1 << 16:
        raise ValueError(f"this vocabulary goes up to {max(encoder.decoder)}, which uint16 cannot hold")
    special = [allowed_special] if isinstance(allowed_special, str) else list(allowed_special)
    encoder.encode("", special) # refuses an unknown one now
    if any(CUT.search(token.encode("utf-8")) for token in special):
        raise ValueError(f"got the special tokens {special}, expected them without white space, where the file is cut")
    cuts = list(_find_cuts(path))
    workers = max(1, min(workers or os.cpu_count() or 1, len(cuts) - 1, 61)) # Windows allows no more
    encode = partial(_encode_part, encoder, path, special)
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(encode,)) as pool, \
            replacing(out) as new, open(new, "wb") as file:
        parts = pool.map(_encode_in_worker, cuts, cuts[1:]) if workers > 1 else map(encode, cuts, cuts[1:])
        file.writelines(progress(parts, f"encoding {path}", len(cuts) - 1))
    return os.path.getsize(out) // 2

def _find_cuts(path):
    """Yields where each part of a file begins, and where the last one ends."""
    place, size = 0, os.path.getsize(path)
    yield place
    while place < size:
        cut = CUT.search(np.memmap(path, np.uint8, "r"), place + BLOCK)
        place = cut.end() if cut else size
        yield place

def _encode_part(encoder, path, special: list[str], start: int, end: int) -> bytes:
    data = np.fromfile(path, np.uint8, end - start, offset=start).tobytes()
    try:
        return np.array(encoder.encode(data.decode("utf-8"), special), dtype=np.uint16).tobytes()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {data[error.start]:#04x} at position {start + error.start}; "
                         "convert the file first") from None

worker: dict = {} # in a process of its own: how to encode, sent once and not with every part

def _start_worker(encode) -> None:
    worker["encode"] = encode

def _encode_in_worker(start: int, end: int) -> bytes:
    return worker["encode"](start, end)
