"""Rows of tokens: files encoded in parts and by several processes, and windows of them."""

import multiprocessing
import random
import unittest
from unittest import mock

import numpy as np
import torch
from torch.utils.data import DataLoader

from common import Folder, get_encoder, run_python, vocabulary_folder
from mingpt import data
from mingpt.bpe import Encoder
from mingpt.data import TokenDataset, encode_file

WHITE = ["", " ", "\n", "\r\n", "  ", " \n", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"]
WORDS = ["a", "Hello!!", "'s", "'ll", "I'm", "''", "12", "3½", "é", "Größe", "世界", "🤗", "e\u0301", "\ufeff", "\x00", "\x7f", "<|endoftext|>", "<|endof"]

def make_text(seed: int, words: int) -> str:
    """Words and white space of every kind, next to one another in every order."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(WHITE) for _ in range(words))


class EncodeFile(Folder):
    @classmethod
    def setUpClass(cls):
        cls.encoder = get_encoder()

    def encode_file(self, content: bytes, **options) -> list[int]:
        (self.folder / "in.txt").write_bytes(content)
        count = encode_file(self.encoder, self.folder / "in.txt", self.folder / "out.bin", **options)
        tokens = np.fromfile(self.folder / "out.bin", dtype=np.uint16).tolist()
        self.assertEqual(len(tokens), count)
        return tokens

    def test_same_tokens_as_the_whole_text(self):
        text = make_text(5, 6000)
        for special in ((), "<|endoftext|>"):
            expected = self.encoder.encode(text, special)
            for block in (1, 7, 97, 1000, 10_000, 1 << 22):
                with mock.patch("mingpt.data.BLOCK", block):
                    self.assertEqual(self.encode_file(text.encode(), allowed_special=special, workers=1), expected)
        self.assertEqual(np.memmap(self.folder / "out.bin", dtype=np.uint16, mode="r")[-3:].tolist(), expected[-3:])

    def test_every_cut_of_many_texts(self):
        for seed in range(100):
            text = make_text(seed, 12).encode()
            for special in ([], ["<|endoftext|>"]):
                whole = self.encoder.encode(text.decode(), special)
                for match in data.CUT.finditer(text):
                    parts = text[:match.end()].decode(), text[match.end():].decode()
                    self.assertEqual([token for part in parts for token in self.encoder.encode(part, special)], whole)

    def test_nowhere_to_cut(self):
        for text in ("世界" * 1000, "x" * 5000, "\u3000a" * 1000, " " * 5000, "a" * 300 + " b"):
            with mock.patch("mingpt.data.BLOCK", 100):
                self.assertEqual(self.encode_file(text.encode(), workers=1), self.encoder.encode(text))

    def test_each_byte_is_searched_once(self):
        (self.folder / "in.txt").write_bytes(b"x" * 10_000)
        places = []
        class Watched:
            def search(self, text, place):
                places.append(place)
                return data_cut.search(text, place)
        data_cut = data.CUT
        with mock.patch("mingpt.data.BLOCK", 100), mock.patch("mingpt.data.CUT", Watched()):
            self.assertEqual(list(data._find_cuts(self.folder / "in.txt")), [0, 10_000])
        self.assertEqual(places, [100])

    def test_several_processes(self):
        text = make_text(6, 4000)
        with mock.patch("mingpt.data.BLOCK", 1000):
            self.assertEqual(self.encode_file(text.encode(), workers=2), self.encoder.encode(text))
            with self.assertRaisesRegex(ValueError, r"in.txt is not UTF-8 text: byte 0xff at position 5000"):
                self.encode_file(b"good " * 1000 + b"\xff" + b" good" * 1000 + b"\xff", workers=2)

    def test_every_start_method(self):
        text = make_text(7, 2000)
        (self.folder / "in.txt").write_bytes(text.encode())
        (self.folder / "script.py").write_text("""
import multiprocessing, sys
from mingpt import data
from mingpt.bpe import get_encoder
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    data.BLOCK = 1000
    data.encode_file(get_encoder(), "in.txt", sys.argv[1] + ".bin", workers=2)
""", encoding="utf-8")
        for method in multiprocessing.get_all_start_methods():
            run_python("script.py", method, cwd=self.folder, MINGPT_CACHE=str(vocabulary_folder()))
            self.assertEqual(np.fromfile(self.folder / f"{method}.bin", dtype=np.uint16).tolist(), self.encoder.encode(text))

    def test_special_tokens(self):
        token, text = "<|endoftext|>", "one<|endoftext|> two<|endoftext|>\n" * 100
        expected = self.encoder.encode(text, token)
        for allowed in (token, [token], {token}, iter([token]), (t for t in [token])):
            with mock.patch("mingpt.data.BLOCK", 50):
                self.assertEqual(self.encode_file(text.encode(), allowed_special=allowed, workers=1), expected)
        with self.assertRaisesRegex(ValueError, r"<\|pad\|>"):
            self.encode_file(b"", allowed_special=["<|pad|>"])
        with mock.patch.dict(self.encoder.special_tokens, {"<|a b|>": 50000}), self.assertRaisesRegex(ValueError, "without white space"):
            self.encode_file(b"", allowed_special=["<|a b|>"])

    def test_empty(self):
        self.assertEqual(self.encode_file(b""), [])
        self.assertEqual(self.encode_file(b"", workers=4), [])

    def test_not_utf8_leaves_the_old_file(self):
        self.encode_file(b"good")
        before = (self.folder / "out.bin").read_bytes()
        with self.assertRaisesRegex(ValueError, "byte 0xff at position 6"):
            self.encode_file(b"broken\xff")
        self.assertEqual((self.folder / "out.bin").read_bytes(), before)
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["in.txt", "out.bin"])

    def test_what_is_no_text_file_or_no_place_for_tokens(self):
        (self.folder / "in.txt").write_text("text")
        for path, out in (("in.txt", "in.txt"), ("in.txt", "../" + self.folder.name + "/in.txt"), ("in.txt", "."), (".", "out.bin"), ("none", "out.bin")):
            with self.assertRaisesRegex(ValueError, "expected a text file and the name of another file"):
                encode_file(self.encoder, self.folder / path, self.folder / out)
        with self.assertRaises(OSError):
            encode_file(self.encoder, self.folder / "in.txt", self.folder / "none" / "out.bin")
        self.assertEqual([(path.name, path.read_text()) for path in self.folder.iterdir()], [("in.txt", "text")])

    def test_a_vocabulary_too_large(self):
        with self.assertRaisesRegex(ValueError, "goes up to 65536, which uint16 cannot hold"):
            (self.folder / "in.txt").write_text("a")
            encode_file(Encoder({"a": 65536}, []), self.folder / "in.txt", self.folder / "out.bin")


class Windows(Folder):
    def test_against_slices(self):
        tokens = np.arange(100, 200, dtype=np.uint8)
        dataset = TokenDataset(tokens, 8)
        self.assertEqual(len(dataset), 92)
        for i, (x, y) in enumerate(dataset):
            self.assertEqual((x.tolist(), y.tolist()), (tokens[i:i + 8].tolist(), tokens[i + 1:i + 9].tolist()))
        self.assertEqual(i, 91)
        self.assertTrue(torch.equal(dataset[-1][0], dataset[91][0]))
        with self.assertRaises(IndexError):
            dataset[92]

    def test_batches(self):
        for stride in (1, 3, 8):
            dataset = TokenDataset(np.arange(50), 8, stride)
            x, y = dataset.__getitems__([len(dataset) - 1, 0, 2, 2])
            self.assertEqual((x.dtype, y.dtype, tuple(x.shape), tuple(y.shape)), (torch.int64, torch.int64, (4, 8), (4, 8)))
            for row, i in enumerate([len(dataset) - 1, 0, 2, 2]):
                self.assertTrue(torch.equal(x[row], dataset[i][0]) and torch.equal(y[row], dataset[i][1]))

    def test_validation_has_every_token_as_target_once(self):
        for length in range(9, 60):
            tokens = np.arange(length)
            x, y = zip(*TokenDataset(tokens, 8, stride=8))
            counted = torch.cat(y)[torch.cat(y) != -1]
            self.assertEqual(counted.tolist(), list(range(1, length)))
            self.assertEqual(x[-1][-1], length - 2) # the last window ends with the row
            for inputs, targets in zip(x, y):
                self.assertTrue(((targets == inputs + 1) | (targets == -1)).all())

    def test_kinds_of_tokens(self):
        row = [5, 1, 4, 1, 3, 60_000, 2]
        np.array(row, dtype=np.uint16).tofile(self.folder / "tokens.bin")
        for tokens in (row, np.array(row, dtype=np.uint16), np.array(row, dtype=np.int32), torch.tensor(row), np.array(row)[::-1][::-1],
                       np.memmap(self.folder / "tokens.bin", dtype=np.uint16, mode="r")):
            x, y = TokenDataset(tokens, 3)[3]
            self.assertEqual((x.tolist(), y.tolist(), x.dtype), (row[3:6], row[4:7], torch.int64))

    def test_a_loader_takes_batches(self):
        dataset = TokenDataset(np.arange(20), 4, stride=4)
        seen = [pair for pair in DataLoader(dataset, batch_size=2, collate_fn=lambda batch: batch)]
        self.assertEqual([tuple(x.shape) for x, _ in seen], [(2, 4), (2, 4), (1, 4)])

    def test_too_short_and_bad_strides(self):
        for tokens in ([], [1], range(8)):
            with self.assertRaisesRegex(ValueError, f"got a row of {len(tokens)} tokens for a block_size of 8; take a longer text"):
                TokenDataset(np.array(tokens, dtype=np.int64), 8)
        for block_size, stride in ((8, 0), (8, 9), (8, -1), (0, 1), (-3, 1)):
            with self.assertRaisesRegex(ValueError, "stride from 1 to block_size"):
                TokenDataset(np.arange(100), block_size, stride)


if __name__ == "__main__":
    unittest.main()
