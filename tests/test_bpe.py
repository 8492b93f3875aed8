"""The tokenizer against tiktoken and transformers' tokenizer."""

import os
import pickle
import random
import string
import unicodedata
import unittest
from unittest import mock

import numpy as np
import tiktoken
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from common import Folder, Server, get_encoder, run_python, vocabulary_folder
from mingpt import bpe
from mingpt.bpe import BPETokenizer, bytes_to_unicode
from mingpt.utils import read_text

TEXTS = [
    "", " ", "  ", "\n", " \n ", "a", "Hello!!", "Hello world", " leading", "trailing ", "in  the   middle    of",
    "I'm, you're, he'll, we've, it's, I'd, can't; I'M YOU'RE", "''s 'sfoo x's' 'll", "1234 56,789.01 3½ ²³ Ⅷ ٣٤", "tab\tand\r\nlines\r\n\r\n",
    "Größe naïve façade Ærøskøbing Dvořák", "Привет, мир! Як справи?", "你好，世界。天地玄黃", "こんにちは カタカナ", "안녕하세요 세계", "مرحبا بالعالم", "שלום עולם",
    "नमस्ते दुनिया", "สวัสดีชาวโลก", "Γειά σου Κόσμε", "እንኳን", "🤗 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️", "e\u0301 \u0301 a\u200bb \ufeff\u00ad",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # no\n\n\n\tpass", "https://example.org/a?b=c&d=%20#e", "<|endoftext|> <|endof", "\x00\x01\x1c\x1d\x1e\x1f\x7f\x85\xa0 x",
    "a\u2003b\u3000c\u1680 d\u2028\u2029e", "...!!! ??? --- ***", "antidisestablishmentarianism", "\x1c!\x1c", "!\x85!",
]

def assigned(char: str) -> bool:
    """Whether a character has been in Unicode for long: what a new version makes a letter, not every library knows as one."""
    return unicodedata.category(char) not in ("Cs", "Cn")

class Oracle(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.encoder = get_encoder()
        folder = vocabulary_folder()
        ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
        cls.tiktoken = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})

    def check(self, text: str):
        tokens = self.encoder.encode(text)
        self.assertEqual(tokens, self.tiktoken.encode_ordinary(text), repr(text))
        self.assertEqual(self.encoder.decode(tokens), text)


class Encode(Oracle):
    def test_texts(self):
        for text in TEXTS:
            with self.subTest(text):
                self.check(text)
                shown = self.encoder.encode_and_show_work(text)
                self.assertEqual(shown["bpe_idx"], self.encoder.encode(text))
                self.assertEqual("".join(shown["tokens"]), text)
        self.check("".join(TEXTS))

    def test_every_character_of_the_basic_plane_between_others(self):
        for start in range(0, 0x10000, 0x400):
            chars = [chr(code) for code in range(start, start + 0x400) if assigned(chr(code))]
            self.check("".join(f"a{char} {char}{char}1" for char in chars))

    def test_random_strings(self):
        rng = random.Random(1)
        alphabets = [string.ascii_letters + " '", string.printable, " \t\n\r\x0b\x0c\x85\xa0\u2003ab1!", "aAé语🤗ж١½'’ \n\u200d\u0301",
                     "".join(filter(assigned, map(chr, range(0, 0x110000, 7))))]
        strings = ["".join(rng.choices(rng.choice(alphabets), k=rng.randint(0, 24))) for _ in range(100_000)]
        expected = self.tiktoken.encode_ordinary_batch(strings)
        for text, tokens in zip(strings, expected):
            if self.encoder.encode(text) != tokens or self.encoder.decode(tokens) != text:
                self.check(text)

    @settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(st.text(st.characters(exclude_categories=["Cs", "Cn"])))
    def test_all_of_unicode(self, text):
        self.check(text)

    @settings(max_examples=500, deadline=None, derandomize=True, database=None)
    @given(st.text())
    def test_round_trip_of_unassigned_characters_too(self, text):
        self.assertEqual(self.encoder.decode(self.encoder.encode(text)), text)

    def test_long_words(self):
        rng = random.Random(2)
        for text in ("a" * 20_000, " " * 20_000 + "x", "ab" * 10_000, "🤗" * 5_000, "".join(rng.choices(string.ascii_lowercase, k=20_000))):
            self.check(text)

    def test_merge_equals_the_plain_procedure(self):
        def plain(token):
            symbols, ranks = list(token), self.encoder.bpe_ranks
            while pairs := [pair for pair in zip(symbols, symbols[1:]) if pair in ranks]:
                best, merged = min(pairs, key=ranks.get), []
                while symbols:
                    width = 2 if tuple(symbols[:2]) == best else 1
                    merged.append("".join(symbols[:width]))
                    symbols = symbols[width:]
                symbols = merged
            return " ".join(symbols)
        rng = random.Random(3)
        for _ in range(2000):
            token = "".join(rng.choices("Ġaeiostnrlh" if rng.random() < 0.7 else list(self.encoder.byte_decoder), k=rng.randint(0, 30)))
            self.assertEqual(self.encoder.bpe(token), plain(token))
        self.assertEqual(self.encoder.bpe("lowlevel"), "low level") # as its docstring says

    def test_transformers_agrees(self):
        from transformers import GPT2Tokenizer
        folder = vocabulary_folder()
        theirs = GPT2Tokenizer(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))
        for text in TEXTS:
            if "<|endoftext|>" not in text: # which that one always takes as special
                self.assertEqual(self.encoder.encode(text), theirs.encode(text), repr(text))

    def test_lone_surrogates_are_read_as_tiktoken_reads_them(self):
        for text in ("\ud800", "a\udfff b", "\ud83e\udd17", "x\udc00\ud800y"):
            self.assertEqual(self.encoder.encode(text), self.tiktoken.encode_ordinary(text))

    def test_cache_is_bounded_and_changes_nothing(self):
        encoder = get_encoder()
        encoder.cache.max_entries = 10
        text = " ".join(TEXTS) * 2
        self.assertEqual(encoder.encode(text), self.tiktoken.encode_ordinary(text))
        self.assertLessEqual(len(encoder.cache), 10)
        encoder.encode("b" * 1000)
        self.assertNotIn("b" * 1000, encoder.cache)

    def test_pickle(self):
        self.assertEqual(pickle.loads(pickle.dumps(self.encoder)).encode("Hello world"), self.encoder.encode("Hello world"))


class Special(Oracle):
    def test_endoftext_is_text_unless_allowed(self):
        text = "one<|endoftext|> two<|endoftext|><|endoftext|>"
        self.check(text)
        tokens = self.encoder.encode(text, allowed_special={"<|endoftext|>"})
        self.assertEqual(tokens, self.tiktoken.encode(text, allowed_special={"<|endoftext|>"}))
        self.assertEqual(tokens.count(self.encoder.eot_token), 3)
        self.assertEqual(self.encoder.eot_token, 50256)
        self.assertEqual(self.encoder.decode(tokens), text)
        with self.assertRaisesRegex(ValueError, "<\\|pad\\|>"):
            self.encoder.encode(text, allowed_special={"<|pad|>"})


class Decode(Oracle):
    def test_every_token_alone(self):
        for token in range(50257):
            self.assertEqual(self.encoder.token_bytes[token], self.tiktoken.decode_bytes([token]))
            self.assertEqual(self.encoder.decode([token]), self.tiktoken.decode([token]))
            text = self.encoder.decode([token])
            if "\ufffd" not in text:
                self.check(text)

    def test_every_byte_alone_and_random_bytes(self):
        rng = random.Random(4)
        single = {data[0]: token for token, data in self.encoder.token_bytes.items() if len(data) == 1}
        self.assertEqual(sorted(single), list(range(256)))
        for data in [bytes([b]) for b in range(256)] + [rng.randbytes(rng.randint(1, 12)) for _ in range(2000)]:
            tokens = [single[byte] for byte in data]
            self.assertEqual(self.encoder.decode(tokens), data.decode("utf-8", errors="replace"))
            self.assertEqual("".join(self.encoder.decode_stream(tokens)), data.decode("utf-8", errors="replace"))

    def test_lists_arrays_tensors(self):
        tokens = self.encoder.encode("Hello 世界")
        for form in (tokens, tuple(tokens), np.array(tokens), np.array(tokens, dtype=np.uint16), torch.tensor(tokens), iter(tokens)):
            self.assertEqual(self.encoder.decode(form), "Hello 世界")
        self.assertEqual(self.encoder.decode([]), "")

    def test_unknown_tokens(self):
        for tokens in ([50257], [-1], [1, 2, 99999], ["a"], [1.5], torch.tensor([[1, 2]]), torch.tensor([50300])):
            with self.assertRaisesRegex(ValueError, "to decode, expected tokens from 0 to 50256"):
                self.encoder.decode(tokens)

    def test_stream_gives_whole_characters_only(self):
        text = "a 🤗 é 世界 👩‍👩‍👧‍👦!"
        tokens = self.encoder.encode(text)
        pieces = list(self.encoder.decode_stream(iter(tokens)))
        self.assertEqual("".join(pieces), text)
        self.assertFalse(any("\ufffd" in piece for piece in pieces))
        self.assertEqual(pieces[0], "a") # as soon as it is there
        self.assertEqual("".join(self.encoder.decode_stream(self.encoder.encode("🤗")[:1])), "\ufffd") # cut for good


class Explanation(Oracle):
    def test_bytes_to_unicode_equals_the_table_of_the_vocabulary(self):
        table = bytes_to_unicode()
        self.assertEqual(len(set(table.values())), 256)
        self.assertEqual((table[33], table[65], table[32], table[10], table[0]), ("!", "A", "Ġ", "Ċ", "Ā"))
        self.assertTrue(all(char.isprintable() and not char.isspace() for char in table.values()))
        self.assertTrue(set(table.values()) <= set(self.encoder.encoder)) # each byte is a token of GPT-2

    def test_show_work(self):
        work = self.encoder.encode_and_show_work(" Hello!!")
        self.assertEqual(work["tokens"], [" Hello", "!!"])
        self.assertEqual(work["parts"][0], {"token": " Hello", "token_bytes": b" Hello", "token_translated": "ĠHello",
                                            "token_merged": ["ĠHello"], "token_ix": [18435]})

    def test_docstrings(self):
        import doctest
        self.assertEqual(doctest.testmod(bpe).failed, 0)
        self.assertGreater(doctest.testmod(bpe).attempted, 0)

    def test_the_merges_in_the_file_header(self):
        steps = [line for line in bpe.__doc__.splitlines() if "->" in line][0].strip(" .").removeprefix("merge: ").split(" -> ")
        self.assertEqual((steps[0], steps[-1]), ("Ġ H e l l o", "ĠHello"))
        for before, after in zip(steps, steps[1:]):
            symbols = before.split()
            best = min(zip(symbols, symbols[1:]), key=lambda pair: self.encoder.bpe_ranks.get(pair, 10 ** 6))
            self.assertEqual(before.replace(" ".join(best), "".join(best), 1), after)

    def test_runs_as_a_script(self):
        shown = run_python("-m", "mingpt.bpe", MINGPT_CACHE=str(vocabulary_folder())).stdout
        self.assertIn("ĠK + arp + athy", shown)


class Tokenizer(unittest.TestCase):
    def test_tensors(self):
        with mock.patch.dict(os.environ, MINGPT_CACHE=str(vocabulary_folder())):
            tokenizer = BPETokenizer()
        tokens = tokenizer("Hello world", return_tensors="pt")
        self.assertEqual((tokens.tolist(), tokens.dtype), ([[15496, 995]], torch.long))
        self.assertEqual(tokenizer.decode(tokens[0]), "Hello world")
        self.assertEqual(tokenizer("").shape, (1, 0))
        with self.assertRaisesRegex(ValueError, "row"):
            tokenizer.decode(tokens)
        with self.assertRaisesRegex(ValueError, "'np'"):
            tokenizer("x", return_tensors="np")


class Files(Oracle, Folder):
    def encode_file(self, content: bytes, **options) -> list[int]:
        (self.folder / "in.txt").write_bytes(content)
        count = self.encoder.encode_file(self.folder / "in.txt", self.folder / "out.bin", **options)
        tokens = np.fromfile(self.folder / "out.bin", dtype=np.uint16).tolist()
        self.assertEqual(len(tokens), count)
        return tokens

    def test_same_tokens_as_the_whole_text(self):
        rng = random.Random(5)
        text = "".join(rng.choice(TEXTS) + rng.choice(["", " ", "\n", "\r\n", "  "]) for _ in range(3000))
        expected = self.tiktoken.encode(text, allowed_special={"<|endoftext|>"})
        for block in (97, 1000, 10_000, 1 << 22): # cuts at every kind of place
            with mock.patch("mingpt.bpe.read_text", lambda path: read_text(path, block)):
                self.assertEqual(self.encode_file(text.encode(), allowed_special={"<|endoftext|>"}, workers=1), expected)
        self.assertEqual(np.memmap(self.folder / "out.bin", dtype=np.uint16, mode="r")[-3:].tolist(), expected[-3:])

    def test_several_processes(self):
        text = " ".join(TEXTS) * 500
        with mock.patch("mingpt.bpe.BLOCK", 1000), mock.patch("mingpt.bpe.read_text", lambda path: read_text(path, 30_000)):
            self.assertEqual(self.encode_file(text.encode(), workers=2), self.tiktoken.encode_ordinary(text))

    def test_empty(self):
        self.assertEqual(self.encode_file(b""), [])

    def test_not_utf8_leaves_the_old_file(self):
        self.encode_file(b"good")
        before = (self.folder / "out.bin").read_bytes()
        with self.assertRaisesRegex(ValueError, "byte 0xff at position 6"):
            self.encode_file(b"broken\xff")
        self.assertEqual((self.folder / "out.bin").read_bytes(), before)
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["in.txt", "out.bin"])


class Download(Server):
    """get_encoder from a server that misbehaves: nothing broken is kept, and the next call recovers."""

    def setUp(self):
        super().setUp()
        self.patch(mock.patch.dict(os.environ, MINGPT_CACHE=str(self.folder)), mock.patch("mingpt.bpe.SOURCE", self.address + "/"))
        self.good = {name: dict(body=(vocabulary_folder() / name).read_bytes()) for name in ("encoder.json", "vocab.bpe")}

    def serve(self, name, *answers):
        self.files[f"/{name}"] = [*answers]

    def recovers(self):
        for name, answer in self.good.items():
            self.serve(name, answer)
        self.assertEqual(bpe.get_encoder().encode("Hello world"), [15496, 995])
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["encoder.json", "vocab.bpe"])
        for name, answer in self.good.items():
            self.assertEqual((self.folder / name).read_bytes(), answer["body"])

    def fails(self, error, message, *answers):
        self.serve("encoder.json", *answers)
        with self.assertRaisesRegex(error, message):
            bpe.get_encoder()
        self.assertFalse((self.folder / "encoder.json").exists())

    def test_error_status(self):
        self.fails(OSError, "500", dict(status=500, body=b"sorry"))
        self.recovers()

    def test_error_page_with_a_good_status(self):
        self.fails(ValueError, "web page", dict(body=b"<html>sorry", headers={"Content-Type": "text/html; charset=utf-8"}))
        self.recovers()

    def test_wrong_bytes(self):
        self.fails(ValueError, "sha256", dict(body=b"{}"))
        self.assertEqual(list(self.folder.iterdir()), [])
        self.recovers()

    def test_breaks_for_ever(self):
        self.fails(OSError, "could not download", dict(self.good["encoder.json"], send=1000, ranges=False))
        self.recovers()

    def test_hangs(self):
        self.fails(OSError, "could not download", dict(self.good["encoder.json"], hang=5))
        self.recovers()

    def test_a_break_is_taken_up_where_it_was(self):
        self.serve("encoder.json", dict(self.good["encoder.json"], send=300_000), self.good["encoder.json"])
        self.serve("vocab.bpe", self.good["vocab.bpe"])
        self.assertEqual(len(bpe.get_encoder().encoder), 50257)
        first, second, *_ = self.requests
        self.assertEqual(first, ("/encoder.json", None))
        start = int(second[1].removeprefix("bytes=").removesuffix("-"))
        self.assertTrue(0 < start <= 300_000)

    def test_a_poisoned_cache_is_replaced_and_kept_if_that_fails(self):
        (self.folder / "encoder.json").write_text("<html>an error page of long ago")
        self.serve("encoder.json", dict(status=503, body=b""))
        with self.assertRaises(OSError):
            bpe.get_encoder()
        self.assertEqual((self.folder / "encoder.json").read_text(), "<html>an error page of long ago")
        self.recovers()

    def test_what_is_there_needs_no_network(self):
        self.recovers()
        self.requests.clear()
        bpe.get_encoder()
        self.assertEqual(self.requests, [])


if __name__ == "__main__":
    unittest.main()
