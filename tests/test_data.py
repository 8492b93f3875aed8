"""data.py: texts in one way, tokens in a file, windows, the batches of a step."""

import random
import unittest
from unittest import mock

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from common import Folder, get_encoder
from mingpt.bpe import Encoder
from mingpt.data import (
    TokenDataset, count_examples, draw_examples, encode_file, load_batches, read_text)

# Words and white space of every kind.
PIECES = [
    "a", "Hello!!", "'s", "'ll", "I'm", "''", "12", "3½", "é", "Größe", "世界", "。", "🤗", "e\u0301",
    "\ufeff", "\x00", "\x7f", "हिन्दी", "привет", "<|endoftext|>", "<|endof", " ", "\n", "\r\n",
    "  ", " \n", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"]
ENCODER = get_encoder()


class Texts(Folder):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "in.txt"
        self.out = self.folder / "out.bin"

    def test_a_text_is_utf8_without_its_mark_and_with_one_kind_of_line_end(self):
        self.path.write_bytes("\ufeffa\r\nb\rc\n\ufeffé".encode())
        self.assertEqual(read_text(self.path), "a\nb\nc\n\ufeffé")

    def test_a_file_of_another_encoding_says_where(self):
        for content, place in ((b"broken\xff", 6), (b"\xef\xbb\xbfabc\xff", 6),
                               (b"\xff\xfeh\x00", 0), (b"a" * 70_000 + b"\xc3", 70_000)):
            self.path.write_bytes(content)
            with self.assertRaisesRegex(ValueError, f"in.txt is not UTF-8.* {place};"):
                read_text(self.path)
        with self.assertRaisesRegex(ValueError, "there is no text file"):
            read_text(self.folder)

    def test_a_file_has_the_tokens_of_its_text_wherever_it_is_cut(self):
        for seed in range(40):
            text = "".join(random.Random(seed).choices(PIECES, k=80))
            self.path.write_text(text, encoding="utf-8", newline="")
            for special in ((), "<|endoftext|>", {"<|endoftext|>"}):
                with mock.patch("mingpt.data.PART_CHARACTERS", 1 + seed % 9):
                    count = encode_file(ENCODER, self.path, self.out, special)
                tokens = np.fromfile(self.out, dtype=np.uint16).tolist()
                self.assertEqual(tokens, ENCODER.encode(read_text(self.path), special))
                self.assertEqual(len(tokens), count)

    def test_memory_holds_a_part_of_the_text(self):
        self.path.write_text("привет, мир! " * 400, encoding="utf-8")
        with (mock.patch("mingpt.data.PART_CHARACTERS", 50),
              mock.patch.object(ENCODER, "encode", wraps=ENCODER.encode) as encode):
            encode_file(ENCODER, self.path, self.out)
        self.assertLess(max(len(call.args[0]) for call in encode.call_args_list), 100)

    def test_an_error_leaves_the_old_file(self):
        self.path.write_bytes(b"new " * 750 + b"\xff")
        self.out.write_bytes(b"old")
        for expected, encoder, out, special in (
                ("position 3000", ENCODER, self.out, ()),
                ("without white space", ENCODER, self.out, ["<|a b|>"]),
                ("the name of another file", ENCODER, self.path, ()),
                ("goes up to 65536", Encoder({"a": 65536}, []), self.out, ())):
            with self.assertRaisesRegex(ValueError, expected):
                encode_file(encoder, self.path, out, special)
        self.assertEqual(self.out.read_bytes(), b"old")
        self.assertEqual(len(list(self.folder.iterdir())), 2)


class Windows(unittest.TestCase):
    def test_the_drawn_example(self):
        x, y = TokenDataset(range(10), block_size=4, stride=4).__getitems__([0, 1, 2])
        self.assertEqual(x.tolist(), [[0, 1, 2, 3], [4, 5, 6, 7], [5, 6, 7, 8]])
        self.assertEqual(y.tolist(), [[1, 2, 3, 4], [5, 6, 7, 8], [-1, -1, -1, 9]])

    def test_windows_are_slices_of_any_kind_of_row(self):
        row = [5, 1, 4, 1, 3, 60_000, 2, 7]
        for tokens in (row, np.array(row, np.uint16), torch.tensor(row)):
            dataset = TokenDataset(tokens, 3)
            self.assertEqual(len(dataset), 5)
            for i, (x, y) in enumerate(dataset):
                self.assertEqual((x.tolist(), y.tolist()), (row[i:i + 3], row[i + 1:i + 4]))
            self.assertEqual((x.dtype, y.dtype), (torch.int64, torch.int64))

    def test_a_subset_may_count_from_the_end_but_not_past_it(self):
        dataset = TokenDataset(range(20), 4)
        x, y = next(load_batches(Subset(dataset, [-1, -3]), [[0, 1]]))
        self.assertEqual((x[:, 0].tolist(), y[:, 0].tolist()), ([15, 13], [16, 14]))
        with self.assertRaises(IndexError):
            next(load_batches(Subset(dataset, [16]), [[0]]))

    def test_each_token_is_a_target_once(self):
        for length in range(9, 40):
            targets = torch.cat([y for _, y in TokenDataset(np.arange(length), 8, stride=8)])
            self.assertEqual(targets[targets != -1].tolist(), list(range(1, length)))

    def test_too_short_a_text_and_a_stride_that_skips_are_refused(self):
        with self.assertRaisesRegex(ValueError, "a text of 8 tokens, expected 9 or more"):
            TokenDataset(range(8), 8)
        for block_size, stride in ((8, 0), (8, 9), (0, 1)):
            with self.assertRaisesRegex(ValueError, "expected a stride from 1 to block_size"):
                TokenDataset(range(100), block_size, stride)


class Noise(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.rand(2), index


class Stream(Noise, IterableDataset):
    def __iter__(self):
        return iter([])


class Batches(unittest.TestCase):
    def test_a_step_is_a_function_of_its_seed(self):
        drawn = np.random.default_rng((3, 7)).integers(10, size=4)
        self.assertEqual(draw_examples(7, 3, 10, 4).tolist(), drawn.tolist())

    def test_without_replacement_all_come_once(self):
        for size, batch_size in ((10, 4), (7, 7), (3, 8)):
            draw = lambda step: draw_examples(step, 5, size, batch_size, replacement=False).tolist()
            rows = [draw(step) for step in range(size)]
            epochs = np.reshape(rows, (batch_size, size)).tolist()
            for epoch in epochs:
                self.assertEqual(sorted(epoch), list(range(size)))
            self.assertNotEqual(epochs[0], epochs[-1])
            self.assertEqual([draw(step) for step in reversed(range(size))], rows[::-1])

    def test_workers_draw_from_the_seed_and_torch_does_not(self):
        before = torch.get_rng_state()
        drawn = []
        for seed in (1, 1, 2):
            batches = list(load_batches(Noise(), [[0, 1], [5]], num_workers=1, seed=seed))
            self.assertEqual([y.tolist() for _, y in batches], [[0, 1], [5]])
            drawn.append(batches[0][0].tolist())
        self.assertEqual(drawn[0], drawn[1])
        self.assertNotEqual(drawn[0], drawn[2])
        self.assertTrue(torch.equal(torch.get_rng_state(), before))

    def test_batches_and_datasets_of_another_form_are_refused(self):
        one = torch.zeros(3)
        for example in ({"x": one, "y": one}, (one, one, one), one, (one, "text")):
            with self.assertRaisesRegex(ValueError, r"\(x, y\)"):
                next(load_batches([example, example], [[0, 1]]))
        built = Noise()
        built.__getitems__ = lambda indices: {"x": one, "y": one}
        with self.assertRaisesRegex(ValueError, "a batch of type dict"):
            next(load_batches(built, [[0, 1]]))
        for dataset in (Stream(), Dataset(), []):
            with self.assertRaisesRegex(ValueError, r"expected .*\(x, y\)"):
                count_examples(dataset)
