"""Configuration, command lines, the log, eval mode, files that appear whole, scripts that end with one line."""

import builtins
import contextlib
import doctest
import io
import json
import logging
import os
import random
import unittest
from unittest import mock

import numpy as np
import torch

from common import Folder, close_log, run_python
from mingpt import utils
from mingpt.utils import CfgNode, check_config, eval_mode, progress, replacing, set_seed, setup_logging


def example():
    return CfgNode(seed=1, name="x", path=None, prompt="", trainer=CfgNode(rate=0.1, steps=5, betas=(0.9, 0.95), fast=False, device="cpu"))


class Config(unittest.TestCase):
    def test_values_get_the_type_of_their_default(self):
        for arg, name, value in (
            ("--seed=7", "seed", 7), ("--name=7", "name", "7"), ("--name=None", "name", None), ("--name=", "name", ""),
            ("--prompt=2024", "prompt", "2024"), ('--prompt="def"', "prompt", '"def"'), ("--prompt=None", "prompt", "None"), ("--prompt=", "prompt", ""),
            ("--path='a'", "path", "'a'"), ("--path=1e3", "path", 1000), ("--seed=1e3", "seed", 1000), ("--seed=-2", "seed", -2),
            ("--trainer.fast=true", "trainer.fast", True), ("--trainer.fast=FALSE", "trainer.fast", False),
            ("--path=./out", "path", "./out"), ("--path=3", "path", 3), ("--path=a=b", "path", "a=b"),
            ("--trainer.rate=1", "trainer.rate", 1.0), ("--trainer.rate=3e-4", "trainer.rate", 3e-4),
            ("--trainer.betas=[0.8,0.9]", "trainer.betas", (0.8, 0.9)), ("--trainer.fast=True", "trainer.fast", True),
            ("--trainer.device=cuda:0", "trainer.device", "cuda:0"), ("--trainer.device=./x", "trainer.device", "./x"),
        ):
            for args in ([arg], arg.split("=", 1)): # --name=value, --name value
                with self.subTest(args):
                    config = example()
                    config.merge_from_args(args)
                    self.assertEqual(config.fields(), example().fields() | {name: value})
                    self.assertIs(type(config.fields()[name]), type(value))

    def test_mistakes_are_named_and_change_nothing(self):
        for arg, message in (
            ("--trainer.stpes=3", "--trainer.stpes; did you mean --trainer.steps"), ("--sead=3", "did you mean --seed"),
            ("--trainer=3", "no setting --trainer;"), ("seed=3", "no setting seed; did you mean --seed"), ("--seed", "got --seed without a value, expected --seed=value"),
            ("--seed=1e999", "type int"), ("--seed=1.5e0", "type int"), ("--trainer.rate=1e999", "type float"), ("--trainer.rate=nan", "type float"),
            ("--trainer.rate=" + "9" * 400, "type float"), ("--seed=" + "9" * 5000, "type int"), ("--seed=" + "(" * 100_000, "type int"),
            ("--seed=" + "-" * 100_000 + "1", "type int"), ("--trainer.betas=" + "[" * 500 + "]" * 500, "type tuple"), ("-seed=3", "no setting -seed"),
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

    def test_check_config_names_field_value_and_expectation(self):
        rules = (("seed name", lambda v: v == 1, "one"), ("path", lambda v: v > 0, "more"))
        for changes, message in ((dict(seed=2), "got seed=2, expected one"), (dict(), "got name='x', expected one"), (dict(name=1), "got path=None, expected more")):
            config = example()
            config.merge_from_dict(changes)
            with self.assertRaisesRegex(ValueError, f"^{message}$"):
                check_config(config, rules)


class Seeds(unittest.TestCase):
    def test_all_generators(self):
        draw = lambda: (random.random(), np.random.rand(), torch.rand(()).item())
        set_seed(3)
        first = draw()
        self.assertNotEqual(draw(), first)
        set_seed(3)
        self.assertEqual(draw(), first)


class Modes(unittest.TestCase):
    def test_eval_mode_puts_each_module_back(self):
        model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.ReLU()))
        model[1].eval()
        before = [module.training for module in model.modules()]
        with self.assertRaises(ZeroDivisionError), eval_mode(model):
            self.assertFalse(any(module.training for module in model.modules()))
            with eval_mode(model): # a callback may do so
                pass
            1 / 0
        self.assertEqual([module.training for module in model.modules()], before)


class Log(Folder):
    LINES = "import logging, mingpt.utils; logging.getLogger('mingpt.x').info('größe'); logging.getLogger('mingpt').debug('no')"

    def test_speaks_by_default_once_and_can_be_silenced(self):
        self.assertEqual(run_python("-c", self.LINES).stdout, "größe\n")
        self.assertEqual(run_python("-c", "import logging; logging.basicConfig(level=0); " + self.LINES).stdout, "größe\n")
        quiet = "import logging; logging.getLogger('mingpt').setLevel(logging.WARNING)"
        self.assertEqual(run_python("-c", f"import mingpt.model; {quiet}; {self.LINES}").stdout, "")
        self.assertEqual(run_python("-c", self.LINES, RANK="1").stdout, "") # of several processes the first speaks

    def test_setup_logging(self):
        config = example()
        config.system = CfgNode(work_dir=str(self.folder / "a" / "b"))
        logger, printed = logging.getLogger("mingpt"), io.StringIO()
        logger.setLevel(logging.INFO)
        self.addCleanup(logger.setLevel, logging.WARNING)
        own = logging.StreamHandler(heard := io.StringIO()) # of the user
        logger.addHandler(own)
        with contextlib.redirect_stdout(printed):
            setup_logging(config)
            earlier = logger.handlers[-1]
            setup_logging(config) # twice logs each line once all the same
            self.assertIsNone(earlier.stream) # closed
            logging.getLogger("mingpt.test").info("größe")
        self.assertIn(own, logger.handlers)
        self.assertEqual(heard.getvalue(), "größe\n")
        close_log()
        self.assertEqual(printed.getvalue(), "größe\n")
        self.assertEqual((self.folder / "a/b/log.txt").read_text(encoding="utf-8"), "größe\n")
        self.assertEqual(json.loads((self.folder / "a/b/config.json").read_text(encoding="utf-8"))["trainer"]["steps"], 5)
        self.assertEqual(len((self.folder / "a/b/args.txt").read_text(encoding="utf-8").splitlines()), 2) # each command line
        config.system.work_dir = ""
        with self.assertRaisesRegex(ValueError, "empty work_dir"):
            setup_logging(config)

    def test_progress(self):
        self.assertEqual(list(progress(iter("abc"), "reading", 3)), list("abc"))
        real = builtins.__import__
        without = lambda name, *args: real("no_such_package" if name == "tqdm" else name, *args)
        with mock.patch("builtins.__import__", without), self.assertLogs("mingpt", "INFO") as logged:
            self.assertEqual(list(progress(iter("abc"), "reading", 3)), list("abc"))
        self.assertIn("reading", logged.output[0])


class Files(Folder):
    def test_replacing_is_all_or_nothing(self):
        path = self.folder / "file"
        with replacing(path) as part:
            part.write_text("old")
        with self.assertRaises(ZeroDivisionError), replacing(path) as part:
            part.write_text("half")
            1 / 0
        self.assertEqual((path.read_text(), list(self.folder.iterdir())), ("old", [path]))

    def test_what_a_kill_left_is_removed(self):
        for name in ("file.1.tmp", "file.22.tmp", "file2.1.tmp"):
            (self.folder / name).write_text("half")
        with replacing(self.folder / "file") as part:
            part.write_text("new")
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["file", "file2.1.tmp"])

    @unittest.skipUnless(os.path.exists("/dev/full"), "this system has no disk that is always full")
    def test_a_full_disk_is_named_with_the_file(self):
        with self.assertRaisesRegex(OSError, "No space left.*wanted.bin"), replacing(self.folder / "wanted.bin") as part:
            part.write_text("")
            with open("/dev/full", "w") as full:
                full.write("x" * 100_000)


class Scripts(Folder):
    def run_main(self, body, **options):
        (self.folder / "script.py").write_text(f"from mingpt.utils import run_script\ndef main(args):\n    {body}\nrun_script(main)\n", encoding="utf-8")
        return run_python(self.folder / "script.py", "a", "b", check=False, **options)

    def test_what_a_user_can_get_wrong_is_one_line(self):
        for body, line in (("raise ValueError('got x,\\n   expected y')", "error: got x, expected y"), ("open('nothing')", "error: [Errno 2] No such file or directory: 'nothing'"),
                           ("import no_such_package", "error: No module named 'no_such_package'")):
            result = self.run_main(body)
            self.assertEqual((result.returncode, result.stderr, result.stdout), (2, line + "\n", ""))
            self.assertIn("Traceback", self.run_main(body, MINGPT_TRACEBACK="1").stderr)
        self.assertIn("Traceback", self.run_main("1 / 0").stderr) # what only we can get wrong
        self.assertEqual(self.run_main("print(args)").stdout, "['a', 'b']\n")
        result = self.run_main("raise KeyboardInterrupt")
        self.assertEqual((result.returncode, result.stderr), (130, ""))

    def test_a_terminal_without_utf8(self):
        result = self.run_main("print('größe 🤗')", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
        self.assertEqual((result.returncode, result.stdout), (0, "gr??e ?\n"))


if __name__ == "__main__":
    unittest.main()
