"""The tokenizer against tiktoken and transformers' tokenizer."""

import os
import pickle
import random
import shutil
import string
import threading
import unicodedata
import unittest
from unittest import mock

import numpy as np
import requests
import tiktoken
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from common import Folder, Server, get_encoder, run_python, vocabulary_folder
from mingpt import bpe
from mingpt.bpe import BPETokenizer, bytes_to_unicode

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
                self.assertEqual([number for part in shown["parts"] for number in part["token_ix"]], shown["bpe_idx"])
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
            shown = self.encoder.encode_and_show_work(text)
            self.assertEqual([number for part in shown["parts"] for number in part["token_ix"]], self.encoder.encode(text))
        text = "\ud800<|endoftext|>\udfff"
        self.assertEqual(self.encoder.encode(text, "<|endoftext|>"), self.tiktoken.encode("\ufffd<|endoftext|>\ufffd", allowed_special="all"))

    def test_cache_is_bounded_and_changes_nothing(self):
        encoder = get_encoder()
        encoder.cache.max_characters = 100
        text = " ".join(TEXTS) * 2
        self.assertEqual(encoder.encode(text), self.tiktoken.encode_ordinary(text))
        for piece in (*"abcdefghijklmnopqrstuvwxyz", "b" * 99, "c" * 1000, "d" * 50, "e" * 60, "e" * 60):
            encoder.encode(piece)
            self.assertLessEqual(sum(map(len, encoder.cache)), 100)
            self.assertLessEqual(len(encoder.cache), 100 // 8)
        self.assertIn("e" * 60, encoder.cache)
        self.assertNotIn("c" * 1000, encoder.cache)

    def test_a_long_piece_is_cached(self):
        encoder, line = get_encoder(), "=" * 70 + " " + "-" * 79 + "\n" + "word,word." * 20
        tokens = encoder.encode(line)
        with mock.patch.object(encoder, "_merge", side_effect=AssertionError("the second time nothing is merged")):
            self.assertEqual(encoder.encode(line), tokens)

    def test_threads_share_an_encoder(self):
        encoder, texts, results = get_encoder(), [" ".join(random.Random(i).sample(TEXTS, len(TEXTS))) * 20 for i in range(4)], {}
        encoder.cache.max_characters = 500 # so that it is emptied all the time
        def work(i):
            results[i] = [encoder.encode(texts[i]) for _ in range(5)]
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, text in enumerate(texts):
            self.assertEqual(results[i], [self.tiktoken.encode_ordinary(text)] * 5)

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
        for unknown in ({"<|pad|>"}, "<|pad|>", "all"):
            with self.assertRaisesRegex(ValueError, r"<\|pad\|>|'all'"):
                self.encoder.encode(text, allowed_special=unknown)

    def test_any_iterable_of_special_tokens(self):
        expected = self.tiktoken.encode("a<|endoftext|>b<|endoftext|>", allowed_special="all")
        token = "<|endoftext|>"
        for allowed in (token, [token], (token,), {token}, frozenset([token]), {token: 1}, iter([token]), (t for t in [token, token])):
            self.assertEqual(self.encoder.encode("a<|endoftext|>b<|endoftext|>", allowed_special=allowed), expected)
        for allowed in ([], (), set(), iter([])):
            self.assertEqual(self.encoder.encode("a<|endoftext|>", allowed), self.tiktoken.encode_ordinary("a<|endoftext|>"))


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
        for tokens in ([50257], [-1], [1, 2, 99999], ["a"], [1.5], 5, torch.tensor(5), [[1, 2]], torch.tensor([[1, 2]]), torch.tensor([50300])):
            with self.assertRaisesRegex(ValueError, "to decode, expected a row of tokens from 0 to 50256"):
                self.encoder.decode(tokens)

    def test_stream_gives_whole_characters_only(self):
        text = "a 🤗 é 世界 👩‍👩‍👧‍👦!"
        tokens = self.encoder.encode(text)
        pieces = list(self.encoder.decode_stream(iter(tokens)))
        self.assertEqual("".join(pieces), text)
        self.assertFalse(any("\ufffd" in piece for piece in pieces))
        self.assertEqual(pieces[0], "a") # as soon as it is there
        self.assertEqual("".join(self.encoder.decode_stream(self.encoder.encode("🤗")[:1])), "\ufffd") # cut for good
        for form in (tokens, np.array(tokens), torch.tensor(tokens), iter(torch.tensor(tokens)[:, None])): # as from GPT.stream
            self.assertEqual(list(self.encoder.decode_stream(form)), pieces)
        for bad in ([50257], torch.tensor([-1]), ["a"]):
            with self.assertRaisesRegex(ValueError, "to decode, expected"):
                list(self.encoder.decode_stream(bad))


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


class Script(Folder):
    def test_module(self):
        self.assertIn("ĠK + arp + athy", run_python("-m", "mingpt.bpe", MINGPT_CACHE=str(vocabulary_folder())).stdout)

    def test_a_copy_of_the_file_works_alone(self):
        shutil.copy(bpe.__file__, self.folder)
        environment = dict(MINGPT_CACHE=str(vocabulary_folder()), PYTHONPATH="")
        self.assertIn("ĠK + arp + athy", run_python("bpe.py", cwd=self.folder, **environment).stdout)
        check = "import sys, bpe; print('torch' in sys.modules, bpe.BPETokenizer()('Hello world').tolist(), any(name.split('.')[0] == 'mingpt' for name in sys.modules))"
        self.assertEqual(run_python("-c", check, cwd=self.folder, **environment).stdout, "False [[15496, 995]] False\n")

    def test_a_terminal_that_cannot_show_everything(self):
        shown = run_python("-m", "mingpt.bpe", MINGPT_CACHE=str(vocabulary_folder()), PYTHONUTF8="0", PYTHONIOENCODING="ascii").stdout
        self.assertIn("?K + arp + athy", shown)

    def test_no_vocabulary_is_one_line(self):
        result = run_python("-m", "mingpt.bpe", MINGPT_CACHE=str(self.folder), HTTPS_PROXY="http://127.0.0.1:9", check=False)
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr, r"\Aerror: .*encoder.json is missing or damaged, and the download failed: .*put it at .*encoder.json\n\Z")


class Tokenizer(unittest.TestCase):
    def test_tensors(self):
        with mock.patch.dict(os.environ, MINGPT_CACHE=str(vocabulary_folder())):
            tokenizer = BPETokenizer()
        tokens = tokenizer("Hello world", return_tensors="pt")
        self.assertEqual((tokens.tolist(), tokens.dtype), ([[15496, 995]], torch.long))
        self.assertEqual(tokenizer.decode(tokens[0]), "Hello world")
        self.assertEqual(tokenizer("").shape, (1, 0))
        for bad in (tokens, torch.tensor(5)):
            with self.assertRaisesRegex(ValueError, "row"):
                tokenizer.decode(bad)
        with self.assertRaisesRegex(ValueError, "'np'"):
            tokenizer("x", return_tensors="np")


class Download(Server):
    """get_encoder from a server that misbehaves: nothing broken is kept, and the next call recovers."""

    def setUp(self):
        super().setUp()
        get = requests.get
        self.patch(mock.patch.dict(os.environ, MINGPT_CACHE=str(self.folder)), mock.patch("mingpt.bpe.SOURCE", self.address + "/"),
                   mock.patch("requests.get", lambda url, timeout: get(url, timeout=min(timeout, 0.4))))
        self.good = {name: dict(body=(vocabulary_folder() / name).read_bytes()) for name in ("encoder.json", "vocab.bpe")}

    def serve(self, name, *answers):
        self.files[f"/{name}"] = [*answers]

    def recovers(self):
        for name, answer in self.good.items():
            self.serve(name, answer)
        self.assertEqual(bpe.get_encoder().encode("Hello world"), [15496, 995])
        self.complete()

    def complete(self):
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["encoder.json", "vocab.bpe"])
        for name, answer in self.good.items():
            self.assertEqual((self.folder / name).read_bytes(), answer["body"])

    def fails(self, error, message, answer):
        for name in self.good:
            (self.folder / name).unlink(missing_ok=True)
        for name in self.good: # the first file, and the second
            self.serve(name, answer)
            with self.assertRaisesRegex(error, message) as caught:
                bpe.get_encoder()
            self.assertIn(f"put it at {self.folder / name}", str(caught.exception))
            self.assertFalse((self.folder / name).exists())
            self.serve(name, self.good[name])
        self.recovers()

    def test_what_is_not_the_file(self):
        self.fails(OSError, "500", dict(status=500, body=b"sorry"))
        self.fails(OSError, "404", dict(status=404, body=b"sorry"))
        self.fails(ValueError, "sha256", dict(body=b"<html>sorry", headers={"Content-Type": "text/html; charset=utf-8"}))
        self.fails(ValueError, "sha256", dict(body=b"{}"))
        self.fails(ValueError, "sha256", dict(body=b""))
        self.fails(OSError, "download failed", dict(self.good["encoder.json"], send=1000))
        self.fails(OSError, "download failed", dict(self.good["encoder.json"], hang=5))

    def test_a_damaged_file_is_replaced_and_kept_if_that_fails(self):
        (self.folder / "encoder.json").write_text("<html>an error page of long ago")
        self.serve("encoder.json", dict(status=503, body=b""))
        with self.assertRaisesRegex(OSError, "is missing or damaged"):
            bpe.get_encoder()
        self.assertEqual((self.folder / "encoder.json").read_text(), "<html>an error page of long ago")
        self.recovers()

    def test_a_full_disk_leaves_nothing(self):
        for name, answer in self.good.items():
            self.serve(name, answer)
        with mock.patch("mingpt.bpe.os.replace", side_effect=OSError(28, "No space left on device")), self.assertRaisesRegex(OSError, "No space"):
            bpe.get_encoder()
        self.assertEqual(list(self.folder.iterdir()), [])
        self.recovers()

    def test_what_is_there_needs_no_network(self):
        self.recovers()
        self.requests.clear()
        bpe.get_encoder()
        self.assertEqual(self.requests, [])

    def test_several_write_the_same_file(self):
        for name, answer in self.good.items():
            self.serve(name, answer)
        results, start = [], threading.Barrier(4)
        def work():
            start.wait()
            results.append(bpe.get_encoder().encode("Hello world"))
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(results, [[15496, 995]] * 4)
        self.complete()


if __name__ == "__main__":
    unittest.main()
