"""What bpe.py promises, against tiktoken and tokenizers; and projects/bpe, which learns merges.

    python -m unittest tests.test_bpe
"""

import contextlib
import doctest
import functools
import hashlib
import io
import itertools
import os
import pickle
import random
import shutil
import string
import sys
import threading
import unicodedata
import unittest
from unittest import mock

import numpy as np
import requests
import tiktoken
import tokenizers
import torch
from hypothesis import given, settings, strategies as st
from pydoc_data.topics import topics
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import models, pre_tokenizers, trainers

from common import ROOT, Folder, Server, get_encoder, run_here, run_python, vocabulary_folder
from mingpt import bpe
from mingpt.bpe import BPETokenizer, Encoder, bytes_to_unicode
from mingpt.pretrained import load_encoder

sys.path.insert(0, str(ROOT / "projects" / "bpe"))
import train_bpe

EOT = "<|endoftext|>"
TEXTS = [
    "", " ", "  ", "\n", " \n ", "a", "Hello!!", " leading", "trailing ", "in  the   middle    of",
    "I'm, you're, he'll, we've, it's, I'd, can't; I'M YOU'RE", "''s 'sfoo x's' 'll", "...!!! ---",
    "1234 56,789.01 3½ ²³ Ⅷ ٣٤", "tab\tand\r\nlines\r\n\r\n", "Größe naïve façade Dvořák",
    "Привет, мир!", "你好，世界。天地玄黃", "こんにちは カタカナ", "안녕하세요 세계", "مرحبا بالعالم", "नमस्ते दुनिया",
    "สวัสดีชาวโลก", "Γειά σου", "እንኳን", "🤗 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️", "e\u0301 a\u200bb \ufeff\u00ad",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}\n\n\n\tpass", EOT + " <|endof",
    "\x00\x1c\x1d\x1e\x1f\x7f\x85\xa0 x", "a\u2003b\u3000c\u1680 d\u2028\u2029e", "\x1c!\x1c!\x85!",
]
SYMBOLS = st.text("ab", min_size=1, max_size=3)


def is_old(char: str) -> bool:
    """Returns whether all libraries know the character's kind: not if Unicode added it lately."""
    return unicodedata.category(char) not in ("Cs", "Cn")


def train_theirs(text: str, vocab_size: int) -> tokenizers.Tokenizer:
    """Learns a vocabulary by the library tokenizers, cut into words as GPT-2 does it."""
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, initial_alphabet=alphabet, show_progress=False))
    return theirs


@functools.cache
def load_tiktoken() -> tiktoken.Encoding:
    """Loads OpenAI's encoder, without a network."""
    files = vocabulary_folder() / "vocab.bpe", vocabulary_folder() / "encoder.json"
    ranks = data_gym_to_mergeable_bpe_ranks(*map(str, files))
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT: 50256})


class Oracle(Folder):
    @classmethod
    def setUpClass(cls):
        cls.encoder = get_encoder()
        cls.tiktoken = load_tiktoken()

    def check(self, text: str):
        tokens = self.encoder.encode(text)
        self.assertEqual(tokens, self.tiktoken.encode_ordinary(text), repr(text))
        self.assertEqual(self.encoder.decode(tokens), text)


class Encode(Oracle):
    def test_texts(self):
        files = vocabulary_folder() / "encoder.json", vocabulary_folder() / "vocab.bpe"
        theirs = tokenizers.Tokenizer(models.BPE.from_file(*map(str, files)))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        for text in [*TEXTS, "".join(TEXTS)]:
            self.check(text)
            self.assertEqual(self.encoder.encode(text), theirs.encode(text).ids, repr(text))
            shown = self.encoder.encode_and_show_work(text)
            numbers = [number for part in shown["parts"] for number in part["token_ix"]]
            self.assertEqual(numbers, self.encoder.encode(text))
            self.assertEqual(shown["bpe_idx"], numbers)
            self.assertEqual("".join(shown["tokens"]), text)

    def test_characters_between_others(self):
        chars = filter(is_old, map(chr, [*range(0x3100), *range(0x3100, 0x110000, 29)]))
        self.check("".join(f"a{char} {char}{char}1" for char in chars))
        rng = random.Random(1)
        alphabets = (string.ascii_letters + " '", string.printable, " \t\n\r\x0b\x85\xa0\u2003ab1!",
                     "aAé语🤗ж١½'’ \n\u200d\u0301")
        for _ in range(10_000):
            self.check("".join(rng.choices(rng.choice(alphabets), k=rng.randint(0, 24))))

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(st.text())
    def test_any_text_comes_back(self, text):
        self.assertEqual(self.encoder.decode(self.encoder.encode(text)), text)

    def test_long_words(self):
        letters = "".join(random.Random(2).choices(string.ascii_lowercase, k=20_000))
        for text in ("a" * 20_000, " " * 20_000 + "x", "ab" * 10_000, "🤗" * 5_000, letters):
            self.check(text)

    def test_half_surrogate_pairs(self):
        for text in ("\ud800", "a\udfff b", "\ud83e\udd17", "x\udc00\ud800y"):
            self.assertEqual(self.encoder.encode(text), self.tiktoken.encode_ordinary(text))
            self.assertEqual(self.encoder.encode_and_show_work(text)["bpe_idx"],
                             self.encoder.encode(text))
        theirs = self.tiktoken.encode(f"\ufffd{EOT}\ufffd", allowed_special="all")
        self.assertEqual(self.encoder.encode(f"\ud800{EOT}\udfff", EOT), theirs)


class Merges(Oracle):
    def test_the_fast_way_is_the_plain_one(self):
        rng = random.Random(3)
        for _ in range(1000):
            letters = rng.choice(["Ġaeiostnrlh", list(self.encoder.byte_decoder)])
            token = "".join(rng.choices(letters, k=rng.randint(0, 30)))
            self.assertEqual(self.encoder.bpe(token), " ".join(self.encoder._merge(token)))
        self.assertEqual(self.encoder.bpe("lowlevel"), "low level")

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(SYMBOLS, SYMBOLS), max_size=8), st.text("ab", max_size=12))
    def test_so_it_is_for_merges_that_no_training_gives(self, merges, token):
        encoder = Encoder({}, [*merges, ("a", ""), ("", "b")])
        self.assertEqual(encoder.bpe(token), " ".join(encoder._merge(token)))

    def test_merges_reach_every_token_of_gpt2(self):
        for token in self.encoder.whole_words.keys() - {EOT}:
            self.assertEqual(self.encoder._merge(token), [token])

    def test_a_token_that_merges_do_not_reach_is_not_taken(self):
        vocabulary = {"a": 0, "b": 1, "c": 2, "bc": 3, "abc": 4}
        self.assertEqual(Encoder(vocabulary, [("b", "c")]).encode("abc"), [0, 3])

    def test_a_vocabulary_that_cannot_spell_a_text(self):
        encoder = Encoder({"a": 0, "b": 1}, [("a", "b")])
        for text, missing in (("a c", "'Ġ'"), ("ab", "'ab'")):
            with self.assertRaisesRegex(ValueError, f"the vocabulary has no token {missing}"):
                encoder.encode(text)


class Cache(Oracle):
    def test_memory_is_bounded_in_every_script(self):
        encoder = get_encoder()
        cache = encoder.cache
        rng = random.Random(4)
        self.patch(mock.patch("mingpt.bpe.CACHE_BYTES", 100_000))
        for first, length in ((0x61, 5), (0x430, 6), (0x915, 8), (0x3041, 20), (0x4e00, 99)):
            letters = [chr(first + i) for i in range(20)]
            text = " ".join("".join(rng.choices(letters, k=length)) for _ in range(500))
            self.assertEqual(encoder.encode(text), self.tiktoken.encode_ordinary(text))
            entries = map(sys.getsizeof, itertools.chain(cache, cache.values()))
            self.assertLess(sum(entries) + sys.getsizeof(cache), 100_000)
        encoder.encode("x" * 100_000)
        self.assertNotIn("x" * 100_000, cache)
        line = "=" * 70 + " " + "word,word." * 9
        tokens = encoder.encode(line)
        with mock.patch.object(encoder, "_merge", side_effect=AssertionError):
            self.assertEqual(encoder.encode(line), tokens)

    def test_threads_share_an_encoder_that_was_pickled(self):
        self.patch(mock.patch("mingpt.bpe.CACHE_BYTES", 5_000))
        encoder = pickle.loads(pickle.dumps(self.encoder))
        texts = [" ".join(random.Random(i).sample(TEXTS, len(TEXTS))) * 10 for i in range(4)]
        results = {}
        def work(i):
            results[i] = [encoder.encode(texts[i]) for _ in range(3)]
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, text in enumerate(texts):
            self.assertEqual(results[i], [self.tiktoken.encode_ordinary(text)] * 3)


class Special(Oracle):
    def test_endoftext_is_text_unless_allowed(self):
        text = f"one{EOT} two{EOT}{EOT}"
        self.check(text)
        tokens = self.encoder.encode(text, allowed_special={EOT})
        self.assertEqual(tokens, self.tiktoken.encode(text, allowed_special={EOT}))
        self.assertEqual(tokens.count(self.encoder.eot_token), 3)
        self.assertEqual(self.encoder.decode(tokens), text)
        for allowed in (EOT, [EOT], {EOT: 1}, iter([EOT, EOT])):
            self.assertEqual(self.encoder.encode(text, allowed), tokens)
        for unknown in ({"<|pad|>"}, "<|pad|>", "all", ""):
            with self.assertRaisesRegex(ValueError, r"expected special tokens: \['<\|endoftext"):
                self.encoder.encode(text, unknown)

    def test_added_tokens_encode_where_allowed_and_decode_always(self):
        added = {"<|é|>": 50257, "<|é|> x": 50258, "世界": 50259, "hello": 50260, "Ġthe": 50261}
        encoder = Encoder(self.encoder.encoder, self.encoder.bpe_ranks, special_tokens=added)
        for token, number in added.items():
            self.assertEqual(encoder.encode(token), self.encoder.encode(token))
            self.assertEqual(encoder.encode(token, token), [number])
            self.assertEqual(encoder.decode([number, 0]), f"{token}!")
        self.assertEqual(encoder.encode("<|é|> xa", added), [50258, 64])
        self.assertEqual(encoder.special_tokens, added | {EOT: 50256})
        self.assertEqual(max(encoder.decoder), 50261)
        # The tokens that spell the same still mean what they meant.
        self.assertEqual(encoder.decode(self.encoder.encode("hello the")), "hello the")

    def test_text_in_the_vocabulary_itself_is_a_special_token(self):
        encoder = Encoder({"a": 0, "<|a b|>": 1, "世": 2}, [], special_tokens={EOT: 3})
        self.assertEqual(encoder.special_tokens, {"<|a b|>": 1, "世": 2, EOT: 3})
        self.assertEqual(encoder.decode([1, 2, 0, 3]), f"<|a b|>世a{EOT}")
        self.assertEqual(encoder.encode("a<|a b|>世a", ["<|a b|>", "世"]), [0, 1, 2, 0])
        self.assertEqual(encoder.eot_token, 3)
        self.assertIsNone(Encoder({"a": 0}, []).eot_token)


class Decode(Oracle):
    def test_every_token_alone(self):
        for token in range(50257):
            data = self.tiktoken.decode_single_token_bytes(token)
            self.assertEqual(self.encoder.token_bytes[token], data)
        self.assertEqual(sorted(self.encoder.decoder), list(range(50257)))

    def test_any_bytes(self):
        rng = random.Random(5)
        single = {data: token for token, data in self.encoder.token_bytes.items() if len(data) == 1}
        for data in [*single, *(rng.randbytes(rng.randint(1, 12)) for _ in range(1000))]:
            tokens = [single[bytes([byte])] for byte in data]
            text = data.decode("utf-8", errors="replace")
            self.assertEqual(self.encoder.decode(tokens), text)
            self.assertEqual("".join(self.encoder.decode_stream(tokens)), text)

    def test_lists_arrays_tensors(self):
        tokens = self.encoder.encode("Hello 世界")
        array = np.array(tokens, dtype=np.uint16)
        for form in (tuple(tokens), array, torch.tensor(tokens), iter(tokens)):
            self.assertEqual(self.encoder.decode(form), "Hello 世界")
        self.assertEqual(self.encoder.decode([]), "")

    def test_unknown_tokens(self):
        rows = ([50257], [-1], ["a"], [1.5], torch.tensor([50300]))
        for tokens in (*rows, 5, torch.tensor(5), [[1, 2]], torch.tensor([[1, 2]])):
            with self.assertRaisesRegex(ValueError, "expected a row of tokens from 0 to 50256"):
                self.encoder.decode(tokens)
        for tokens in rows:
            with self.assertRaisesRegex(ValueError, "expected a row of tokens"):
                list(self.encoder.decode_stream(tokens))

    def test_stream_gives_whole_characters_only(self):
        text = "a 🤗 é 世界 👩‍👩‍👧‍👦!"
        tokens = self.encoder.encode(text)
        pieces = list(self.encoder.decode_stream(iter(tokens)))
        self.assertEqual("".join(pieces), text)
        self.assertNotIn("\ufffd", text)
        self.assertEqual(pieces[0], "a")
        for form in (np.array(tokens), torch.tensor(tokens), torch.tensor(tokens)[:, None]):
            self.assertEqual(list(self.encoder.decode_stream(form)), pieces)
        cut = self.encoder.decode_stream(self.encoder.encode("🤗")[:1])
        self.assertEqual("".join(cut), "\ufffd")


class Explanation(Folder):
    environment = dict(MINGPT_CACHE=str(vocabulary_folder()), PYTHONPATH="")

    def test_bytes_to_unicode_is_the_table_of_the_vocabulary(self):
        table = bytes_to_unicode()
        self.assertEqual(list(table.values()), list(get_encoder().encoder)[:256])
        self.assertEqual((table[32], table[10], table[0]), ("Ġ", "Ċ", "Ā"))
        self.assertTrue(all(char.isprintable() and not char.isspace() for char in table.values()))

    def test_docstrings(self):
        result = doctest.testmod(bpe)
        self.assertEqual((result.failed, result.attempted), (0, 2))
        encoder = get_encoder()
        work = encoder.encode_and_show_work(" Hello!!")
        self.assertEqual(work["tokens"], [" Hello", "!!"])
        self.assertEqual(work["parts"][0], {
            "token": " Hello", "token_bytes": b" Hello", "token_translated": "ĠHello",
            "token_merged": ["ĠHello"], "token_ix": [18435]})
        steps = ["Ġ H e l l o"]
        encoder.bpe("ĠHello", lambda rank, symbols: steps.append(" ".join(symbols)))
        self.assertIn(" -> ".join(steps), bpe.__doc__)

    def test_the_module_shows_every_merge(self):
        printed = io.StringIO()
        self.patch(mock.patch.dict(os.environ, self.environment))
        with contextlib.redirect_stdout(printed):
            bpe.show("Hello!! I'm Andrej Karpathy.")
        self.assertLessEqual(max(map(len, printed.getvalue().splitlines())), 80)
        rows = [line.split() for line in printed.getvalue().splitlines()]
        start = rows.index(["'", "Karpathy'", *"ĠKarpathy"])
        self.assertEqual(rows[start + 1], ["9", "Ġ", "K", "a", "r", "p", "at", "h", "y"])
        self.assertEqual(rows[start + 6], ["9780", "ĠK", "arp", "athy"])
        self.assertEqual(rows[start + 7], ["tokens", "509", "5117", "10036"])

    def test_a_copy_of_the_file_works_alone_in_a_plain_terminal(self):
        shutil.copy(bpe.__file__, self.folder)
        plain = dict(self.environment, PYTHONUTF8="0", PYTHONIOENCODING="ascii")
        self.assertIn("9780  ?K arp athy", run_python("bpe.py", cwd=self.folder, **plain).stdout)
        check = "import sys, bpe; bpe.show('x é'); print({'torch', 'mingpt'} & set(sys.modules))"
        shown = run_python("-c", check, cwd=self.folder, **self.environment).stdout
        self.assertTrue(shown.endswith("set()\n"))

    def test_no_vocabulary_is_one_line(self):
        result = run_python(bpe.__file__, MINGPT_CACHE=str(self.folder), check=False,
                            HTTPS_PROXY="http://127.0.0.1:9")
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr, r"\Aerror: .*encoder.json is missing or damaged, and the "
                                        r"download failed: .*put it at .*encoder.json\n\Z")

    def test_tensors(self):
        with mock.patch.dict(os.environ, self.environment):
            tokenizer = BPETokenizer()
        tokens = tokenizer("Hello world", return_tensors="pt")
        self.assertEqual((tokens.tolist(), tokens.dtype), ([[15496, 995]], torch.long))
        self.assertEqual(tokenizer.decode(tokens[0]), "Hello world")
        self.assertEqual(tokenizer("").shape, (1, 0))
        for given_text, form in (("x", "np"), (["x"], "pt")):
            with self.assertRaisesRegex(ValueError, "expected a string and 'pt'"):
                tokenizer(given_text, form)


class Download(Server):
    """A file from a server that misbehaves: nothing broken is kept, the next call recovers."""

    def setUp(self):
        super().setUp()
        get = requests.get
        self.good = dict(body="vocabulary é".encode() * 1000)
        self.path = self.folder / "in" / "a.txt"
        self.patch(mock.patch.dict(os.environ, MINGPT_CACHE=str(self.path.parent)),
                   mock.patch("mingpt.bpe.SOURCE", self.address + "/"),
                   mock.patch("requests.get", lambda url, timeout: get(url, timeout=0.4)))

    def read(self) -> str:
        return bpe._read("a.txt", hashlib.sha256(self.good["body"]).hexdigest())

    def recovers(self):
        self.files["/a.txt"] = [self.good]
        self.assertEqual(self.read().encode(), self.good["body"])
        self.assertEqual([path.name for path in self.path.parent.iterdir()], ["a.txt"])
        self.assertEqual(self.path.read_bytes(), self.good["body"])
        self.requests.clear()
        self.read()
        self.assertEqual(self.requests, [])

    def test_what_is_not_the_file(self):
        page = {"Content-Type": "text/html; charset=utf-8"}
        self.path.parent.mkdir()
        for error, message, answer in (
                (OSError, "500", dict(status=500, body=b"sorry")),
                (OSError, "download failed", dict(self.good, send=1000)),
                (OSError, "download failed", dict(self.good, hang=5)),
                (ValueError, "sha256", dict(body=b"<html>sorry", headers=page)),
                (ValueError, "sha256", dict(body=b""))):
            self.path.write_text("an error page of long ago")
            self.files["/a.txt"] = [answer]
            with self.assertRaisesRegex(error, f"{message}.* put it at .*a.txt"):
                self.read()
            self.assertEqual(self.path.read_text(), "an error page of long ago")
            self.recovers()

    def test_a_full_disk_leaves_nothing(self):
        self.files["/a.txt"] = [self.good]
        full = mock.patch("mingpt.bpe.os.replace", side_effect=OSError(28, "No space left"))
        with full, self.assertRaisesRegex(OSError, "No space"):
            self.read()
        self.assertEqual(list(self.path.parent.iterdir()), [])
        self.recovers()

    def test_several_write_the_same_file(self):
        self.files["/a.txt"] = [self.good]
        threads = [threading.Thread(target=self.read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.recovers()


class Training(Folder):
    text = "\n".join(topics[name] for name in sorted(topics))[:60_000]

    def test_as_good_as_tokenizers(self):
        for text in (self.text, "低い低い低い、高い。" * 50 + self.text[:2000], "ab" * 300 + "aaa aaaa" * 99):
            ours = train_bpe.train_bpe(text, 600)
            theirs = train_theirs(text, len(ours.encoder) - 1)
            count = len(theirs.encode(text).ids)
            self.assertLessEqual(abs(len(ours.encode(text)) - count), 0.005 * count)
            self.assertEqual(ours.decode(ours.encode(text)), text)

    def test_the_vocabulary(self):
        encoder = train_bpe.train_bpe(self.text, 300)
        self.assertEqual(sorted(encoder.decoder), list(range(300)))
        self.assertEqual(encoder.eot_token, 299)
        self.assertEqual(list(encoder.encoder)[:256], list(bytes_to_unicode().values()))
        self.assertEqual(encoder.encoder["".join(list(encoder.bpe_ranks)[0])], 256)
        self.assertEqual(len(train_bpe.train_bpe("", 300).encoder), 257)
        with self.assertRaisesRegex(ValueError, "vocab_size=256, expected 257 or more"):
            train_bpe.train_bpe("text", 256)

    def test_merges_are_counted_as_they_stand(self):
        self.assertEqual(list(train_bpe.learn_merges("abab ab abc")), [
            (("a", "b"), 4), (("Ġ", "ab"), 2)])

    def test_script(self):
        path = self.folder / "in.txt"
        path.write_text(self.text, encoding="utf-8")
        status, printed, errors = run_here(
            train_bpe.main, f"--data.path={path}", "--data.vocab_size=400",
            f"--system.work_dir={self.folder / 'out'}")
        self.assertEqual((status, errors), (0, ""))
        self.assertTrue((self.folder / "out" / "characters.png").exists())
        expected = train_bpe.train_bpe(self.text[:54_000], 400)
        found = load_encoder(self.folder / "out", 400)
        self.assertEqual(found.encoder, expected.encoder)
        self.assertEqual(found.bpe_ranks, expected.bpe_ranks)


class OwnMerges(unittest.TestCase):
    def test_a_cache_that_is_cleared_begins_anew(self):
        encoder = Encoder({"a": 0, "b": 1}, [])
        encoder.encode("ab")
        self.assertGreater(encoder.cache.size, 0)
        encoder.cache.clear()
        self.assertEqual(encoder.cache.size, 0)

    def test_a_bpe_of_ones_own_is_used(self):
        class Characters(Encoder):
            def bpe(self, token):
                return " ".join(token)

        vocabulary = {"a": 0, "b": 1, "ab": 2}
        self.assertEqual(Encoder(vocabulary, [("a", "b")]).encode("abab"), [2, 2])
        self.assertEqual(Characters(vocabulary, [("a", "b")]).encode("abab"), [0, 1, 0, 1])


if __name__ == "__main__":
    unittest.main()
