"""projects/chargpt: texts and their characters, training, samples, resume, the data sets."""

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
import torch

from common import ROOT, Folder, Server, run_forked, run_here
from mingpt.checkpoint import read_checkpoint

sys.path.insert(0, str(ROOT / "projects" / "chargpt"))
import chargpt

TINY = (
    "--data.path=in.txt", "--data.block_size=8", "--model.n_layer=1", "--model.n_head=1",
    "--model.n_embd=8", "--trainer.max_iters=2", "--trainer.eval_batches=1",
    "--system.length=4", "--system.work_dir=run", "--trainer.device=cpu",
)
SAMPLE = ("--system.mode=sample", "--system.work_dir=run", "--system.length=5")


class InFolder(Folder):
    """A test in a folder of its own, with a text in.txt."""

    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        self.write("in.txt", 'the "def" of 2024\n' * 40)
        self.patch(mock.patch.dict(os.environ, MINGPT_TRACEBACK=""))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def contents(self) -> dict:
        return {path: path.is_file() and path.read_bytes() for path in self.folder.rglob("*")}

    def runs(self, *args) -> str:
        status, printed, errors = run_here(chargpt.main, *args)
        self.assertEqual((status, errors), (0, ""), args)
        return printed

    def refused(self, message: str, *args) -> None:
        """One line says what is wrong, and no file has changed."""
        before = self.contents()
        with self.subTest(args=str(args)[-100:]):
            status, _, errors = run_here(chargpt.main, *args)
            self.assertEqual((status, errors.count("\n")), (2, 1), errors)
            self.assertRegex(errors, f"^error: .*{message}")
            self.assertEqual(self.contents(), before)


class Texts(InFolder):
    def test_a_text_is_places_in_its_characters_across_parts(self):
        text = "aé世🤗 \n" * 5
        self.patch(mock.patch.object(chargpt, "PART_CHARACTERS", 7))
        chars, tokens = chargpt.encode(text)
        self.assertEqual(chars, "\n aé世🤗")
        self.assertEqual(tokens.dtype, np.uint8)
        self.assertEqual("".join(chars[token] for token in tokens), text)

    def test_marks_and_line_ends_of_other_systems_are_no_characters(self):
        (self.folder / "in.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode())
        self.assertEqual(chargpt.find_text("in.txt"), "one\ntwo\n")

    def test_without_a_path_the_help_texts_of_python(self):
        self.assertIn("lambda", chargpt.find_text(""))

    def test_shares(self):
        tokens = np.arange(1000)
        for name, sizes in (("", [900, 100]), ("text8", [900, 50, 50])):
            parts = chargpt.split(tokens, name, block_size=8)
            self.assertEqual([len(part) for part in parts], sizes)
            self.assertEqual(np.concatenate(parts).tolist(), tokens.tolist())

    def test_the_least_length_that_is_named_suffices(self):
        for T in (1, 8, 13, 64):
            for name in ("", "text8"):
                with self.assertRaisesRegex(ValueError, "or more") as refused:
                    chargpt.split(np.arange(T), name, T)
                needed = int(re.search(r"expected ([\d,]+)", str(refused.exception))[1]
                             .replace(",", ""))
                parts = chargpt.split(np.arange(needed), name, T)
                self.assertGreater(min(map(len, parts)), T)

    def test_bytes_of_a_character(self):
        chars, tokens = chargpt.encode("aé世🤗")
        self.assertEqual(chargpt.count_bytes(chars, tokens, ""), (1 + 2 + 3 + 4) / 4)
        # The characters of enwik8 are bytes.
        self.assertEqual(chargpt.count_bytes(chars, tokens, "enwik8"), 1)


class Training(InFolder):
    def test_a_run_reports_nats_bits_and_bits_per_byte(self):
        self.write("in.txt", "Größe! 世界\n" * 100)
        with self.assertLogs("mingpt", "INFO") as logged:
            self.runs(*TINY)
        text = "\n".join(logged.output)
        self.assertIn("1,000 characters, 10 of them distinct; 900 to learn from", text)
        nats, bits, per_byte = map(float, re.search(
            r"all 100 characters: ([\d.]+) nats each, ([\d.]+) bits, ([\d.]+) bits per byte",
            text).groups())
        self.assertAlmostEqual(bits, nats / math.log(2), delta=2e-4)
        # 16 bytes for 10 characters
        self.assertAlmostEqual(per_byte, bits / 1.6, delta=2e-4)

    def test_it_learns(self):
        def losses(*args):
            with self.assertLogs("mingpt", "INFO") as logged:
                self.runs(*TINY, *args)
            return [float(loss) for loss in re.findall(r"  loss ([\d.]+)", "\n".join(logged.output))]
        first, *_, last = losses("--trainer.max_iters=60")
        self.assertLess(last, first - 1)

    def test_presets_replace_the_default_sizes(self):
        others = [arg for arg in TINY if not arg.startswith("--model")]
        for given in ((), ("--model.n_layer=3",)):
            self.runs(*others, "--model.model_type=gpt-nano", *given)
            config = read_checkpoint("run/checkpoint.pt")["model_config"]
            self.assertEqual([config[size] for size in ("n_layer", "n_head", "n_embd")], [3, 3, 48])
        self.refused("'gpt-nano' means n_layer=3, but n_layer=4", *others,
                     "--model.model_type=gpt-nano", "--model.n_layer=4")

    def test_what_is_refused(self):
        self.write("empty.txt", "")
        self.write("same.txt", "a" * 1000)
        self.write("short.txt", "ab" * 40)
        (self.folder / "latin.txt").write_bytes(b"good " * 99 + b"\xff")
        for arg, message in (
            ("--data.path=empty.txt", "0 distinct characters, expected two"),
            ("--data.path=same.txt", "1 distinct characters"),
            ("--data.path=short.txt", "got a text of 80 characters, expected 91 or more"),
            ("--data.path=latin.txt", "latin.txt is not UTF-8 text: byte 0xff at position 495"),
            ("--data.path=nothing.txt", "there is no text file nothing.txt"),
            ("--data.path=Text8", "did you mean text8"),
            ("--data.block_size=0", "block_size=0"),
            ("--data.block_size=1e12", "smaller block_size"),
            ("--model.n_head=3", "n_embd=8, expected a multiple of n_head=3"),
            ("--model.vocab_size=3", "no setting --model.vocab_size"),
            ("--trainer.momentum=1.0", "momentum=1.0"),
            ("--trainer.resume=True", "no checkpoint at run"),
            ("--system.mode=chat", "mode='chat', expected train or sample"),
            ("--system.length=-1", "length=-1"),
            ("--system.temperature=-1", "temperature=-1"),
            ("--system.prompt=xyz", "the prompt has 'x', 'y', 'z', which the model has never seen"),
        ):
            self.refused(message, *TINY, arg)

    @unittest.skipIf(os.name == "nt", "torch has no process groups with libuv there")
    def test_two_processes(self):
        printed = run_forked(chargpt.main, *TINY, count=2)
        self.assertEqual(printed.count("the model is in run"), 1)


class Samples(InFolder):
    def test_a_prompt_is_a_text_as_it_was_typed(self):
        self.runs(*TINY)
        for prompt, start in (("2024", "2024"), ('"def"', '"def"'), (r"of\nthe", "of\nthe"),
                              ("20", "20"), (r"\n", "\n")):
            printed = self.runs(*SAMPLE, "--system.prompt", prompt)
            self.assertTrue(printed.startswith(start), printed)
            self.assertEqual(len(printed), len(start) + 5 + 1)
        self.refused("the prompt has '🤗'", *SAMPLE, "--system.prompt=🤗")

    def test_the_checkpoint_is_all_it_needs(self):
        self.runs(*TINY, "--model.tie_weights=True")
        shown = self.runs(*SAMPLE)
        for path in (self.folder / "run").iterdir():
            if path.name != "checkpoint.pt":
                path.unlink()
        (self.folder / "in.txt").unlink()
        self.assertEqual(self.runs(*SAMPLE), shown)
        # Without a prompt it begins with a new line.
        self.assertEqual(shown[0], "\n")

    def test_a_text_without_a_new_line(self):
        (self.folder / "in.txt").write_bytes(rb"one\ntwo\n" * 60)
        self.runs(*TINY)
        self.assertEqual(self.runs(*SAMPLE)[0], "\\")

    def test_folders_without_such_a_model(self):
        self.refused("there is no model in nowhere", *SAMPLE, "--system.work_dir=nowhere")
        self.runs(*TINY)
        path = self.folder / "run" / "checkpoint.pt"
        content = torch.load(path, weights_only=True)
        del content["model"]["_extra_state"]
        torch.save(content, path)
        self.refused("checkpoint.pt is no model of this script", *SAMPLE)


class Resume(InFolder):
    def test_it_goes_on_as_if_it_had_never_stopped(self):
        self.runs(*TINY, "--trainer.max_iters=4", "--system.work_dir=whole")
        for args in (("--trainer.max_iters=3", "--trainer.lr_decay_iters=4"),
                     ("--trainer.max_iters=4",)):
            self.runs(*TINY, *args, "--trainer.resume=auto")
        whole, parts = (read_checkpoint(f"{name}/checkpoint.pt") for name in ("whole", "run"))
        self.assertEqual(parts["iter_num"], 4)
        for name, value in whole["model"].items():
            if name != "_extra_state":
                self.assertTrue(torch.equal(value, parts["model"][name]), name)

    def test_another_text_or_model_is_refused(self):
        self.runs(*TINY)
        # As many characters, but others.
        self.write("other.txt", 'thE "dEf" of 2024\n' * 40)
        self.write("more.txt", 'the "def" of 2024!\n' * 40)
        more = (*TINY, "--trainer.resume=True", "--trainer.max_iters=4")
        for arg, message in (
            ("--data.path=other.txt", "is a checkpoint of another model: _extra_state"),
            ("--data.path=more.txt", "another model"),
            ("--model.n_layer=2", "another model"),
            ("--trainer.optimizer=adamw", "another optimizer"),
            ("--trainer.max_iters=2", "has 2 steps already"),
            ("--system.prompt=xyz", "the prompt has"),
        ):
            self.refused(message, *more, arg)


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
            content = text.encode()
            address = "/input.txt"
            body = content
            if name != "tinyshakespeare":
                address = f"/{name}.zip"
                body = self.zip(name, content)
            self.files[address] = [dict(body=body)]
            datasets[name] = (self.address + address, hashlib.sha1(content).hexdigest())
        self.patch(mock.patch.dict(chargpt.DATASETS, datasets),
                   mock.patch.dict(os.environ, MINGPT_CACHE=str(self.folder)))

    def zip(self, name: str, content: bytes) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)
        return file.getvalue()

    def test_each_is_downloaded_once(self):
        expected = self.TEXTS | {"enwik8": self.TEXTS["enwik8"].encode().decode("latin-1")}
        for name, text in expected.items():
            self.assertEqual(chargpt.find_text(name), text)
        self.requests.clear()
        self.assertEqual(chargpt.find_text("text8"), expected["text8"])
        self.assertEqual(self.requests, [])
        self.assertEqual({path.name for path in self.folder.iterdir()}, set(expected))

    def test_a_failed_download_leaves_nothing_and_the_next_call_recovers(self):
        good = self.files["/text8.zip"][0]
        other = self.zip("text8", b"something else")
        for answer, error in (
            (dict(status=500, body=b""), OSError),
            (dict(body=b"no archive"), ValueError),
            (dict(body=other), ValueError),
            (dict(body=good["body"][:60]), ValueError),
            (dict(good, send=50, ranges=False), OSError),
        ):
            self.files["/text8.zip"] = [answer]
            with self.assertRaises(error):
                chargpt.find_text("text8")
            self.assertEqual(list(self.folder.iterdir()), [])
        self.files["/text8.zip"] = [good]
        self.assertEqual(chargpt.find_text("text8"), self.TEXTS["text8"])


if __name__ == "__main__":
    unittest.main()
