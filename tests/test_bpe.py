"""bpe.py against tiktoken and tokenizers; and projects/bpe, which learns merges."""

import doctest
import hashlib
import os
import pickle
import random
import shutil
import string
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

from common import Folder, Server, get_encoder, run_python, vocabulary_folder
from mingpt import bpe
from mingpt.bpe import BPETokenizer, Encoder

import train_bpe

EOT = "<|endoftext|>"
FILES = [str(vocabulary_folder() / name) for name in ("encoder.json", "vocab.bpe")]
TEXTS = [
    "", " ", "  ", "\n", " \n ", "a", "Hello!!", " leading", "trailing ", "in  the   middle    of",
    "I'm, you're, he'll, we've, it's, I'd, can't; I'M YOU'RE", "''s 'sfoo x's' 'll", "...!!! ---",
    "1234 56,789.01 3½ ²³ Ⅷ ٣٤", "tab\tand\r\nlines\r\n\r\n", "Größe naïve façade Dvořák",
    "Привет, мир!", "你好，世界。天地玄黄", "こんにちは カタカナ", "안녕하세요 세계", "مرحبا بالعالم", "नमस्ते दुनिया",
    "สวัสดีชาวโลก", "Γειά σου", "እንኳን", "🤗 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️", "e\u0301 a\u200bb \ufeff\u00ad",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}\n\n\n\tpass", EOT + " <|endof",
    "\x00\x1c\x1d\x1e\x1f\x7f\x85\xa0 x", "a\u2003b\u3000c\u1680 d\u2028\u2029e", "\x1c!\x1c!\x85!",
]
ENCODER = get_encoder()
TIKTOKEN = tiktoken.Encoding(
    "gpt2", pat_str=r50k_pat_str, special_tokens={EOT: 50256},
    mergeable_ranks=data_gym_to_mergeable_bpe_ranks(*FILES[::-1]))
SYMBOLS = st.text("ab", min_size=1, max_size=3)
REPEATABLE = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def cut_by_tokenizers(model: models.BPE) -> tokenizers.Tokenizer:
    """Makes an encoder of the library tokenizers that cuts words as GPT-2 does."""
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return theirs


class Encode(unittest.TestCase):
    def check(self, text: str) -> None:
        tokens = ENCODER.encode(text)
        self.assertEqual(tokens, TIKTOKEN.encode_ordinary(text), repr(text))
        self.assertEqual(ENCODER.decode(tokens), text)

    def test_texts_of_every_script_have_the_tokens_of_tiktoken_and_tokenizers(self):
        theirs = cut_by_tokenizers(models.BPE.from_file(*FILES))
        for text in [*TEXTS, "".join(TEXTS)]:
            self.check(text)
            self.assertEqual(ENCODER.encode(text), theirs.encode(text).ids, repr(text))

    def test_every_kind_of_character_between_others(self):
        # Libraries differ over characters that Unicode added lately.
        chars = [chr(i) for i in [*range(0x3100), *range(0x3100, 0x110000, 29)]]
        known = [char for char in chars if unicodedata.category(char) not in ("Cs", "Cn")]
        self.check("".join(f"a{char} {char}{char}1" for char in known))
        rng = random.Random(1)
        alphabets = (string.ascii_letters + " '", string.printable, " \t\n\r\x0b\x85\xa0\u2003ab1!",
                     "aAé语🤗ж١½'’ \n\u200d\u0301")
        for _ in range(2000):
            self.check("".join(rng.choices(rng.choice(alphabets), k=rng.randint(0, 24))))

    def test_words_of_any_length(self):
        letters = "".join(random.Random(2).choices(string.ascii_lowercase, k=20_000))
        for text in ("a" * 20_000, " " * 20_000 + "x", "🤗" * 5_000, letters):
            self.check(text)

    def test_the_memory_of_the_cache_is_bounded(self):
        encoder = pickle.loads(pickle.dumps(ENCODER))
        encoder.cache.clear()
        text = " ".join(TEXTS) + " word" + "x" * 1000
        with mock.patch("mingpt.bpe.CACHED_PIECES", 50):
            for _ in range(2):
                self.assertEqual(encoder.encode(text), TIKTOKEN.encode_ordinary(text))
                self.assertLessEqual(len(encoder.cache), 50)
        self.assertLessEqual(max(map(len, encoder.cache)), bpe.CACHED_CHARACTERS)

    def test_half_a_surrogate_pair_is_a_replacement_character(self):
        for text in ("\ud800", "a\udfff b", "\ud83e\udd17", "x\udc00\ud800y"):
            self.assertEqual(ENCODER.encode(text), TIKTOKEN.encode_ordinary(text))

    def test_the_work_shown_is_the_work_done(self):
        work = ENCODER.encode_and_show_work(" Hello!!")
        self.assertEqual(work["tokens"], [" Hello", "!!"])
        self.assertEqual(work["bpe_idx"], [18435, 3228])
        self.assertEqual(work["parts"][0], {
            "token": " Hello", "token_bytes": b" Hello", "token_translated": "ĠHello",
            "token_merged": ["ĠHello"], "token_ix": [18435]})


class Merges(unittest.TestCase):
    @REPEATABLE
    @given(st.lists(st.tuples(SYMBOLS, SYMBOLS), max_size=8), st.text("ab", max_size=12))
    def test_the_fast_way_is_the_plain_one_for_any_merges(self, merges, token):
        encoder = Encoder({}, [*merges, ("a", ""), ("", "b")])
        self.assertEqual(encoder.bpe(token), " ".join(encoder._merge(token)))

    def test_merges_reach_every_token_of_gpt2(self):
        """Checks why a word may be looked up before it is merged."""
        for token in ENCODER.whole_words.keys() - {EOT}:
            self.assertEqual(ENCODER._merge(token), [token])

    def test_a_token_that_merges_do_not_reach_is_not_taken(self):
        vocabulary = {"a": 0, "b": 1, "c": 2, "bc": 3, "abc": 4}
        self.assertEqual(Encoder(vocabulary, [("b", "c")]).encode("abc"), [0, 3])

    def test_a_vocabulary_that_cannot_spell_a_text_says_so(self):
        encoder = Encoder({"a": 0, "b": 1}, [("a", "b")])
        for text, missing in (("a c", "'Ġ'"), ("ab", "'ab'")):
            with self.assertRaisesRegex(ValueError, f"the vocabulary has no token {missing}"):
                encoder.encode(text)

    def test_a_bpe_of_ones_own_is_used(self):
        class Characters(Encoder):
            def bpe(self, token):
                return " ".join(token)

        parts = {"a": 0, "b": 1, "ab": 2}, [("a", "b")]
        patched = Encoder(*parts)
        patched.bpe = lambda token: " ".join(token)
        for encoder in (Characters(*parts), patched):
            self.assertEqual(encoder.encode("abab"), [0, 1, 0, 1])
            work = encoder.encode_and_show_work("ab")
            self.assertEqual(work["parts"][0]["token_merged"], ["a", "b"])


class Special(unittest.TestCase):
    def test_endoftext_is_text_unless_allowed(self):
        text = f"one{EOT} two{EOT}{EOT}\ud800"
        self.assertEqual(ENCODER.encode(text), TIKTOKEN.encode_ordinary(text))
        tokens = TIKTOKEN.encode(text, allowed_special={EOT})
        for allowed in (EOT, [EOT], {EOT: 1}, iter([EOT, EOT])):
            self.assertEqual(ENCODER.encode(text, allowed), tokens)
        self.assertEqual(tokens.count(ENCODER.eot_token), 3)
        for unknown in ({"<|pad|>"}, "all", ""):
            with self.assertRaisesRegex(ValueError, "expected special tokens"):
                ENCODER.encode(text, unknown)

    def test_added_tokens_encode_where_allowed_and_decode_always(self):
        added = {"<|é|>": 50257, "<|é|> x": 50258, "世界": 50259, "hello": 50260, "Ġthe": 50261}
        encoder = Encoder(ENCODER.encoder, ENCODER.bpe_ranks, special_tokens=added)
        for token, number in added.items():
            self.assertEqual(encoder.encode(token), ENCODER.encode(token))
            self.assertEqual(encoder.encode(token, token), [number])
            self.assertEqual(encoder.decode([number, 0]), f"{token}!")
        # The longer of two counts.
        self.assertEqual(encoder.encode("<|é|> xa", added), [50258, 64])
        self.assertEqual(encoder.decode(ENCODER.encode("hello the")), "hello the")
        # A number of the vocabulary keeps its meaning.
        encoder = Encoder(ENCODER.encoder, ENCODER.bpe_ranks, special_tokens={"<x>": 262})
        self.assertEqual((encoder.decode([262]), encoder.decoder[262]), (" the", "Ġthe"))

    def test_text_in_the_vocabulary_itself_is_a_special_token(self):
        encoder = Encoder({"a": 0, "<|a b|>": 1, "世": 2}, [], special_tokens={EOT: 3})
        self.assertEqual(encoder.special_tokens, {"<|a b|>": 1, "世": 2, EOT: 3})
        self.assertEqual(encoder.encode("a<|a b|>世a", ["<|a b|>", "世"]), [0, 1, 2, 0])
        self.assertEqual(encoder.decode([1, 2, 0, 3]), f"<|a b|>世a{EOT}")
        self.assertIsNone(Encoder({"a": 0}, []).eot_token)


class Decode(unittest.TestCase):
    def test_every_token_alone(self):
        for token in range(50257):
            data = TIKTOKEN.decode_single_token_bytes(token)
            self.assertEqual(ENCODER.token_bytes[token], data)

    @REPEATABLE
    @given(st.binary(max_size=12))
    def test_any_bytes_at_once_and_as_a_stream(self, data):
        tokens = [TIKTOKEN.encode_single_token(bytes([byte])) for byte in data]
        text = data.decode("utf-8", errors="replace")
        self.assertEqual(ENCODER.decode(tokens), text)
        self.assertEqual("".join(ENCODER.decode_stream(tokens)), text)

    def test_lists_arrays_and_tensors_are_rows(self):
        text = "a 🤗 é 👩‍👩‍👧‍👦!"
        tokens = ENCODER.encode(text)
        for row in (tuple(tokens), np.array(tokens, np.uint16), torch.tensor(tokens), iter(tokens)):
            self.assertEqual(ENCODER.decode(row), text)
        # GPT.stream has tensors of one number each.
        self.assertEqual("".join(ENCODER.decode_stream(torch.tensor(tokens)[:, None])), text)

    def test_other_numbers_and_forms_are_refused(self):
        for tokens in ([50257], [-1], ["a"], torch.tensor([50300]), 5, torch.tensor([[1, 2]])):
            with self.assertRaisesRegex(ValueError, "expected a row of tokens from 0 to 50256"):
                ENCODER.decode(tokens)


class Module(Folder):
    def setUp(self):
        super().setUp()
        self.patch(mock.patch.dict(os.environ, MINGPT_CACHE=str(vocabulary_folder())))

    def test_docstrings_say_what_happens(self):
        result = doctest.testmod(bpe)
        self.assertEqual((result.failed, result.attempted), (0, 2))
        steps = ["Ġ H e l l o"]
        ENCODER.bpe("ĠHello", lambda rank, symbols: steps.append(" ".join(symbols)))
        self.assertIn(" -> ".join(steps), bpe.__doc__)

    def test_a_copy_of_the_file_shows_every_merge_alone_in_a_plain_terminal(self):
        shutil.copy(bpe.__file__, self.folder)
        plain = dict(PYTHONPATH="", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
        lines = run_python("bpe.py", cwd=self.folder, **plain).stdout.splitlines()
        rows = [line.split() for line in lines]
        start = rows.index(["'", "Karpathy'", "?", *"Karpathy"])
        self.assertEqual(rows[start + 1], ["9", "?", "K", "a", "r", "p", "at", "h", "y"])
        self.assertEqual(rows[start + 6], ["9780", "?K", "arp", "athy"])
        self.assertEqual(rows[start + 7], ["tokens", "509", "5117", "10036"])

    def test_tensors(self):
        tokenizer = BPETokenizer()
        tokens = tokenizer("Hello world", return_tensors="pt")
        self.assertEqual((tokens.tolist(), tokens.dtype), ([[15496, 995]], torch.long))
        self.assertEqual(tokenizer.decode(tokens[0]), "Hello world")
        self.assertEqual(tokenizer("").shape, (1, 0))
        for text, form in (("x", "np"), (["x"], "pt")):
            with self.assertRaisesRegex(ValueError, "expected a string and 'pt'"):
                tokenizer(text, form)


class Download(Server):
    """Gets a file from a bad server: nothing broken is kept, the next call recovers."""

    def setUp(self):
        super().setUp()
        get = requests.get
        self.good = dict(body="vocabulary é".encode() * 1000)
        self.path = self.folder / "in" / "a.txt"
        home = str(self.folder)
        self.patch(mock.patch.dict(os.environ, MINGPT_CACHE="~/in", HOME=home, USERPROFILE=home),
                   mock.patch("mingpt.bpe.SOURCE", self.address + "/"),
                   mock.patch("requests.get", lambda url, timeout: get(url, timeout=0.4)))

    def read(self) -> str:
        return bpe._read("a.txt", hashlib.sha256(self.good["body"]).hexdigest())

    def recovers(self) -> None:
        self.files["/a.txt"] = [self.good]
        self.requests.clear()
        # The second time it is read from the folder.
        for _ in range(2):
            self.assertEqual(self.read().encode(), self.good["body"])
            self.assertEqual([path.name for path in self.path.parent.iterdir()], ["a.txt"])
            self.assertEqual(self.requests, ["/a.txt"])

    def test_only_the_file_itself_is_kept(self):
        self.path.parent.mkdir()
        for answer in (dict(status=500, body=b"sorry"), dict(body=b"<html>sorry"),
                       dict(self.good, send=1000), dict(self.good, hang=5)):
            self.path.write_text("an error page of long ago")
            self.files["/a.txt"] = [answer]
            with self.assertRaisesRegex(OSError, "download failed: .* put it at .*a.txt"):
                self.read()
            self.assertEqual(self.path.read_text(), "an error page of long ago")
            self.recovers()

    def test_a_full_disk_leaves_nothing(self):
        self.files["/a.txt"] = [self.good]
        full = mock.patch("mingpt.bpe.os.replace", side_effect=OSError(28, "No space left"))
        with full, self.assertRaisesRegex(OSError, "No space"):
            self.read()
        self.assertEqual(list(self.path.parent.iterdir()), [])


class Training(unittest.TestCase):
    text = "\n".join(topics[name] for name in sorted(topics))[:60_000]

    def test_it_is_as_good_as_tokenizers(self):
        for text in (self.text, "低い低い低い、高い。" * 50 + self.text[:2000], "aaa " * 99):
            ours = train_bpe.train_bpe(text, 600)
            theirs = cut_by_tokenizers(models.BPE())
            theirs.train_from_iterator([text], trainers.BpeTrainer(
                vocab_size=len(ours.encoder) - 1, min_frequency=2, show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
            count = len(theirs.encode(text).ids)
            self.assertLessEqual(abs(len(ours.encode(text)) - count), 0.005 * count)
            self.assertEqual(ours.decode(ours.encode(text)), text)

    def test_bytes_come_first_then_merges_then_endoftext(self):
        encoder = train_bpe.train_bpe(self.text, 300)
        self.assertEqual(list(encoder.encoder.values()), list(range(300)))
        self.assertEqual(list(encoder.encoder)[:256], list(ENCODER.encoder)[:256])
        self.assertEqual(encoder.encoder["".join(list(encoder.bpe_ranks)[0])], 256)
        self.assertEqual(encoder.eot_token, 299)
        self.assertEqual(len(train_bpe.train_bpe("", 300).encoder), 257)
