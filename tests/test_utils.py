"""
Tests configuration, command lines, seeds, the log, eval mode, atomic files and scripts.

    python -m unittest tests/test_utils.py
"""

import builtins
import contextlib
import copy
import doctest
import importlib.util
import io
import json
import logging
import os
import random
import subprocess
import sys
import threading
import unittest
from unittest import mock

import numpy as np
import torch

from common import ROOT, Folder, close_log, run_here
from mingpt import utils
from mingpt.model import GPT
from mingpt.utils import (
    CN, CfgNode, cache_folder, check_config, eval_mode, fill_in, progress, replacing, run_script,
    set_seed, setup_logging,
)

logger = logging.getLogger("mingpt")


def get_config():
    C = CfgNode()
    C.seed = 1
    C.name = "x"  # of it
    C.path = None
    C.prompt = ""
    C.model = GPT.get_default_config()
    C.data = Sums.get_default_config()
    C.data.rate = 0.1  # the script's own words
    return C


class Numbers:
    @staticmethod
    def get_default_config():
        C = CfgNode()
        C.rate = 0.2  # the library's words
        C.steps = 5  # how many
        return C


class Sums(Numbers):
    @staticmethod
    def get_default_config():
        C = Numbers.get_default_config()
        C.betas = (0.9, 0.95)
        C.fast = False  # or slow
        C.device = "cpu"
        return C


def print_help(config, *args) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        config.merge_from_args([*args, "--help"])
    return printed.getvalue()


class Configuration(unittest.TestCase):
    def test_values_get_the_type_of_their_default(self):
        for arg, name, value in (
            ("--seed=7", "seed", 7), ("--seed=1e3", "seed", 1000), ("--seed=-2", "seed", -2),
            ("--name=7", "name", "7"), ("--name=None", "name", None), ("--name=", "name", ""),
            ("--prompt=2024", "prompt", "2024"), ("--prompt=None", "prompt", "None"),
            ('--prompt="def"', "prompt", '"def"'), ("--prompt=", "prompt", ""),
            ("--path=./out", "path", "./out"),
            ("--path=3", "path", 3), ("--path=1e3", "path", 1000), ("--path=a=b", "path", "a=b"),
            ("--data.fast=true", "data.fast", True), ("--data.fast=FALSE", "data.fast", False),
            ("--data.rate=1", "data.rate", 1.0), ("--data.rate=3e-4", "data.rate", 3e-4),
            ("--data.betas=[0.8,0.9]", "data.betas", (0.8, 0.9)),
            ("--data.device=cuda:0", "data.device", "cuda:0"),
            ("--data.device=./x", "data.device", "./x"),
        ):
            # --name=value and --name value
            for args in ([arg], arg.split("=", 1)):
                with self.subTest(args):
                    config = get_config()
                    config.merge_from_args(args)
                    self.assertEqual(config.fields(), get_config().fields() | {name: value})
                    self.assertIs(type(config.fields()[name]), type(value))

    def test_mistakes_are_named_and_change_nothing(self):
        for arg, message in (
            ("--data.stpes=3", "no setting --data.stpes; did you mean --data.steps\\?"),
            ("--sead=3", "mean --seed\\?"), ("seed=3", "no setting seed; did you mean --seed"),
            ("--n_head=3", "did you mean --model.n_head\\?"),
            ("--model.dropout=0", "did you mean --model.embd_pdrop, --model.resid_pdrop, --mod"),
            ("--data=3", "no setting --data"), ("-seed=3", "no setting -seed"),
            ("--seed", "got --seed without a value, expected --seed=value"),
            ("--seed=1e999", "type int"), ("--seed=x", "--seed takes a value of type int like"),
            ("--seed=1.5", "type int"), ("--seed=True", "type int"), ("--seed=None", "type int"),
            ("--data.rate=nan", "type float"),
            ("--data.fast=1", "type bool"), ("--data.betas=1", "type tuple"),
            ("--seed=__import__('os').getcwd()", "type int"),
        ):
            with self.subTest(arg[:80]):
                config = get_config()
                with self.assertRaisesRegex(ValueError, message):
                    config.merge_from_args(["--seed=9", arg])
                self.assertEqual(config.fields(), get_config().fields())

    def test_help_shows_defaults_and_comments(self):
        shown = print_help(get_config(), "--seed=2")
        for line in (
            "  --seed=1",
            "  --name=x                      of it",
            "  --path=",
            "  --data.rate=0.1               the script's own words",
            "  --data.betas=(0.9, 0.95)",
            "  --data.fast=False             or slow",
            "  --data.steps=5                how many",
        ):
            self.assertIn(line + "\n", shown + "\n")
        self.assertRegex(shown, r"--model\.n_layer= +\w")
        self.assertEqual(shown, print_help(get_config(), "-h"))

    def test_dictionaries(self):
        config = CN(seed=1, data=CN(steps=5, rate=0.1))
        config.merge_from_dict(dict(seed=3, new=4, data=dict(steps=6)))
        self.assertEqual(config.to_dict(), dict(seed=3, data=dict(steps=6, rate=0.1), new=4))
        self.assertEqual(str(config), "seed: 3\ndata:\n    steps: 6\n    rate: 0.1\nnew: 4")
        self.assertEqual(copy.deepcopy(config), config)
        config.merge_from_dict(dict(data=CN(lines=1)))
        self.assertEqual(config.data, CN(lines=1))

    def test_docstrings(self):
        self.assertEqual(doctest.testmod(utils).failed, 0)

    def test_check_config_names_field_value_and_expectation(self):
        rules = (("seed name", lambda v: v == 1, "one"), ("path", lambda v: v > 0, "more"))
        for changes, message in (
            (dict(seed=2), "got seed=2, expected one"), (dict(), "got name='x', expected one"),
            (dict(name=1), "got path=None, expected more"),
        ):
            config = get_config()
            config.merge_from_dict(changes)
            with self.assertRaisesRegex(ValueError, f"^{message}$"):
                check_config(config, rules)

    def test_a_field_that_says_nothing_is_warned_of(self):
        config = CfgNode(n_layers=3, dropout=0.1, lr=1, zzz=0, block_size=8)
        known = ("n_layer", "block_size", "embd_pdrop", "attn_pdrop", "learning_rate", "min_lr")
        with self.assertLogs("mingpt", "WARNING") as logged:
            fill_in(config, {}, known, "a test")
        self.assertEqual([record.getMessage() for record in logged.records], [
            "a test does not use n_layers; did you mean n_layer?",
            "a test does not use dropout; did you mean embd_pdrop, attn_pdrop?",
            "a test does not use lr; did you mean learning_rate?",
            "a test does not use zzz",
        ])

    def test_fill_in_completes_a_configuration_with_plain_numbers(self):
        config = CfgNode(rate=np.float64(0.5), steps=torch.tensor(3), betas=(0.9, 0.95))
        fill_in(config, dict(rate=0.1, seed=None), ("rate", "steps", "betas", "seed"), "a test")
        self.assertEqual(vars(config), dict(rate=0.5, seed=None, steps=3, betas=(0.9, 0.95)))
        self.assertEqual([type(config.rate), type(config.steps)], [float, int])


class Seeds(unittest.TestCase):
    def test_all_generators(self):
        def draw():
            return random.random(), np.random.rand(), torch.rand(()).item()

        set_seed(3)
        first = draw()
        self.assertNotEqual(draw(), first)
        set_seed(3)
        self.assertEqual(draw(), first)


class Modes(unittest.TestCase):
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
        entered = {net: threading.Event(), other: threading.Event()}

        def enter(module):
            with eval_mode(module):
                entered[module].set()

        threads = [threading.Thread(target=enter, args=[module]) for module in (net, other)]
        with eval_mode(net):
            for thread in threads:
                thread.start()
            self.assertTrue(entered[other].wait(60))
            self.assertFalse(entered[net].is_set())
        for thread in threads:
            thread.join()
        self.assertTrue(entered[net].is_set() and net.training)


class Log(Folder):
    def setUp(self):
        super().setUp()
        logger.setLevel(logging.INFO)
        self.addCleanup(logger.setLevel, logging.WARNING)
        self.addCleanup(close_log)
        self.config = CfgNode(seed=5, system=CfgNode(work_dir=str(self.folder / "a" / "b")))

    def read(self, name):
        return (self.folder / "a" / "b" / name).read_text(encoding="utf-8")

    def print_info(self, text="größe"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            logging.getLogger("mingpt.test").info(text)
        return printed.getvalue()

    def test_only_the_first_process_talks(self):
        # They may know their rank only after the import, as those of mp.spawn do.
        distributed = dict(is_initialized=lambda: True, get_rank=lambda: 1)
        self.assertEqual(self.print_info(), "größe\n")
        with mock.patch.dict(os.environ, RANK="1"):
            self.assertEqual(self.print_info(), "")
        with mock.patch.multiple(torch.distributed, **distributed):
            self.assertEqual(self.print_info(), "")
            setup_logging(self.config)
            self.assertFalse((self.folder / "a").exists())

    def test_a_logger_that_is_set_up_already_is_left_alone(self):
        own = logging.NullHandler()
        for handlers, level, expected in (
            ([own], logging.NOTSET, ["NullHandler"]), ([], logging.ERROR, []),
            ([], logging.NOTSET, ["_Console"]),
        ):
            with mock.patch.multiple(logger, handlers=list(handlers), level=level, propagate=True):
                spec = importlib.util.spec_from_file_location("fresh_utils", utils.__file__)
                spec.loader.exec_module(importlib.util.module_from_spec(spec))
                self.assertEqual([type(each).__name__ for each in logger.handlers], expected)
                self.assertEqual(logger.propagate, expected != ["_Console"])
                self.assertEqual(logger.level, level if logger.propagate else logging.INFO)

    def test_setup_logging(self):
        heard = io.StringIO()
        own = logging.StreamHandler(heard)
        logger.addHandler(own)
        setup_logging(self.config)
        earlier = logger.handlers[-1]
        # Twice logs each line once all the same, and closes the earlier file.
        setup_logging(self.config)
        self.assertIsNone(earlier.stream)
        self.assertIn(own, logger.handlers)
        self.assertEqual(self.print_info(), "größe\n")
        self.assertEqual((heard.getvalue(), self.read("log.txt")), ("größe\n", "größe\n"))
        self.assertEqual(json.loads(self.read("config.json"))["seed"], 5)
        self.assertEqual(len(self.read("args.txt").splitlines()), 2)

    def test_work_dir_may_begin_with_the_home_folder_and_may_not_be_empty(self):
        with mock.patch.dict(os.environ, HOME=str(self.folder), USERPROFILE=str(self.folder)):
            setup_logging(CfgNode(system=CfgNode(work_dir="~/a/b")))
        self.assertEqual(self.read("log.txt"), "")
        with self.assertRaisesRegex(ValueError, "empty work_dir"):
            setup_logging(CfgNode(system=CfgNode(work_dir="")))

    def test_a_reader_that_goes_away_ends_nothing(self):
        reader, writer = os.pipe()
        os.close(reader)
        closed = io.StringIO()
        closed.close()
        narrow = io.TextIOWrapper(io.BytesIO(), "ascii")
        setup_logging(self.config)
        pipe = open(writer, "w", encoding="utf-8")
        for stdout in (pipe, closed, None, narrow):
            with contextlib.redirect_stdout(stdout):
                logger.info("größe")
                logger.info("more")
                if stdout in (pipe, closed):
                    self.assertEqual(sys.stdout.name, os.devnull)
                    sys.stdout.close()
        with self.assertRaises(OSError):
            pipe.close()
        narrow.flush()
        self.assertEqual(narrow.buffer.getvalue().split(), [b"'gr\\xf6\\xdfe'", b"more"])
        self.assertEqual(self.read("log.txt"), "größe\nmore\n" * 4)

    def test_progress(self):
        real = builtins.__import__

        def without_tqdm(name, *args):
            return real("no_such_package" if name == "tqdm" else name, *args)

        self.assertEqual(list(progress(iter("abc"), "reading", 3)), list("abc"))
        # There may be no stderr, as under pythonw.
        with contextlib.redirect_stderr(None):
            self.assertTrue(progress("abc", "reading", 3).disable)
        with mock.patch("builtins.__import__", without_tqdm), self.assertLogs("mingpt") as logged:
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

    def test_replacing_is_all_or_nothing(self):
        path = self.folder / "file"
        with replacing(path) as part:
            part.write_text("old")
        with self.assertRaises(ZeroDivisionError), replacing(path) as part:
            part.write_text("half")
            1 / 0
        self.assertEqual((path.read_text(), list(self.folder.iterdir())), ("old", [path]))

    def test_leftovers_of_a_killed_writer_are_removed(self):
        for name in ("[a].1.tmp", "[a].22.tmp", "a.1.tmp"):
            (self.folder / name).write_text("half")
        with replacing(self.folder / "[a]") as part:
            part.write_text("new")
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["[a]", "a.1.tmp"])

    def test_an_error_of_the_system_names_the_file(self):
        # The error of a full disk names none.
        for error, name in ((OSError(28, "full"), "wanted"), (OSError(28, "full", "it"), "it")):
            with self.assertRaisesRegex(OSError, name), replacing(self.folder / "wanted"):
                raise error

    def test_cache_folder(self):
        home = dict(HOME=str(self.folder), USERPROFILE=str(self.folder))
        with mock.patch.dict(os.environ, home):
            os.environ.pop("MINGPT_CACHE", None)
            self.assertEqual(cache_folder(), self.folder / ".cache" / "mingpt")
            os.environ["MINGPT_CACHE"] = "~/x"
            self.assertEqual(cache_folder(), self.folder / "x")


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

    def test_runs_where_stdout_is_no_terminal(self):
        # A notebook's stdout has no `reconfigure`, pythonw's is None, a terminal may lack UTF-8.
        old = io.TextIOWrapper(io.BytesIO(), "ascii")
        for stdout in (io.StringIO(), None, old):
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
                with mock.patch.object(sys, "argv", ["a.py", "größe 🤗"]):
                    run_script(lambda args: print(*args))
                    with self.assertRaises(SystemExit):
                        run_script(lambda args: int(""))
        old.flush()
        self.assertTrue(old.buffer.getvalue().startswith(b"gr??e ?"))

    def test_help_into_a_pipe_that_nobody_reads(self):
        reader, writer = os.pipe()
        os.close(reader)
        script = "from mingpt.utils import *; run_script(CfgNode(seed=1).merge_from_args)"
        result = subprocess.run([sys.executable, "-c", script, "--help"], cwd=ROOT, stdout=writer,
                                stderr=subprocess.PIPE)
        os.close(writer)
        self.assertEqual((result.returncode, result.stderr), (0, b""))


if __name__ == "__main__":
    unittest.main()
