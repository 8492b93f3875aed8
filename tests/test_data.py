"""What data.py promises: texts in one way, tokens in a file, windows, the batches of a step."""

import random
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from common import Folder, get_encoder
from mingpt.bpe import Encoder
from mingpt.data import (
    TokenDataset, count_examples, draw_examples, encode_file, load_batches, read_text)

WORDS = [
    "a", "Hello!!", "'s", "'ll", "I'm", "''", "12", "3½", "é", "Größe", "世界", "。", "🤗", "e\u0301",
    "\ufeff", "\x00", "\x7f", "हिन्दी", "привет", "<|endoftext|>", "<|endof"]
SPACES = [
    "", " ", "\n", "\r\n", "  ", " \n", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2003",
    "\u2028", "\u3000"]


def make_text(seed: int, words: int) -> str:
    """Draws words and white space of every kind, in every order."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(words))


class TextFile(Folder):
    def write(self, content: bytes) -> Path:
        (self.folder / "in.txt").write_bytes(content)
        return self.folder / "in.txt"


class Texts(TextFile):
    def test_mark_and_line_ends(self):
        path = self.write("\ufeffa\r\nb\rc\n\ufeffé".encode())
        self.assertEqual(read_text(path), "a\nb\nc\n\ufeffé")
        with mock.patch.dict("os.environ", HOME=str(self.folder), USERPROFILE=str(self.folder)):
            self.assertEqual(read_text("~/in.txt"), read_text(path))

    def test_other_encodings_and_no_file(self):
        for content, byte, place in (
                (b"broken\xff", "0xff", 6), (b"\xef\xbb\xbfabc\xff", "0xff", 6),
                (b"\xff\xfeh\x00", "0xff", 0), (b"a" * 70_000 + b"\xc3", "0xc3", 70_000)):
            with self.assertRaisesRegex(ValueError, f"in.txt is not UTF-8.* {byte} .* {place};"):
                read_text(self.write(content))
        for path in (self.folder, self.folder / "none"):
            with self.assertRaisesRegex(ValueError, f"there is no text file .*{path.name}"):
                read_text(path)


class EncodeFile(TextFile):
    @classmethod
    def setUpClass(cls):
        cls.encoder = get_encoder()

    def encode_file(self, content: bytes, part: int = 1 << 16, special=()) -> list[int]:
        with mock.patch("mingpt.data.PART_CHARACTERS", part):
            count = encode_file(
                self.encoder, self.write(content), self.folder / "out.bin", special)
        tokens = np.fromfile(self.folder / "out.bin", dtype=np.uint16).tolist()
        self.assertEqual(len(tokens), count)
        return tokens

    def test_same_tokens_wherever_it_is_cut(self):
        for seed in range(60):
            text = make_text(seed, 40)
            for special in ((), "<|endoftext|>", {"<|endoftext|>"}):
                tokens = self.encode_file(text.encode(), 1 + seed % 9, special)
                whole = self.encoder.encode(read_text(self.folder / "in.txt"), special)
                self.assertEqual(tokens, whole, (seed, special))
        self.assertEqual(self.encode_file(b""), [])

    def test_parts_stay_short_without_white_space(self):
        texts = ("世界你好，" * 500, "привет," * 400, "हिन्दी" * 400, "12, " * 500, "x1" * 999)
        with mock.patch.object(self.encoder, "encode", wraps=self.encoder.encode) as encode:
            for text in texts:
                self.encode_file(text.encode(), part=50)
        self.assertLess(max(len(call.args[0]) for call in encode.call_args_list), 100)

    def test_an_error_leaves_the_old_file(self):
        before = self.encode_file(b"good")
        with self.assertRaisesRegex(ValueError, "position 3000"):
            self.encode_file(b"new " * 750 + b"\xff", part=100)
        with self.assertRaisesRegex(ValueError, r"<\|pad\|>"):
            self.encode_file(b"", special=["<|pad|>"])
        path = self.folder / "in.txt"
        for out in (path, self.folder / ".." / self.folder.name / "in.txt", self.folder):
            with self.assertRaisesRegex(ValueError, "expected the name of another file"):
                encode_file(self.encoder, path, out)
        with self.assertRaisesRegex(ValueError, "goes up to 65536"):
            encode_file(Encoder({"a": 65536}, []), path, self.folder / "out.bin")
        self.assertEqual(np.fromfile(self.folder / "out.bin", np.uint16).tolist(), before)
        self.assertEqual({path.name for path in self.folder.iterdir()}, {"in.txt", "out.bin"})


class Windows(unittest.TestCase):
    def test_the_drawn_example(self):
        x, y = TokenDataset(range(10), block_size=4, stride=4).__getitems__([0, 1, 2])
        self.assertEqual(x.tolist(), [[0, 1, 2, 3], [4, 5, 6, 7], [5, 6, 7, 8]])
        self.assertEqual(y.tolist(), [[1, 2, 3, 4], [5, 6, 7, 8], [-1, -1, -1, 9]])

    def test_against_slices_of_every_kind_of_row(self):
        row = [5, 1, 4, 1, 3, 60_000, 2, 7]
        for tokens in (row, np.array(row, np.uint16), np.array(row)[::-1][::-1], torch.tensor(row)):
            dataset = TokenDataset(tokens, 3)
            self.assertEqual(len(dataset), 5)
            for i, (x, y) in enumerate(dataset):
                self.assertEqual((x.tolist(), y.tolist()), (row[i:i + 3], row[i + 1:i + 4]))
            self.assertEqual((x.dtype, y.dtype), (torch.int64, torch.int64))
            self.assertTrue(torch.equal(dataset[-1][0], x))
            self.assertRaises(IndexError, dataset.__getitem__, 5)

    def test_each_token_is_a_target_once(self):
        for length in range(9, 40):
            targets = torch.cat([y for _, y in TokenDataset(np.arange(length), 8, stride=8)])
            self.assertEqual(targets[targets != -1].tolist(), list(range(1, length)))

    def test_too_short_a_text_says_how_much_it_needs(self):
        with self.assertRaisesRegex(ValueError, "a text of 8 tokens, expected 9 or more") as raised:
            TokenDataset(range(8), 8)
        self.assertNotIn("stride", str(raised.exception))
        for block_size, stride in ((8, 0), (8, 9), (0, 1)):
            with self.assertRaisesRegex(ValueError, "expected a stride from 1 to block_size"):
                TokenDataset(range(100), block_size, stride)


class Noise(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.rand(2), index


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Noise())


class Batches(unittest.TestCase):
    def test_a_step_is_a_function_of_its_seed(self):
        drawn = np.random.default_rng((3, 7)).integers(10, size=4).tolist()
        for _ in range(2):
            self.assertEqual(draw_examples(7, 3, 10, 4).tolist(), drawn)

    def test_without_replacement_all_come_once(self):
        for size, batch_size in ((10, 4), (7, 7), (3, 8)):
            draw = lambda step: draw_examples(step, 5, size, batch_size, replacement=False).tolist()
            rows = [draw(step) for step in range(size)]
            seen = np.reshape(rows, (batch_size, size))
            for epoch in seen:
                self.assertEqual(sorted(epoch), list(range(size)))
            self.assertEqual([draw(step) for step in reversed(range(size))], rows[::-1])

    def load(self, seed: int) -> torch.Tensor:
        before = torch.get_rng_state()
        batches = list(load_batches(Noise(), [[0, 1], [5]], num_workers=1, seed=seed))
        self.assertTrue(torch.equal(torch.get_rng_state(), before))
        self.assertEqual([y.tolist() for _, y in batches], [[0, 1], [5]])
        return torch.cat([x for x, _ in batches])

    def test_workers_draw_from_the_seed(self):
        first = self.load(seed=1)
        self.assertTrue(torch.equal(self.load(seed=1), first))
        self.assertFalse(torch.equal(self.load(seed=2), first))

    def test_a_dataset_may_build_batches(self):
        x, y = next(load_batches(TokenDataset(range(20), 4), [[3, 1]]))
        self.assertEqual((x[:, 0].tolist(), y[:, 0].tolist()), ([3, 1], [4, 2]))

    def test_batches_of_another_form_are_one_line(self):
        one = torch.zeros(3)
        for example in ({"x": one, "y": one}, (one, one, one), one, (one, "text")):
            with self.assertRaisesRegex(ValueError, r"\(x, y\)"):
                next(load_batches([example, example], [[0, 1]]))
        for dataset in (Stream(), Dataset(), []):
            with self.assertRaisesRegex(ValueError, r"expected .*\(x, y\)"):
                count_examples(dataset)
        self.assertEqual(count_examples(Noise()), 6)


if __name__ == "__main__":
    unittest.main()
