"""
GPT-2's tokenizer: text to a list of numbers and back, by byte-pair encoding (BPE). A copy of this file works alone.

    from mingpt.bpe import get_encoder
    encoder = get_encoder()                     # downloads two small vocabulary files the first time
    encoder.decode(encoder.encode("Hello!!"))

    python mingpt/bpe.py                        # shows every step on an example

The steps, for " Hello!!":
1. A regular expression cuts the text into words, each with the space before it: " Hello", "!!". No token crosses a cut.
2. Each word becomes its UTF-8 bytes, written as one visible character per byte: "ĠHello" (see bytes_to_unicode).
3. Of all neighbouring symbols, the pair that was learned first is merged, then the next, until no known pair is left:
   Ġ H e l l o -> Ġ H e ll o -> ĠH e ll o -> ĠHe ll o -> ĠHell o -> ĠHello.
4. Each symbol that is left has a number in the vocabulary: 18435.
"Neural Machine Translation of Rare Words with Subword Units", Sennrich et al. 2016; on bytes: GPT-2 paper, section 2.2.
"""

import codecs
import hashlib
import heapq
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING: # its import takes about a second, and only BPETokenizer needs it
    import torch

def bytes_to_unicode() -> dict[int, str]:
    """A visible character for every byte: {33: '!', 65: 'A', 32: 'Ġ', 10: 'Ċ', ...}.

    A file that lists tokens line by line cannot hold raw bytes: a newline or one half of 'é' would break it. The 188
    bytes that Latin-1 prints (! to ~, ¡ to ¬, ® to ÿ) stand for themselves. The other 68 take, in order, the characters
    from number 256 on: byte 0 is 'Ā', and the space, the 33rd of them, is 'Ġ'.
    """
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}

# Step 1. The end of a contraction; or letters, digits or other signs, each with the space before them; or white space,
# whose last character is left to the word that follows. Upper case 'VE is not known as the end of a contraction.
WORD = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# No word goes from non-space to space, so a text can also be cut into pieces there, which are looked up as a whole:
# "(white space) + anything else" is a simpler pattern and nearly four times as fast. SPACE is Unicode's White_Space.
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
PIECE = re.compile(f"[{SPACE}]*[^{SPACE}]+|[{SPACE}]+")

class _Cache(dict):
    """The tokens of the pieces met so far: dict calls __missing__ for a new piece, so a known one costs one look-up."""

    def __init__(self, encode_word, max_characters: int = 1 << 20): # some 30 MB
        self.encode_word, self.max_characters, self.characters = encode_word, max_characters, 0

    def __missing__(self, piece: str) -> tuple[int, ...]:
        words = WORD.findall(piece)
        tokens = self.encode_word(piece) if len(words) == 1 else tuple(chain(*map(self.__getitem__, words)))
        self.characters += max(8, len(piece)) # a short one takes memory, too
        if self.characters <= self.max_characters:
            self[piece] = tokens
        else:
            self.clear() # the frequent pieces are soon back
            self.characters = 0
        return tokens

class Encoder:
    """Byte-pair encoding with a given vocabulary and list of merges.

    >>> toy = Encoder({'a': 0, 'b': 1, 'c': 2, 'ab': 3, 'abc': 4}, [('a', 'b'), ('ab', 'c')])
    >>> toy.encode('abcab'), toy.decode([4, 3])
    ([4, 3], 'abcab')
    """

    def __init__(self, encoder: dict[str, int], bpe_merges: list[tuple[str, str]]):
        """encoder: token -> number, tokens as bytes_to_unicode writes them; bpe_merges: pairs in the order learned."""
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {char: byte for byte, char in self.byte_encoder.items()}
        self.encoder = encoder
        self.decoder = {number: token for token, number in encoder.items()}
        self.bpe_ranks = {tuple(pair): rank for rank, pair in enumerate(bpe_merges)}
        self.special_tokens = {token: number for token, number in encoder.items() if token == "<|endoftext|>"}
        self.eot_token = encoder.get("<|endoftext|>") # the number of the token that stands between texts
        self.token_bytes = {number: bytes(self.byte_decoder[c] for c in token) for token, number in encoder.items()}
        self.cache = _Cache(self._encode_word)

    def encode(self, text: str, allowed_special: str | Iterable[str] = ()) -> list[int]:
        """Text to tokens. '<|endoftext|>' in it is text like any other, unless allowed_special names it.

        Half a surrogate pair, which UTF-8 cannot express, is read as U+FFFD. ValueError for an unknown special token.
        """
        special = {allowed_special} if isinstance(allowed_special, str) else set(allowed_special)
        if unknown := special - set(self.special_tokens):
            raise ValueError(f"got the special tokens {sorted(unknown)}, expected any of {sorted(self.special_tokens)}")
        if special:
            parts = re.split(f"({'|'.join(map(re.escape, special))})", text) # text, special, text, special, ..., text
            numbers = [[self.special_tokens[part]] if i % 2 else self.encode(part) for i, part in enumerate(parts)]
            return list(chain(*numbers))
        try:
            return list(chain.from_iterable(map(self.cache.__getitem__, PIECE.findall(text))))
        except UnicodeEncodeError:
            return self.encode(_join_surrogates(text))

    def _translate(self, word: str) -> str:
        """Step 2: ' é' -> 'ĠÃ©'. Latin-1 reads each byte as the character of the same number; translate replaces it."""
        return word.encode("utf-8").decode("latin-1").translate(self.byte_encoder)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Steps 2 to 4 for one word."""
        return tuple([self.encoder[symbol] for symbol in self._merge(self._translate(word))])

    def _merge(self, token: str) -> list[str]:
        """Step 3: 'ĠHello' -> ['ĠHello'].

        A heap hands out the pairs by rank, then from left to right. The merged symbol takes the place of its left part,
        so no list is ever shifted: n characters take n log n steps.
        """
        rank_of = self.bpe_ranks.get
        symbols = [*token, ""] # the empty one is the neighbour of the first and of the last; no pair with it has a rank
        left, right = list(range(-1, len(token))), list(range(1, len(token) + 1)) # the neighbours of each symbol
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
            for place in (h, i): # the pairs that the merged symbol now forms
                if (rank := rank_of((symbols[place], symbols[right[place]]))) is not None:
                    heapq.heappush(heap, (rank, place))
        return [symbol for symbol in symbols if symbol]

    def bpe(self, token: str) -> str:
        """The symbols of one word, already in visible characters, with spaces between: 'lowlevel' -> 'low level'."""
        return " ".join(self._merge(token))

    def encode_and_show_work(self, text: str) -> dict:
        """What encode does, step by step: the words in 'tokens', their steps in 'parts', the result in 'bpe_idx'."""
        parts = [{
            "token": word,
            "token_bytes": word.encode("utf-8"),
            "token_translated": self._translate(word),
            "token_merged": self._merge(self._translate(word)),
            "token_ix": list(self._encode_word(word)),
        } for word in WORD.findall(_join_surrogates(text))]
        return {"bpe_idx": self.encode(text), "tokens": [part["token"] for part in parts], "parts": parts}

    def decode(self, tokens) -> str:
        """A row of tokens (list, array, tensor) to text. Bytes that form no character become U+FFFD."""
        return b"".join(self._bytes_of(tokens)).decode("utf-8", errors="replace")

    def decode_stream(self, tokens) -> Iterator[str]:
        """Decodes tokens as they come (numbers, or tensors of one number as GPT.stream's), whole characters only."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens: # one that ends within a character adds nothing yet
            yield decoder.decode(self._bytes_of([token.item() if hasattr(token, "item") else token])[0])
        yield decoder.decode(b"", final=True)

    def _bytes_of(self, tokens) -> list[bytes]:
        numbers = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        try:
            return [self.token_bytes[number] for number in numbers]
        except (KeyError, TypeError) as error:
            got = error.args[0] if isinstance(error, KeyError) else tokens
            raise ValueError(f"got {got!r} to decode, expected a row of tokens from 0 to {max(self.decoder)}") from None

def _join_surrogates(text: str) -> str:
    """The same text, but two halves of a surrogate pair become one character and a single half becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

SOURCE = "https://openaipublic.blob.core.windows.net/gpt-2/models/124M/"

def _read(name: str, sha256: str) -> str:
    """A vocabulary file, from $MINGPT_CACHE or ~/.cache/mingpt; it is downloaded if it is missing or damaged there."""
    path = Path(os.environ.get("MINGPT_CACHE") or Path.home() / ".cache" / "mingpt") / name
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        import requests # here, as only the first call needs it
        remedy = f"Get {SOURCE}{name} in another way, and put it at {path}"
        try:
            response = requests.get(SOURCE + name, timeout=30) # seconds without an answer
            response.raise_for_status()
        except requests.RequestException as error:
            raise OSError(f"{path} is missing or damaged, and the download failed: {error}. {remedy}") from error
        content = response.content
        if (got := hashlib.sha256(content).hexdigest()) != sha256:
            raise ValueError(f"{SOURCE}{name} has the wrong contents: sha256 {got}, expected {sha256}. {remedy}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder: # others may download the same file now
            (Path(folder) / name).write_bytes(content)
            os.replace(Path(folder) / name, path) # so `path` is never half a file
    return content.decode("utf-8")

def get_encoder() -> Encoder:
    """GPT-2's own encoder, of 50,257 tokens. OSError or ValueError if its two files are neither here nor to be had."""
    vocabulary = _read("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
    merges = _read("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")
    return Encoder(json.loads(vocabulary), [(left, right) for left, right in map(str.split, merges.splitlines()[1:])])

class BPETokenizer:
    """The encoder with tensors around it: tokenizer(text) -> (1, T), tokenizer.decode(a row of it) -> text."""

    def __init__(self):
        self.encoder = get_encoder()

    def __call__(self, text: str, return_tensors: str = "pt") -> "torch.Tensor":
        import torch
        if return_tensors != "pt" or not isinstance(text, str):
            raise ValueError(f"got {text!r} and return_tensors={return_tensors!r}, expected one string and 'pt'")
        return torch.tensor([self.encoder.encode(text)], dtype=torch.long) # (1, T)

    def decode(self, idx: "torch.Tensor") -> str:
        return self.encoder.decode(idx)

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace") # type: ignore[union-attr] # '?' for what the terminal cannot show
    try:
        work = get_encoder().encode_and_show_work("Hello!! I'm Andrej Karpathy. It's 2022. w00t :D \U0001f917")
    except (OSError, ValueError) as error: # no vocabulary
        sys.exit(f"error: {error}")
    for word, part in zip(work["tokens"], work["parts"]):
        print(f"{word!r:12} {part['token_translated']:14} {' + '.join(part['token_merged']):22} {part['token_ix']}")
    print("all together:", work["bpe_idx"])
