"""Configuration, logging, files and downloads."""

import contextlib
import doctest
import hashlib
import io
import json
import logging
import os
import random
import re
import unittest
from unittest import mock

import numpy as np
import torch

from common import Folder, Server
from mingpt import utils
from mingpt.utils import CfgNode, Progress, download, find_repository, format_time, read_text, replacing, set_seed, setup_logging


def example():
    return CfgNode(seed=1, name="x", path=None, trainer=CfgNode(rate=0.1, steps=5, betas=(0.9, 0.95), fast=False, device="cpu"))


class Config(unittest.TestCase):
    def test_values_get_the_type_of_their_default(self):
        for arg, name, value in (
            ("--seed=7", "seed", 7), ("--name=7", "name", "7"), ("--name=None", "name", None), ("--name=", "name", ""),
            ("--path=./out", "path", "./out"), ("--path=3", "path", 3), ("--path=a=b", "path", "a=b"),
            ("--trainer.rate=1", "trainer.rate", 1.0), ("--trainer.rate=3e-4", "trainer.rate", 3e-4),
            ("--trainer.betas=[0.8,0.9]", "trainer.betas", (0.8, 0.9)), ("--trainer.fast=True", "trainer.fast", True),
            ("--trainer.device=cuda:0", "trainer.device", "cuda:0"), ("--trainer.device=./x", "trainer.device", "./x"),
        ):
            with self.subTest(arg):
                config = example()
                config.merge_from_args([arg])
                self.assertEqual(config.fields(), example().fields() | {name: value})
                self.assertIs(type(config.fields()[name]), type(value))

    def test_mistakes_are_named_and_change_nothing(self):
        for arg, message in (
            ("--trainer.stpes=3", "--trainer.stpes; did you mean --trainer.steps"), ("--sead=3", "did you mean --seed"),
            ("--trainer=3", "no setting --trainer;"), ("seed=3", "expected --name=value"), ("--seed", "expected --name=value"),
            ("--seed=x", "--seed takes a value of type int"), ("--seed=1.5", "type int"), ("--seed=True", "type int"),
            ("--trainer.fast=1", "type bool"), ("--trainer.rate=fast", "type float"), ("--trainer.betas=1", "type tuple"),
            ("--seed=None", "type int"), ("--seed=__import__('os').getcwd()", "type int"),
        ):
            with self.subTest(arg):
                config = example()
                with self.assertRaisesRegex(ValueError, message):
                    config.merge_from_args(["--seed=9", arg])
                self.assertEqual(config.fields(), example().fields())

    def test_help_prints_every_field_and_its_default(self):
        for flag in ("--help", "-h"):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), self.assertRaises(SystemExit) as left:
                example().merge_from_args(["--seed=2", flag])
            self.assertFalse(left.exception.code)
            for line in ("--seed=1", "--name=x", "--path=", "--trainer.rate=0.1", "--trainer.betas=(0.9, 0.95)"):
                self.assertIn(line, printed.getvalue())

    def test_dictionaries(self):
        config = example()
        config.merge_from_dict(dict(seed=3, new=4, trainer=dict(steps=6)))
        self.assertEqual((config.seed, config.new, config.trainer.steps, config.trainer.rate), (3, 4, 6, 0.1))
        self.assertEqual(config.to_dict()["trainer"]["steps"], 6)
        self.assertIn("trainer.steps = 6", str(config))

    def test_docstrings(self):
        self.assertEqual(doctest.testmod(utils).failed, 0)
        self.assertEqual([format_time(seconds) for seconds in (0, 59.6, 75, 3661)], ["0:00", "1:00", "1:15", "1:01:01"])


class Seeds(unittest.TestCase):
    def test_all_generators(self):
        draw = lambda: (random.random(), np.random.rand(), torch.rand(()).item())
        set_seed(3)
        first = draw()
        self.assertNotEqual(draw(), first)
        set_seed(3)
        self.assertEqual(draw(), first)


class Files(Folder):
    def test_setup_logging(self):
        config = example()
        config.system = CfgNode(work_dir=str(self.folder / "a" / "b"))
        self.addCleanup(logging.getLogger("mingpt").handlers.clear)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            for _ in range(2): # twice logs each line once all the same
                setup_logging(config)
            logging.getLogger("mingpt.test").info("größe")
        self.assertEqual(printed.getvalue(), "größe\n")
        self.assertEqual((self.folder / "a/b/log.txt").read_text(encoding="utf-8"), "größe\n")
        self.assertEqual(json.loads((self.folder / "a/b/config.json").read_text(encoding="utf-8"))["trainer"]["steps"], 5)
        self.assertTrue((self.folder / "a/b/args.txt").read_text(encoding="utf-8").strip())
        for handler in logging.getLogger("mingpt").handlers:
            handler.close()

    def test_replacing_is_all_or_nothing(self):
        path = self.folder / "file"
        with replacing(path) as part:
            part.write_text("old")
        with self.assertRaises(ZeroDivisionError), replacing(path) as part:
            part.write_text("half")
            1 / 0
        self.assertEqual((path.read_text(), list(self.folder.iterdir())), ("old", [path]))

    def test_read_text(self):
        text = "a€🤗\r\nß" * 100
        (self.folder / "x").write_bytes(text.encode())
        for size in (1, 2, 3, 5, 7, 1000, 10 ** 6):
            self.assertEqual("".join(read_text(self.folder / "x", size)), text)
        for content, message in ((b"abc\xffd", "0xff at position 3"), ("é".encode() + b"\xe2\x82x", "0xe2 at position 2"),
                                 (b"abcd\xf0\x9f", "0xf0 at position 4")):
            (self.folder / "x").write_bytes(content)
            for size in (1, 2, 3, 100):
                with self.assertRaisesRegex(ValueError, message):
                    list(read_text(self.folder / "x", size))

    def test_progress(self):
        for terminal, unit, clock, expected in (
                (True, "bytes", [0, 1, 4, 4.1, 5], "\rf: 2.0 MB, 0.5 MB/s, 50%, 0:04 left @\rf: 4.0 MB, 0.8 MB/s, 100%, 0:00 left @\n"),
                (True, "bytes", [0, 1, 1.5, 1.6, 1.9], ""),
                (False, "bytes", [0, 1, 4, 5, 9], ""),
                (False, "examples", [0, 9, 10, 19, 20], "f: 2,000,000 examples, 200,000/s, 50%, 0:10 left\n"
                                                         "f: 4,000,000 examples, 200,000/s, 100%, 0:00 left\n")):
            shown = io.StringIO()
            shown.isatty = lambda: terminal
            with mock.patch("sys.stderr", shown), mock.patch("mingpt.utils.time.monotonic", side_effect=clock):
                progress = Progress("f", 4_000_000, unit=unit)
                for done in (1_000_000, 2_000_000, 3_000_000, 4_000_000):
                    progress.update(done)
            self.assertEqual(re.sub(" {2,}", " @", shown.getvalue()), expected)


class Download(Server):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "sub" / "file"
        self.body = random.Random(1).randbytes(500_000)
        self.sha256 = hashlib.sha256(self.body).hexdigest()

    def get(self, *answers, **options):
        self.files["/file"] = list(answers)
        return download(self.address + "/file", self.path, **options)

    def kept(self):
        return sorted(path.name for path in self.path.parent.iterdir())

    def test_plain(self):
        self.assertEqual(self.get(dict(body=self.body)).read_bytes(), self.body)
        self.assertEqual(self.kept(), ["file"])

    def test_resumes_in_the_next_call(self):
        with self.assertRaisesRegex(OSError, "could not download"):
            self.get(dict(body=self.body, send=200_000), dict(body=self.body, hang=2), sha256=self.sha256)
        self.assertEqual(self.kept(), ["file.part"])
        self.requests.clear()
        self.assertEqual(self.get(dict(body=self.body), sha256=self.sha256).read_bytes(), self.body)
        self.assertRegex(self.requests[0][1], r"bytes=[1-9]\d*-")
        self.assertEqual(self.kept(), ["file"])

    def test_resumes_with_the_digest_that_a_hub_sends(self):
        headers = {"X-Linked-Etag": f'"{self.sha256}"'}
        self.get(dict(body=self.body, send=200_000, headers=headers), dict(body=self.body, headers=headers))
        self.assertEqual(self.path.read_bytes(), self.body)
        self.assertEqual(len([begin for _, begin in self.requests if begin]), 1)

    def test_without_a_digest_it_starts_over(self):
        self.get(dict(body=b"x" * 500_000, send=200_000), dict(body=self.body))
        self.assertEqual(self.path.read_bytes(), self.body)

    def test_a_part_of_another_file_is_found_out(self):
        self.path.parent.mkdir()
        self.path.with_name("file.part").write_bytes(b"y" * 1000)
        with self.assertRaisesRegex(ValueError, "wrong contents"):
            self.get(dict(body=self.body), sha256=self.sha256)
        self.assertEqual(self.kept(), [])
        self.assertEqual(self.get(dict(body=self.body), sha256=self.sha256).read_bytes(), self.body)

    def test_a_part_longer_than_the_file(self):
        self.path.parent.mkdir()
        self.path.with_name("file.part").write_bytes(b"y" * 600_000)
        self.assertEqual(self.get(dict(body=self.body), sha256=self.sha256).read_bytes(), self.body)

    def test_wrong_size_wrong_digest_of_the_hub_wrong_content(self):
        def check(path):
            raise ValueError("of no use")
        for answer, options, message in (
            (dict(body=self.body, headers={"Content-Length": "600000"}), {}, "could not download"),
            (dict(body=self.body, headers={"X-Linked-Etag": '"' + "0" * 64 + '"'}), {}, "wrong contents"),
            (dict(body=self.body), dict(check=check), "of no use"),
        ):
            with self.subTest(message), self.assertRaisesRegex((OSError, ValueError), message):
                self.get(answer, **options)
            self.assertEqual(self.kept(), [])

    def test_status(self):
        with self.assertRaises(FileNotFoundError):
            download(self.address + "/nothing", self.path)
        with self.assertRaisesRegex(OSError, "403"):
            self.get(dict(body=b"", status=403))
        self.assertEqual(self.kept(), [])


class Repository(Folder):
    def test_names_cannot_leave_the_cache(self):
        with mock.patch.dict(os.environ, MINGPT_CACHE=str(self.folder), HF_ENDPOINT="http://hub/"):
            folder, address = find_repository("owner/model-1.3B")
            self.assertEqual((folder, address), (self.folder / "owner" / "model-1.3B", "http://hub/owner/model-1.3B/resolve/main/"))
            for name in ("../no-such-model", "no-such/..", "no-such/../model", "/etc/no-such-model", "no/such/model", "no-such", "", "./no-such", "a/.b", "a\\..\\b", "a/b?c", "a/b\n", "C:/x"):
                with self.subTest(name), self.assertRaisesRegex(ValueError, "neither a folder"):
                    find_repository(name)

    def test_a_folder_is_taken_as_it_is(self):
        self.assertEqual(find_repository(str(self.folder)), (self.folder, None))


if __name__ == "__main__":
    unittest.main()
