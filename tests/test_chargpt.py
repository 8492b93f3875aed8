"""projects/chargpt: texts and their characters, bits per byte, samples, the data sets."""

import hashlib
import io
import math
import os
import re
import sys
import unittest
import zipfile
from unittest import mock

import numpy as np

from common import ROOT, Server, WorkingFolder, run_here
from mingpt.checkpoint import read_checkpoint

sys.path.insert(0, str(ROOT / "projects" / "chargpt"))
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
        for T in (1, 8, 13, 64):
            with self.assertRaisesRegex(ValueError, "or more") as refused:
                chargpt.split(np.arange(T), "", T)
            least = re.search(r"expected ([\d,]+)", str(refused.exception))[1].replace(",", "")
            parts = chargpt.split(np.arange(int(least)), "", T)
            self.assertGreater(min(map(len, parts)), T)

    def test_bytes_of_a_character(self):
        chars, tokens = chargpt.encode("aé世🤗")
        self.assertEqual(chargpt.count_bytes(chars, tokens, ""), (1 + 2 + 3 + 4) / 4)
        # The characters of enwik8 are bytes.
        self.assertEqual(chargpt.count_bytes(chars, tokens, "enwik8"), 1)


class Runs(WorkingFolder):
    def setUp(self):
        super().setUp()
        self.write("in.txt", 'the "def" of 2024\n' * 40)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def times(self) -> dict:
        """Returns when each file was written."""
        return {path: path.stat().st_mtime_ns for path in self.folder.rglob("*")}

    def runs(self, *args) -> str:
        status, printed, errors = run_here(chargpt.main, *args)
        self.assertEqual((status, errors), (0, ""), args)
        return printed

    def refused(self, message: str, *args) -> None:
        """One line says what is wrong, and no file has changed."""
        before = self.times()
        with self.subTest(args=str(args)[-100:]):
            status, _, errors = run_here(chargpt.main, *args)
            self.assertEqual((status, errors.count("\n")), (2, 1), errors)
            self.assertRegex(errors, f"^error: .*{message}")
            self.assertEqual(self.times(), before)

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
        self.refused("'gpt-nano' means n_layer=3, but n_layer=4", *others,
                     "--model.model_type=gpt-nano", "--model.n_layer=4")

    def test_a_prompt_is_a_text_as_it_was_typed_and_the_checkpoint_is_all_it_needs(self):
        self.runs(*TINY, "--model.tie_weights=True")
        (self.folder / "in.txt").unlink()
        (self.folder / "run" / "config.json").unlink()
        for prompt, start in (("2024", "2024"), ('"def"', '"def"'), (r"of\nthe", "of\nthe"),
                              ("20", "20"), ("", "\n")):
            printed = self.runs(*SAMPLE, "--system.prompt", prompt)
            self.assertTrue(printed.startswith(start), printed)
            self.assertEqual(len(printed), len(start) + 5 + 1)
        self.refused("the prompt has '🤗', which the model has never seen", *SAMPLE,
                     "--system.prompt=🤗")

    def test_what_is_refused(self):
        self.write("same.txt", "a" * 1000)
        self.write("other.txt", 'thE "dEf" of 2024\n' * 40)
        for message, *args in (
            ("1 distinct characters, expected two", "--data.path=same.txt"),
            ("there is no text file Text8; did you mean text8", "--data.path=Text8"),
            ("mode='chat', expected train or sample", "--system.mode=chat"),
            ("there is no model in run; train one first", *SAMPLE),
        ):
            self.refused(message, *TINY, *args)
        self.runs(*TINY)
        # The other text has as many characters.
        for message, *args in (
            ("is a checkpoint of another model: _extra_state", "--data.path=other.txt"),
            ("another model", "--model.n_layer=2"),
            ("has 2 steps already", "--trainer.max_iters=2"),
            ("the prompt has 'x', 'y', 'z'", "--system.prompt=xyz"),
        ):
            self.refused(message, *TINY, "--trainer.resume=True", "--trainer.max_iters=4", *args)


class DataSets(Server):
    """tinyshakespeare, text8 and enwik8 from a server on this machine."""

    TEXTS = {
        "tinyshakespeare": "To be, or not to be\n" * 50,
        "text8": " anarchism originated as a term" * 50,
        "enwik8": "<page>Größe 世界</page>\n" * 50,
    }

    def setUp(self):
        super().setUp()
        datasets = {}
        for name, text in self.TEXTS.items():
            body = text.encode()
            address = f"{self.address}/{name}"
            sha1 = hashlib.sha1(body).hexdigest()
            if name != "tinyshakespeare":
                address += ".zip"
                body = self.zip(name, body)
            self.files[address.removeprefix(self.address)] = [dict(body=body)]
            datasets[name] = (address, sha1)
        self.patch(mock.patch.dict(chargpt.DATASETS, datasets),
                   mock.patch.dict(os.environ, MINGPT_CACHE=str(self.folder)))

    def zip(self, name: str, content: bytes) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)
        return file.getvalue()

    def test_each_is_downloaded_once(self):
        # The characters of enwik8 are bytes.
        expected = self.TEXTS | {"enwik8": self.TEXTS["enwik8"].encode().decode("latin-1")}
        for _ in range(2):
            for name, text in expected.items():
                self.assertEqual(chargpt.find_text(name), text)
        self.assertEqual(len(self.requests), 3)

    def test_a_failed_download_leaves_nothing_and_the_next_call_recovers(self):
        good = self.files["/text8.zip"][0]
        for answer, error in (
            (dict(status=500, body=b""), OSError),
            (dict(body=b"no archive"), ValueError),
            (dict(body=self.zip("text8", b"something else")), ValueError),
            (dict(good, send=50), OSError),
        ):
            self.files["/text8.zip"] = [answer]
            with self.assertRaises(error):
                chargpt.find_text("text8")
            self.assertEqual(list(self.folder.iterdir()), [])
        self.files["/text8.zip"] = [good]
        self.assertEqual(chargpt.find_text("text8"), self.TEXTS["text8"])


if __name__ == "__main__":
    unittest.main()
