"""projects/chargpt: texts and their characters, bits per byte, samples, the data sets."""

import hashlib
import io
import itertools
import math
import os
import re
import unittest
import zipfile
from unittest import mock

import numpy as np

from common import Server, WorkingFolder, run_here
from mingpt.checkpoint import read_checkpoint

import chargpt

TINY = ("--data.path=in.txt", "--data.block_size=8", "--model.n_layer=1", "--model.n_head=1",
        "--model.n_embd=8", "--trainer.max_iters=2", "--system.length=4",
        "--system.work_dir=run")
SAMPLE = ("--system.mode=sample", "--system.work_dir=run", "--system.length=5")


class Texts(unittest.TestCase):
    def test_a_text_is_places_in_its_characters_across_parts(self):
        text = "aé世🤗 \n" * 5
        with mock.patch.object(chargpt, "PART_CHARACTERS", 7):
            chars, tokens = chargpt.encode(text)
        self.assertEqual(chars, "\n aé世🤗")
        self.assertEqual("".join(chars[token] for token in tokens), text)

    def test_a_text_is_cut_by_shares_if_a_window_fits_into_each(self):
        for name, sizes in (("", [900, 100]), ("text8", [900, 50, 50])):
            parts = chargpt.split(np.arange(1000), name, block_size=8)
            self.assertEqual([len(part) for part in parts], sizes)
            self.assertEqual(np.concatenate(parts).tolist(), list(range(1000)))
        for T, name in itertools.product((1, 8, 13, 64), ("", "text8")):
            with self.assertRaisesRegex(ValueError, "or more") as refused:
                chargpt.split(np.arange(T), name, T)
            least = re.search(r"expected ([\d,]+)", str(refused.exception))[1].replace(",", "")
            parts = chargpt.split(np.arange(int(least)), name, T)
            self.assertGreater(min(map(len, parts)), T)

    def test_bytes_of_a_character(self):
        chars, tokens = chargpt.encode("aaé世🤗")
        self.assertEqual(chargpt.count_bytes(chars, tokens, ""), (1 + 1 + 2 + 3 + 4) / 5)
        # The characters of enwik8 are bytes.
        self.assertEqual(chargpt.count_bytes(chars, tokens, "enwik8"), 1)


class Runs(WorkingFolder):
    def setUp(self):
        super().setUp()
        self.write("in.txt", 'the "def" of 2024\n' * 40)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def runs(self, *args) -> str:
        status, printed, errors = run_here(chargpt.main, *args)
        self.assertEqual((status, errors), (0, ""), args)
        return printed

    def test_a_run_reports_nats_bits_and_bits_per_byte(self):
        self.write("in.txt", "Größe! 世界\n" * 100)
        with self.assertLogs("mingpt", "INFO") as logged:
            self.runs(*TINY)
        nats, bits, per_byte = map(float, re.search(
            r"all 100 characters: ([\d.]+) nats each, ([\d.]+) bits, ([\d.]+) bits per byte",
            "\n".join(logged.output)).groups())
        self.assertAlmostEqual(bits, nats / math.log(2), delta=2e-4)
        # 16 bytes for 10 characters
        self.assertAlmostEqual(per_byte, bits / 1.6, delta=2e-4)

    def test_a_preset_replaces_the_default_sizes(self):
        others = [arg for arg in TINY if not arg.startswith("--model")]
        self.runs(*others, "--model.model_type=gpt-nano", "--model.n_layer=3")
        config = read_checkpoint("run/checkpoint.pt")["model_config"]
        self.assertEqual([config[size] for size in ("n_layer", "n_head", "n_embd")], [3, 3, 48])

    def test_a_prompt_is_a_text_as_it_was_typed_and_the_checkpoint_is_all_it_needs(self):
        self.runs(*TINY, "--model.tie_weights=True")
        (self.folder / "in.txt").unlink()
        (self.folder / "run" / "config.json").unlink()
        for prompt, start in (("2024", "2024"), ('"def"', '"def"'), (r"of\nthe", "of\nthe"),
                              ("20", "20"), ("", "\n")):
            printed = self.runs(*SAMPLE, "--system.prompt", prompt)
            self.assertTrue(printed.startswith(start), printed)
            self.assertEqual(len(printed), len(start) + 5 + 1)

    def test_another_text_is_no_way_to_go_on_and_changes_no_file(self):
        self.runs(*TINY)
        files = {path: path.stat().st_mtime_ns for path in self.folder.rglob("*.*")}
        # It has as many characters.
        self.write("other.txt", 'thE "dEf" of 2024\n' * 40)
        status, _, errors = run_here(chargpt.main, *TINY, "--trainer.resume=True",
                                     "--trainer.max_iters=4", "--data.path=other.txt")
        self.assertEqual(status, 2)
        self.assertIn("is a checkpoint of another model: _extra_state", errors)
        for path, time in files.items():
            self.assertEqual(path.stat().st_mtime_ns, time)


class DataSets(Server):
    """Gets data sets from a server on this machine."""

    TEXT = "<page>Größe 世界</page>\n" * 50

    def setUp(self):
        super().setUp()
        content = self.TEXT.encode()
        zipped = io.BytesIO()
        with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("enwik8", content)
        self.files["/input.txt"] = [dict(body=content)]
        self.files["/enwik8.zip"] = [dict(body=zipped.getvalue())]
        sha1 = hashlib.sha1(content).hexdigest()
        datasets = dict(tinyshakespeare=(f"{self.address}/input.txt", sha1),
                        enwik8=(f"{self.address}/enwik8.zip", sha1))
        self.patch(mock.patch.dict(chargpt.DATASETS, datasets),
                   mock.patch.dict(os.environ, MINGPT_CACHE=str(self.folder)))

    def test_each_is_downloaded_once(self):
        for _ in range(2):
            self.assertEqual(chargpt.find_text("tinyshakespeare"), self.TEXT)
            # The characters of enwik8 are bytes.
            text = chargpt.find_text("enwik8").encode("latin-1").decode()
            self.assertEqual(text, self.TEXT)
        self.assertEqual(len(self.requests), 2)

    def test_a_failed_download_leaves_nothing_and_the_next_call_recovers(self):
        for name, path in (("tinyshakespeare", "/input.txt"), ("enwik8", "/enwik8.zip")):
            good = self.files[path]
            wrong = [dict(body=b"something else")]
            by_hand = f"put the text at {re.escape(str(self.folder))}"
            for answers, error, words in (
                ([dict(status=500, body=b"")], OSError, by_hand),
                (wrong, ValueError, "wrong contents"),
                ([dict(good[0], send=50)], OSError, by_hand),
            ):
                self.files[path] = answers
                with self.assertRaisesRegex(error, words):
                    chargpt.find_text(name)
                self.assertEqual(list(self.folder.iterdir()), [])
            self.files[path] = good
            chargpt.find_text(name)
            (self.folder / name).unlink()
