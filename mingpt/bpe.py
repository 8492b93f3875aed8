"""
GPT-2's tokenizer: text to a list of numbers and back, by byte-pair encoding (BPE).

    from mingpt.bpe import get_encoder
    encoder = get_encoder()                     # fetches two small vocabulary files the first time
    encoder.decode(encoder.encode("Hello!!"))

    python mingpt/bpe.py                        # shows every step on an example

How it goes, for " Hello!!":
1. A regular expression cuts the text into words, spaces in front of them: " Hello", "!!". No token crosses such a cut.
2. Each word becomes its UTF-8 bytes, written as one visible character per byte: "ĠHello" (see bytes_to_unicode).
3. Of all neighbours in a word, the pair that training found most frequent is merged, then the next, until none is left to
   merge: Ġ H e l l o -> Ġ H e ll o -> ĠH e ll o -> ĠHe ll o -> ĠHell o -> ĠHello.
4. Each symbol that stands in the end has a number in the vocabulary: 18435.
"Neural Machine Translation of Rare Words with Subword Units", Sennrich et al. 2016; on bytes: the GPT-2 paper, section 2.2.
"""

import codecs
import heapq
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import regex
import torch

from mingpt.utils import Progress, cache_dir, download, read_text, replacing

# -----------------------------------------------------------------------------

def bytes_to_unicode() -> dict[int, str]:
    """A visible character for every byte: {33: '!', 65: 'A', 32: 'Ġ', 10: 'Ċ', ...}.

    A vocabulary file that lists tokens line by line can't hold raw bytes: a space, a newline or a lone half of 'é' would
    break it. So each byte has a stand-in. The 188 bytes that Latin-1 prints (! to ~, ¡ to ¬, ® to ÿ) stand for themselves;
    the other 68, in order, take the characters from number 256 on: byte 0 is 'Ā', the 33rd of them, the space, is 'Ġ'.
    """
    table, spare = {}, 256
    for byte in range(256):
        if chr(byte).isprintable() and byte not in (32, 160, 173): # the plain, no-break space and soft hyphen are invisible
            table[byte] = chr(byte)
        else:
            table[byte] = chr(spare)
            spare += 1
    return table

# Step 1. A contraction's end, letters, digits or other signs, each with the space before it; or white space, whose last
# character is left to the word that follows. (In " I've" the cut is " I", "'ve"; upper case 'VE is not known as one.)
WORD = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# A word never goes on past the end of a run of other-than-space, so pieces that end there can be looked up as a whole: "(white
# space) + anything else" is a simpler pattern than WORD and nearly four times as fast. The list is Unicode's White_Space.
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
PIECE = re.compile(f"[{SPACE}]*[^{SPACE}]+|[{SPACE}]+")

class _Cache(dict):
    """The tokens of the pieces met so far. dict calls __missing__ for a key that it lacks, so a hit costs one look-up."""

    def __init__(self, encode_word, max_entries: int, max_length: int):
        self.encode_word, self.max_entries, self.max_length = encode_word, max_entries, max_length

    def __missing__(self, piece: str) -> tuple[int, ...]:
        words = WORD.findall(piece)
        tokens = self.encode_word(piece) if len(words) == 1 else tuple(chain.from_iterable(map(self.__getitem__, words)))
        if len(piece) <= self.max_length:
            if len(self) >= self.max_entries:
                self.clear() # the frequent pieces are soon back
            self[piece] = tokens
        return tokens

# -----------------------------------------------------------------------------

class Encoder:
    """Byte-pair encoding with a given vocabulary and list of merges.

    >>> toy = Encoder({'a': 0, 'b': 1, 'c': 2, 'ab': 3, 'abc': 4}, [('a', 'b'), ('ab', 'c')])
    >>> toy.encode('abcab'), toy.decode([4, 3])
    ([4, 3], 'abcab')
    """

    def __init__(self, encoder: dict[str, int], bpe_merges: list[tuple[str, str]]):
        """encoder: the number of each token, written with bytes_to_unicode; bpe_merges: the pairs, most frequent first."""
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {char: byte for byte, char in self.byte_encoder.items()}
        self.encoder = encoder
        self.decoder = {number: token for token, number in encoder.items()}
        self.bpe_ranks = {tuple(pair): rank for rank, pair in enumerate(bpe_merges)}
        self.special_tokens = {token: number for token, number in encoder.items() if token == "<|endoftext|>"}
        self.token_bytes = {number: bytes(self.byte_decoder[char] for char in token) for token, number in encoder.items()}
        self.cache = _Cache(self._encode_word, max_entries=1 << 17, max_length=64) # some 30 MB when full

    @property
    def eot_token(self) -> int:
        """The number of <|endoftext|>, which stands between texts."""
        return self.encoder["<|endoftext|>"]

    def encode(self, text: str, allowed_special: Iterable[str] = ()) -> list[int]:
        """Text to tokens. '<|endoftext|>' in it is text like any other, unless allowed_special={'<|endoftext|>'} says so.

        Half a surrogate pair, which UTF-8 cannot express, is read as U+FFFD. Raises ValueError for an unknown special token.
        """
        if allowed_special:
            return self._encode_special(text, allowed_special)
        try:
            return list(chain.from_iterable(map(self.cache.__getitem__, PIECE.findall(text))))
        except UnicodeEncodeError:
            return self.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def _encode_special(self, text: str, allowed: Iterable[str]) -> list[int]:
        allowed = set(allowed)
        if unknown := allowed - set(self.special_tokens):
            raise ValueError(f"got the special tokens {sorted(unknown)}, but there are only {sorted(self.special_tokens)}")
        parts = re.split(f"({'|'.join(map(re.escape, allowed))})", text) # text, special, text, special, ..., text
        tokens = self.encode(parts[0])
        for special, part in zip(parts[1::2], parts[2::2]):
            tokens += [self.special_tokens[special], *self.encode(part)]
        return tokens

    def _translate(self, word: str) -> str:
        """Step 2: ' é' -> 'ĠÃ©'. Latin-1 reads each byte as the character of the same number, for translate to replace."""
        return word.encode("utf-8").decode("latin-1").translate(self.byte_encoder)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Steps 2 to 4 for one word."""
        return tuple([self.encoder[symbol] for symbol in self._merge(self._translate(word))])

    def _merge(self, token: str) -> list[str]:
        """Step 3: 'ĠHello' -> ['ĠHello'].

        A heap hands out the pairs by rank, then from left to right. Merging the symbol at i with its right neighbour leaves
        i as the place of both, so that no list is ever shifted: n characters take n log n steps.
        """
        rank_of = self.bpe_ranks.get
        symbols = [*token, ""] # the last, at -1 too, stands for both ends; no pair with it has a rank
        left, right = list(range(-1, len(token))), list(range(1, len(token) + 1)) # neighbours of the places still in use
        heap = [(rank, i) for i, pair in enumerate(zip(token, token[1:])) if (rank := rank_of(pair)) is not None]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = right[i]
            if rank_of((symbols[i], symbols[j])) != rank:
                continue # another merge has taken a part of this pair
            symbols[i] += symbols[j]
            symbols[j] = ""
            h, right[i] = left[i], right[j]
            left[right[j]] = i
            if (rank := rank_of((symbols[h], symbols[i]))) is not None:
                heapq.heappush(heap, (rank, h))
            if (rank := rank_of((symbols[i], symbols[right[i]]))) is not None:
                heapq.heappush(heap, (rank, i))
        return [symbol for symbol in symbols if symbol]

    def bpe(self, token: str) -> str:
        """The symbols of one word, already in visible characters, with spaces between: 'lowlevel' -> 'low level'."""
        return " ".join(self._merge(token))

    def encode_and_show_work(self, text: str) -> dict:
        """What encode does, with every intermediate: the words in 'tokens', their steps in 'parts', the result in 'bpe_idx'."""
        parts = []
        for word in WORD.findall(text):
            translated = self._translate(word)
            parts.append({
                "token": word,
                "token_bytes": word.encode("utf-8"),
                "token_translated": translated,
                "token_merged": self._merge(translated),
                "token_ix": list(self._encode_word(word)),
            })
        return {
            "bpe_idx": [number for part in parts for number in part["token_ix"]],
            "tokens": [part["token"] for part in parts],
            "parts": parts,
        }

    def decode(self, tokens) -> str:
        """Tokens (a list, an array or a tensor of one dimension) to text; bytes that form no character become U+FFFD."""
        return b"".join(self._bytes_of(tokens)).decode("utf-8", errors="replace")

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Decodes tokens as they come, whole characters only: one that is split over tokens appears with its last byte."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(self._bytes_of([token])[0])
        yield decoder.decode(b"", final=True)

    def _bytes_of(self, tokens) -> list[bytes]:
        numbers = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        try:
            return list(map(self.token_bytes.__getitem__, numbers))
        except (KeyError, TypeError):
            unknown = next((n for n in numbers if not isinstance(n, int) or n not in self.token_bytes), numbers)
            raise ValueError(f"got {unknown!r} to decode, expected tokens from 0 to {max(self.token_bytes)} in one row") from None

    def encode_file(self, path: str | Path, out: str | Path, allowed_special: Iterable[str] = (), workers: int | None = None) -> int:
        """Encodes a UTF-8 file of any size into a flat file of uint16 and returns the number of tokens.

        np.memmap(out, dtype=np.uint16, mode='r') then opens it without reading it. Works in `workers` processes (one a core by
        default); a script that is not on Linux must call it under `if __name__ == '__main__':`, as Python's processes want it.
        """
        if max(self.decoder) >= 1 << 16:
            raise ValueError(f"this vocabulary goes up to {max(self.decoder)}, which uint16 cannot hold")
        size, workers = os.path.getsize(path), workers or os.cpu_count()
        progress, done, count = Progress(f"encoding {path}", size), 0, 0
        tasks = ((block, allowed_special) for block in _whole_pieces(read_text(path)))
        results = _in_processes(self, tasks, workers) if workers > 1 and size > BLOCK else (self._encode_block(*task) for task in tasks)
        with replacing(out) as part, open(part, "wb") as file:
            for tokens, length in results:
                file.write(tokens)
                count += len(tokens) // 2
                done += length
                progress.update(done)
        return count

    def _encode_block(self, block: str, allowed_special: Iterable[str]) -> tuple[bytes, int]:
        """The tokens of a block as uint16, and how many bytes of text they stand for."""
        return np.array(self.encode(block, allowed_special), dtype=np.uint16).tobytes(), len(block.encode())

BLOCK = 1 << 22 # bytes of a file that are encoded at a time
END_OF_PIECE = re.compile(f".*[^{SPACE}](?=[{SPACE}])", re.DOTALL) # matches up to the last one

def _whole_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The same text, cut only where pieces end, so that what is encoded cut by cut is what would be encoded as a whole."""
    rest = ""
    for text in texts:
        rest += text
        if match := END_OF_PIECE.match(rest):
            yield match[0]
            rest = rest[match.end():]
    yield rest

def _in_processes(encoder: Encoder, tasks: Iterable[tuple], workers: int) -> Iterator[tuple[bytes, int]]:
    """encoder._encode_block of every task, in order, with no more tasks under way than keep the processes busy."""
    with ProcessPoolExecutor(workers, initializer=_receive_encoder, initargs=(encoder,)) as pool:
        under_way = deque()
        for task in tasks:
            under_way.append(pool.submit(_encode_task, task))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

def _receive_encoder(encoder: Encoder) -> None:
    global worker_encoder # sent once to a process, not with every task
    worker_encoder = encoder

def _encode_task(task: tuple) -> tuple[bytes, int]:
    return worker_encoder._encode_block(*task)

# -----------------------------------------------------------------------------

SOURCE = "https://openaipublic.blob.core.windows.net/gpt-2/models/124M/"
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

def get_encoder() -> Encoder:
    """GPT-2's own encoder, of 50,257 tokens; its two files come from OpenAI once and stay in the cache folder."""
    vocabulary = download(SOURCE + "encoder.json", cache_dir() / "encoder.json", ENCODER_SHA256).read_text(encoding="utf-8")
    merges = download(SOURCE + "vocab.bpe", cache_dir() / "vocab.bpe", MERGES_SHA256).read_text(encoding="utf-8")
    _version, *lines = merges.splitlines()
    return Encoder(json.loads(vocabulary), [tuple(line.split()) for line in lines])

class BPETokenizer:
    """The encoder with tensors around it: tokenizer(text) -> (1, T), tokenizer.decode(a row of it) -> text."""

    def __init__(self):
        self.encoder = get_encoder()

    def __call__(self, text: str, return_tensors: str = "pt") -> torch.LongTensor:
        if return_tensors != "pt" or not isinstance(text, str):
            raise ValueError(f"got {type(text).__name__} and return_tensors={return_tensors!r}, expected one string and 'pt'")
        return torch.tensor([self.encoder.encode(text)], dtype=torch.long) # (1, T)

    def decode(self, idx: torch.Tensor) -> str:
        if idx.dim() != 1:
            raise ValueError(f"got tokens of shape {tuple(idx.shape)}, expected one row (T,); decode the rows one by one")
        return self.encoder.decode(idx)

if __name__ == "__main__":
    work = get_encoder().encode_and_show_work("Hello!! I'm Andrej Karpathy. It's 2022. w00t :D \U0001f917")
    for part in work["parts"]:
        print(f"{part['token']!r:12} {part['token_translated']:14} {' + '.join(part['token_merged']):22} {part['token_ix']}")
    print("all together:", work["bpe_idx"])
