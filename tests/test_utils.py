"""
Configuration, seeds, the log, eval mode, files that are complete or absent, scripts.

    python -m unittest tests/test_utils.py
"""

import concurrent.futures
import contextlib
import doctest
import importlib.util
import io
import json
import logging
import os
import random
import sys
import unittest
from unittest import mock

import numpy as np
import torch

from common import Folder, close_log, run_here
from mingpt import utils
from mingpt.utils import (
    CfgNode, eval_mode, fill_in, progress, replacing, run_script, set_seed, setup_logging,
)

logger = logging.getLogger("mingpt")


class Numbers:
    @staticmethod
    def get_default_config():
        C = CfgNode()
        C.rate = 0.2  # the library's words
        C.n_head = 5  # of each block, in words that do not fit into a line of a terminal
        C.betas = (0.9, 0.95)
        return C


def get_config():
    C = CfgNode()
    C.seed = 1
    C.name = "x"
    C.path = None
    C.fast = False
    C.data = Numbers.get_default_config()
    C.data.rate = 0.1  # the script's words
    return C


class Configuration(unittest.TestCase):
    def test_values_get_the_type_of_their_default(self):
        for arg, value in (
            ("--seed=-2", -2), ("--seed=1e3", 1000), ("--name=7", "7"), ("--name=None", None),
            ("--name=", ""), ('--name="a"', '"a"'), ("--path=./out", "./out"), ("--path=3", 3),
            ("--path=a=b", "a=b"), ("--fast=true", True), ("--fast=FALSE", False),
            ("--fast=1", True), ("--data.rate=1", 1.0), ("--data.rate=3e-4", 3e-4),
            ("--data.betas=[1,2]", (1, 2)),
        ):
            name = arg.split("=")[0].removeprefix("--")
            # --name=value and --name value
            for args in ([arg], arg.split("=", 1)):
                with self.subTest(args):
                    config = get_config()
                    config.merge_from_args(args)
                    self.assertEqual(config.fields(), get_config().fields() | {name: value})
                    self.assertIs(type(config.fields()[name]), type(value))

    def test_a_field_may_be_called_fields(self):
        config = CfgNode(fields=1, data=CfgNode(fields=2))
        config.merge_from_args(["--fields=3", "--data.fields=4"])
        self.assertEqual(config.to_dict(), {"fields": 3, "data": {"fields": 4}})

    def test_a_mistake_is_named_and_changes_nothing(self):
        for arg, message in (
            ("--data.n_heads=3", "no setting --data.n_heads \\(did you mean data.n_head\\?\\); "),
            ("--n_head=3", "did you mean data.n_head\\?"), ("-seed=3", "got -seed=3, expected --"),
            ("data.n_head=3", "got data.n_head=3, expected --name=value"),
            ("--lr=3", "no setting --lr"), ("--data=3", "no setting --data"),
            ("--name", "--name without a value"), ("--seed=x", "--seed takes .* type int"),
            ("--seed=1.5", "type int"), ("--seed=None", "type int"), ("--fast=2", "type bool"),
            ("--data.rate=nan", "type float"), ("--seed=print(1)", "type int"),
        ):
            with self.subTest(arg):
                config = get_config()
                # Another option is no value.
                for args in (["--seed=9", arg], [arg, "--seed=9"]):
                    with self.assertRaisesRegex(ValueError, message):
                        config.merge_from_args(args)
                self.assertEqual(config, get_config())

    def test_help_shows_defaults_and_comments(self):
        status, shown, _ = run_here(lambda args: get_config().merge_from_args(args), "--help")
        self.assertEqual((status, shown.splitlines()[2:]), (0, [
            "  --seed=1", "  --name=x", "  --path=", "  --fast=False",
            "  --data.rate=0.1               the script's words",
            "  --data.n_head=5               of each block, in words that do not fit into a",
            "                                line of a terminal",
            "  --data.betas=(0.9, 0.95)",
        ]))

    def test_dictionaries_are_merged(self):
        config = CfgNode(seed=1, data=CfgNode(steps=5, rate=0.1))
        config.merge_from_dict(dict(seed=3, new=4, data=dict(steps=6)))
        self.assertEqual(config.to_dict(), dict(seed=3, data=dict(steps=6, rate=0.1), new=4))

    def test_a_configuration_may_be_a_key(self):
        first = CfgNode(seed=1)
        names = {first: "first", CfgNode(seed=2): "second"}
        first.seed = 3
        self.assertEqual(names[first], "first")

    def test_docstrings(self):
        self.assertEqual(doctest.testmod(utils).failed, 0)

    def test_fill_in_completes_converts_and_warns(self):
        shape = torch.Size([2, 3])
        config = CfgNode(rate=np.float64(0.5), betas=(np.float64(0.9), 0.95), lr=1, dropout=0.1,
                         shape=shape)
        defaults = dict(rate=0.1, betas=None, shape=None, seed=None, embd_pdrop=0.2,
                        attn_pdrop=0.3, learning_rate=0.4)
        with self.assertLogs("mingpt", "WARNING") as logged:
            fill_in(config, defaults, "a test")
        self.assertEqual(vars(config), defaults | dict(
            rate=0.5, betas=(0.9, 0.95), lr=1, dropout=0.1, shape=shape))
        self.assertIs(config.shape, shape)
        self.assertEqual([type(config.rate), type(config.betas[0])], [float, float])
        self.assertEqual([record.getMessage() for record in logged.records], [
            "a test does not use lr (did you mean learning_rate?), "
            "dropout (did you mean embd_pdrop, attn_pdrop?)"])


class SeedsAndModes(unittest.TestCase):
    def test_a_seed_is_for_all_generators(self):
        drawn = []
        for _ in range(2):
            set_seed(np.int64(3))
            drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        self.assertEqual(*drawn)

    def test_eval_mode_puts_each_module_back(self):
        net = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
        net[1].eval()
        before = [module.training for module in net.modules()]
        # A callback may nest them.
        with self.assertRaises(ZeroDivisionError), eval_mode(net), eval_mode(net):
            self.assertFalse(any(module.training for module in net.modules()))
            1 / 0
        self.assertEqual([module.training for module in net.modules()], before)

    def test_threads_take_turns_at_one_model_only(self):
        net = torch.nn.Dropout()
        other = torch.nn.Dropout()

        def enter(module):
            with eval_mode(module):
                return True

        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            with eval_mode(net):
                waiting = threads.submit(enter, net)
                self.assertTrue(threads.submit(enter, other).result(timeout=60))
                self.assertFalse(waiting.done())
        self.assertTrue(waiting.result() and net.training)


class Log(Folder):
    def setUp(self):
        super().setUp()
        logger.setLevel(logging.INFO)
        self.addCleanup(logger.setLevel, logging.WARNING)
        self.addCleanup(close_log)
        self.config = CfgNode(seed=5, system=CfgNode(work_dir=str(self.folder / "a" / "b")))

    def read(self, name):
        return (self.folder / "a" / "b" / name).read_text(encoding="utf-8")

    def print_info(self):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            logging.getLogger("mingpt.test").info("größe")
        return printed.getvalue()

    def test_only_the_first_process_talks(self):
        self.assertEqual(self.print_info(), "größe\n")
        with mock.patch.dict(os.environ, RANK="1"):
            self.assertEqual(self.print_info(), "")
            setup_logging(self.config)
        self.assertFalse((self.folder / "a").exists())

    def test_a_logger_that_is_set_up_already_is_left_alone(self):
        for level, expected in ((logging.ERROR, []), (logging.NOTSET, ["_Console"])):
            with mock.patch.multiple(logger, handlers=[], level=level, propagate=True):
                spec = importlib.util.spec_from_file_location("fresh_utils", utils.__file__)
                spec.loader.exec_module(importlib.util.module_from_spec(spec))
                self.assertEqual([type(each).__name__ for each in logger.handlers], expected)

    def test_a_second_run_logs_each_line_once(self):
        own = logging.NullHandler()
        logger.addHandler(own)
        for _ in range(2):
            setup_logging(self.config)
        self.assertIn(own, logger.handlers)
        self.assertEqual(self.print_info(), "größe\n")
        self.assertEqual(self.read("log.txt"), "größe\n")
        self.assertEqual(json.loads(self.read("config.json"))["seed"], 5)
        self.assertEqual(len(self.read("args.txt").splitlines()), 2)

    @unittest.skipUnless(os.name == "posix", "other systems name files in Unicode")
    def test_a_name_that_is_no_utf8_is_logged(self):
        with mock.patch.object(sys, "argv", ["a.py", "caf\udce9"]):
            setup_logging(self.config)
            with contextlib.redirect_stdout(None):
                logger.info(sys.argv[1])
        self.assertIn(b"caf\xe9", (self.folder / "a" / "b" / "args.txt").read_bytes())
        self.assertEqual(self.read("log.txt"), "caf\\udce9\n")

    def test_a_reader_that_goes_away_ends_nothing(self):
        reader, writer = os.pipe()
        os.close(reader)
        setup_logging(self.config)
        pipe = open(writer, "w", encoding="utf-8")
        closed = io.StringIO()
        closed.close()
        # The last is a terminal without UTF-8.
        for stdout in (pipe, closed, None, io.TextIOWrapper(io.BytesIO(), "ascii")):
            with contextlib.redirect_stdout(stdout):
                logger.info("größe")
                if stdout in (pipe, closed):
                    # It leads nowhere now.
                    sys.stdout.close()
        with self.assertRaises(OSError):
            pipe.close()
        self.assertEqual(self.read("log.txt"), "größe\n" * 4)

    def test_progress_needs_neither_tqdm_nor_stderr(self):
        with contextlib.redirect_stderr(None):
            self.assertEqual(list(progress(iter("abc"), "reading", 3)), list("abc"))
        with mock.patch.dict(sys.modules, tqdm=None), self.assertLogs("mingpt") as logged:
            self.assertEqual(list(progress(iter("abc"), "reading", 3)), list("abc"))
        self.assertIn("reading", logged.output[0])


class Files(Folder):
    def test_the_bytes_are_on_the_disk_before_the_name(self):
        done = []
        fsync = mock.patch("os.fsync", side_effect=lambda number: done.append("disk"))
        rename = mock.patch("os.replace", side_effect=lambda *paths: done.append("name"))
        with fsync, rename, replacing(self.folder / "file") as part:
            part.write_text("text", encoding="utf-8")
        self.assertEqual(done, ["disk", "name"])

    def test_a_file_is_complete_or_absent(self):
        path = self.folder / "[a]"
        # A killed writer of this file, and of another one.
        for name in ("[a].1.tmp", "a.1.tmp", "[a].txt.tmp"):
            (self.folder / name).write_text("half")
        with replacing(path) as part:
            part.write_text("old")
        with self.assertRaises(ZeroDivisionError), replacing(path) as part:
            part.write_text("half")
            1 / 0
        self.assertEqual(path.read_text(), "old")
        self.assertEqual(sorted(os.listdir(self.folder)), ["[a]", "[a].txt.tmp", "a.1.tmp"])

    def test_an_error_of_the_system_names_the_file(self):
        # The error of a full disk names none.
        for error, name in ((OSError(28, "full"), "wanted"), (OSError(28, "full", "it"), "it")):
            with self.assertRaisesRegex(OSError, name), replacing(self.folder / "wanted"):
                raise error


class Scripts(unittest.TestCase):
    def raise_in_main(self, error):
        def main(args):
            raise error
        return run_here(main)

    def test_an_error_of_the_user_is_one_line(self):
        for error, line in (
            (ValueError("got x,\n   expected y"), "got x, expected y"),
            (FileNotFoundError(2, "No such file", "a"), "[Errno 2] No such file: 'a'"),
            (ImportError("No module named 'a'"), "No module named 'a'"),
        ):
            self.assertEqual(self.raise_in_main(error), (2, "", f"error: {line}\n"))
            with mock.patch.dict(os.environ, MINGPT_TRACEBACK="1"), self.assertRaises(type(error)):
                self.raise_in_main(error)
        # Only we can get this wrong.
        with self.assertRaises(ZeroDivisionError):
            self.raise_in_main(ZeroDivisionError())
        self.assertEqual(self.raise_in_main(KeyboardInterrupt()), (130, "", ""))

    def test_it_runs_where_stdout_is_no_terminal(self):
        # A notebook's stdout has no `reconfigure`, pythonw's is None, a
        # terminal may lack UTF-8.
        old = io.TextIOWrapper(io.BytesIO(), "ascii")
        for stdout in (io.StringIO(), None, old):
            with contextlib.redirect_stdout(stdout):
                run_script(lambda args: print("größe 🤗"))
        old.flush()
        self.assertTrue(old.buffer.getvalue().startswith(b"gr??e ?"))
