"""
Turns text into tokens and back: GPT-2's byte-pair encoding (BPE). A copy of this file works alone.

    python -m mingpt.bpe                   # shows every step on an example
    python -m mingpt.bpe "my own text"     # or on yours; the first time downloads 1.5 MB

A GPT reads numbers. So a text is cut into tokens, and each token has a number. For " Hello!!":

1. The word pattern, a regular expression, cuts the text into words: " Hello" and "!!".
   A word keeps the space before it. No token reaches across two words.
2. A word becomes bytes. UTF-8 stores a character as one to four bytes, numbers from 0 to 255: 256
   symbols spell any text. Each is shown as a visible character, the space as Ġ: Ġ H e l l o.
3. Merges join neighbours. A merge is a pair of symbols that often stood side by side in the text
   that the vocabulary was learned from. Of the pairs in a word, the one learned first goes first:
   Ġ H e l l o -> Ġ H e ll o -> ĠH e ll o -> ĠHe ll o -> ĠHell o -> ĠHello.
4. The symbols left are the tokens. The vocabulary gives each its number: ĠHello is 18435.

Sources: Sennrich et al. 2016 (arXiv:1508.07909); with bytes, Radford et al. 2019 (the GPT-2 paper).
"""

import codecs
import hashlib
import heapq
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import regex

# The end of a contraction; or letters, digits or other signs, each with the
# space before them; or white space, its last character left to the next word.
WORD = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# White space and all up to the next one: one word or several. No word crosses
# its ends, and re finds pieces four times as fast. SPACE is regex's \s.
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
PIECE = re.compile(f"[{SPACE}]*[^{SPACE}]+|[{SPACE}]+")

# The cache holds at most this many pieces, and none that is longer.
CACHED_PIECES = 100_000
CACHED_CHARACTERS = 100

SOURCE = "https://openaipublic.blob.core.windows.net/gpt-2/models/124M/"


def bytes_to_unicode() -> dict[int, str]:
    """Gives every byte a visible character: {33: "!", 65: "A", 32: "Ġ", 10: "Ċ", ...}.

    The 188 bytes that Latin-1 prints stand for themselves. The other 68 take the
    characters from number 256 on.
    """
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible}
    return characters | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


class Encoder:
    """Encodes text by a vocabulary and a list of merges.

    >>> toy = Encoder({"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, [("a", "b"), ("ab", "c")])
    >>> toy.encode("abcab"), toy.decode([4, 3])
    ([4, 3], 'abcab')
    """

    def __init__(self, encoder: dict, bpe_merges: Iterable, special_tokens: dict | None = None):
        """Takes {token: number}, pairs of symbols in the order learned, and {added token: number}.

        bytes_to_unicode spells a token; an added token is plain text, such as "<|user|>".
        """
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {character: byte for byte, character in self.byte_encoder.items()}
        self.encoder = encoder
        self.bpe_ranks = {(left, right): rank for rank, (left, right) in enumerate(bpe_merges)}

        # A special token is plain text that no merge makes.
        self.special_tokens = {}
        self.token_bytes = {}
        for token, number in encoder.items():
            if token == "<|endoftext|>" or not self.byte_decoder.keys() >= set(token):
                self.special_tokens[token] = number
            else:
                self.token_bytes[number] = bytes([self.byte_decoder[c] for c in token])
        if special_tokens is not None:
            self.special_tokens.update(special_tokens)
        for token, number in self.special_tokens.items():
            # A number of the vocabulary keeps its meaning.
            self.token_bytes.setdefault(number, token.encode("utf-8"))
        self.decoder = {n: t for t, n in chain(self.special_tokens.items(), encoder.items())}
        # <|endoftext|> stands between two texts. None: the vocabulary lacks it.
        self.eot_token = self.special_tokens.get("<|endoftext|>")

        # Words that are known to end as one token when they are merged.
        self.whole_words: dict = {}
        self.cache = TokenCache(self._encode_word)

    def encode(self, text: str, allowed_special: str | Iterable[str] = ()) -> list[int]:
        """Turns text into tokens. A special token in it is text, unless allowed_special names it.

        ValueError for an unknown special token, and for text that the vocabulary cannot spell.
        """
        if isinstance(allowed_special, str):
            allowed_special = [allowed_special]

        # Where one special token begins with another, the longer one counts.
        special = sorted(set(allowed_special), key=len, reverse=True)
        if not self.special_tokens.keys() >= set(special):
            raise ValueError(f"got {special}, expected special tokens: {list(self.special_tokens)}")
        parts = [text]
        if special:
            # The group keeps the cuts: text, special token, text, ..., text.
            parts = re.split(f"({'|'.join(map(re.escape, special))})", text)
        tokens: list[int] = []
        for part in parts:
            if part in special:
                tokens.append(self.special_tokens[part])
            else:
                tokens.extend(chain.from_iterable(map(self.cache.__getitem__, PIECE.findall(part))))
        return tokens

    def _encode_word(self, word: str) -> tuple[int, ...]:
        spelled = self._spell(word)
        if getattr(self.bpe, "__func__", None) is not Encoder.bpe:
            # Somebody merges in another way, such as with dropout.
            symbols = self.bpe(spelled).split(" ")
        elif spelled in self.whole_words:
            return (self.whole_words[spelled],)
        else:
            symbols = self._merge(spelled)

        try:
            return tuple([self.encoder[symbol] for symbol in symbols])
        except KeyError as error:
            raise ValueError(f"got {word!r}, but the vocabulary has no token {error}") from None

    def _spell(self, word: str) -> str:
        """Takes step 2: " é" -> "ĠÃ©"."""
        # UTF-8 cannot store half a surrogate pair: it becomes U+FFFD.
        word = word.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # Latin-1 reads a byte as the character of its number.
        return word.encode("utf-8").decode("latin-1").translate(self.byte_encoder)

    def bpe(self, token: str, on_merge: Callable = lambda rank, symbols: None) -> str:
        """Merges the symbols of a spelled word, the plain way: "lowlevel" -> "low level"."""
        symbols = list(token)
        while True:
            pairs = list(zip(symbols, symbols[1:]))
            known = [pair for pair in pairs if pair in self.bpe_ranks]
            if not known:
                return " ".join(symbols)
            first = min(known, key=self.bpe_ranks.__getitem__)
            i = pairs.index(first)
            symbols[i : i + 2] = ["".join(first)]
            on_merge(self.bpe_ranks[first], symbols)

    def _merge(self, token: str) -> list[str]:
        """Merges like bpe, but in n log n steps for n symbols.

        A heap hands out the pairs by rank, then from left to right. A merged symbol
        stays at its left part's place; left and right lead to the neighbours.
        """
        rank_of = self.bpe_ranks.get
        # A sentinel at both ends (-1 is the last place): no merge has None.
        symbols: list = [*token, None]
        left = list(range(-1, len(token)))
        right = list(range(1, len(token) + 1))
        ranks = map(rank_of, zip(token, token[1:]))
        heap = [(rank, place) for place, rank in enumerate(ranks) if rank is not None]
        heapq.heapify(heap)

        while heap:
            rank, i = heapq.heappop(heap)
            j = right[i]
            # Another merge may have taken a part of this pair.
            if rank_of((symbols[i], symbols[j])) != rank:
                continue
            symbols[i] += symbols[j]
            symbols[j] = None
            right[i] = right[j]
            left[right[j]] = i
            # The merged symbol forms two new pairs.
            for place in (left[i], i):
                new_rank = rank_of((symbols[place], symbols[right[place]]))
                if new_rank is not None:
                    heapq.heappush(heap, (new_rank, place))

        return [symbol for symbol in symbols if symbol is not None]

    def encode_and_show_work(self, text: str) -> dict[str, Any]:
        """Encodes, and keeps the words in "tokens", their steps in "parts", all in "bpe_idx"."""
        words = WORD.findall(text)
        parts = []
        for word in words:
            tokens = self._encode_word(word)
            parts.append({
                "token": word,
                "token_bytes": self._bytes_of(tokens),
                "token_translated": self._spell(word),
                "token_merged": [self.decoder[token] for token in tokens],
                "token_ix": list(tokens),
            })

        return {"bpe_idx": self.encode(text), "tokens": words, "parts": parts}

    def decode(self, bpe_idx: Iterable) -> str:
        """Turns a row of tokens (list, array, tensor) into text; broken characters are U+FFFD."""
        numbers = bpe_idx.tolist() if hasattr(bpe_idx, "tolist") else bpe_idx
        return self._bytes_of(numbers).decode("utf-8", errors="replace")

    def decode_stream(self, tokens: Iterable) -> Iterator[str]:
        """Yields the text of tokens that come one by one (GPT.stream): whole characters only."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(self._bytes_of([int(token)]))
        yield decoder.decode(b"", final=True)

    def _bytes_of(self, numbers: Iterable[int]) -> bytes:
        try:
            return b"".join([self.token_bytes[number] for number in numbers])
        except (KeyError, TypeError) as error:
            expected = f"a row of tokens from 0 to {max(self.decoder)}"
            raise ValueError(f"got {error} to decode, expected {expected}") from None


class TokenCache(dict):
    """Keeps the tokens of the pieces met so far; a dict calls __missing__ for a new key."""

    def __init__(self, encode_word: Callable[[str], tuple[int, ...]]):
        self.encode_word = encode_word

    def __missing__(self, piece: str) -> tuple[int, ...]:
        words = WORD.findall(piece)
        if words == [piece]:
            tokens = self.encode_word(piece)
        else:
            tokens = tuple(chain.from_iterable(map(self.__getitem__, words)))

        if len(self) >= CACHED_PIECES:
            # The frequent pieces are soon back.
            self.clear()
        if len(piece) <= CACHED_CHARACTERS:
            self[piece] = tokens
        return tokens


def _read(name: str, sha256: str) -> str:
    """Reads a file of GPT-2's vocabulary from $MINGPT_CACHE or ~/.cache/mingpt.

    Downloads it if it is missing or damaged there; OSError if that fails.
    """
    path = Path(os.environ.get("MINGPT_CACHE") or "~/.cache/mingpt").expanduser() / name
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() == sha256:
        return content.decode("utf-8")

    import requests

    try:
        response = requests.get(SOURCE + name, timeout=30)
        response.raise_for_status()
        if hashlib.sha256(response.content).hexdigest() != sha256:
            raise OSError(f"its sha256 is not {sha256}")
    except OSError as error:
        raise OSError(f"{path} is missing or damaged, and the download failed: {error}. "
                      f"Get {SOURCE}{name} in another way, and put it at {path}") from error

    path.parent.mkdir(parents=True, exist_ok=True)
    # It is written beside and renamed, so path is never half a file.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        Path(folder, name).write_bytes(response.content)
        os.replace(Path(folder, name), path)
    return response.content.decode("utf-8")


def get_encoder() -> Encoder:
    """Makes GPT-2's own encoder, of 50,257 tokens; OSError if its files cannot be had."""
    vocabulary = json.loads(
        _read("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
    )
    merges = _read("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")
    encoder = Encoder(vocabulary, map(str.split, merges.splitlines()[1:]))
    # GPT-2's merges reach each of its tokens, so a word that is a token needs
    # no merging. Not every vocabulary is like that.
    encoder.whole_words = dict(vocabulary)
    return encoder


class BPETokenizer:
    """Puts tensors around the encoder: tokenizer(text) -> (1, T), decode(a row of it) -> text."""

    def __init__(self):
        self.encoder = get_encoder()

    def __call__(self, text: str, return_tensors: str = "pt") -> Any:
        import torch

        if return_tensors != "pt" or not isinstance(text, str):
            raise ValueError(f"got {text!r} and {return_tensors!r}, expected a string and 'pt'")
        return torch.tensor([self.encoder.encode(text)], dtype=torch.long)  # (1, T)

    def decode(self, idx: Iterable) -> str:
        return self.encoder.decode(idx)


def show(text: str) -> None:
    """Prints the words of a text, the merges of each by rank, and its tokens."""
    encoder = get_encoder()
    row = "{:14} {:>6}  {}".format
    print("The merge with the lowest rank goes first.\n")
    print(row("word", "rank", "symbols"))
    for part in encoder.encode_and_show_work(text)["parts"]:
        print(row(repr(part["token"]), "", " ".join(part["token_translated"])))
        encoder.bpe(part["token_translated"], lambda rank, now: print(row("", rank, " ".join(now))))
        print(row("", "tokens", " ".join(map(str, part["token_ix"]))))


if __name__ == "__main__":
    # A terminal may lack a character; it shows "?" instead.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        show(" ".join(sys.argv[1:]) or "Hello!! I'm Andrej Karpathy. It's 2022. w00t :D \U0001f917")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
