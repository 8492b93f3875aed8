"""
The scripts of the projects, run as a user runs them: help, a mistake, a toy run, a real start.

    python -m unittest tests.test_projects

What a project computes is tested in its own file.
"""

import importlib.util
import json
import logging
import os
import sys
import unittest
from unittest import mock

from common import ROOT, Folder, run_here, run_python

PROJECTS = ROOT / "projects"
# All that a user starts with arguments.
SCRIPTS = [path.relative_to(PROJECTS).as_posix() for path in sorted(PROJECTS.rglob("*.py"))
           if "run_script(main)" in path.read_text(encoding="utf-8")]


def load(name: str):
    """Imports a script by its path in projects/, with the files beside it to be imported."""
    path = PROJECTS / name
    spec = importlib.util.spec_from_file_location(f"projects_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module


class Projects(Folder):
    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        self.patch(mock.patch.dict(os.environ, MINGPT_TRACEBACK="", MINGPT_CACHE="cache"))


class Scripts(Projects):
    def test_all_are_here(self):
        for name in ("adder/adder.py", "chargpt/chargpt.py", "chat/chat.py", "pixels/pixels.py",
                     "finetune/finetune.py", "bench/bench.py", "plot.py"):
            self.assertIn(name, SCRIPTS)

    def test_help(self):
        for name in SCRIPTS:
            with self.subTest(name):
                module = load(name)
                status, printed, errors = run_here(module.main, "--help")
                self.assertEqual((status, errors), (0, ""))
                get_config = getattr(module, "get_config", None)
                fields = get_config().fields() if get_config else {}
                for field in fields:
                    self.assertIn(f"  --{field}=", printed)
                for line in printed.splitlines():
                    self.assertLessEqual(len(line), 100)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_mistake_is_one_line_and_nothing_is_begun(self):
        for name in SCRIPTS:
            module = load(name)
            if not hasattr(module, "get_config"):
                continue
            arguments = {"--no.such=1": "there is no setting --no.such"}
            if "trainer.max_iters" in module.get_config().fields():
                arguments |= {
                    "--trainer.max_iters=many": "--trainer.max_iters takes a value of type int",
                    "--trainer.max_iters": "without a value",
                    "--trainer.max_iter=5": "did you mean --trainer.max_iters",
                }
            for argument, message in arguments.items():
                with self.subTest(name, argument=argument):
                    status, printed, errors = run_here(module.main, argument)
                    self.assertEqual((status, printed, errors.count("\n")), (2, "", 1))
                    self.assertRegex(errors, f"^error: .*{message}")
                    self.assertEqual(list(self.folder.iterdir()), [])

    def test_each_says_how_it_is_run(self):
        for name in SCRIPTS:
            text = (PROJECTS / name).read_text(encoding="utf-8")
            docstring = text.split('"""')[1]
            self.assertIn(f"    python projects/{name}", docstring)
            self.assertNotIn("sys.path", text)

    def test_a_real_start(self):
        # From another folder, as a user may do it.
        result = run_python(PROJECTS / "adder" / "adder.py", "--data.ndigit=1",
                            "--trainer.max_iters=2", "--system.work_dir=out", cwd=self.folder)
        self.assertIn("step      2  loss", result.stdout)
        log = (self.folder / "out" / "log.txt").read_text(encoding="utf-8")
        self.assertTrue(result.stdout.endswith(log))
        result = run_python(PROJECTS / "adder" / "adder.py", "--data.ndigits=1", check=False)
        self.assertEqual((result.returncode, result.stdout), (2, ""))
        self.assertRegex(result.stderr, "^error: there is no setting --data.ndigits; .*\n$")


class ToyRuns(Projects):
    """Scripts that have no tests of their own."""

    def runs(self, name, *args) -> str:
        level = mock.patch.object(logging.getLogger("mingpt"), "level", logging.INFO)
        with level:
            status, printed, errors = run_here(load(name).main, *args)
        self.assertEqual((status, errors), (0, ""))
        return printed

    def test_plot(self):
        rows = [dict(iteration=1, split="train", loss=2.0, lr=1e-3),
                dict(iteration=2, split="train", loss=None, lr=1e-3),
                dict(iteration=2, split="val", loss=1.5)]
        text = "\n".join(map(json.dumps, rows)) + '\n{"iteration": 3, "spl'
        for name in ("a.jsonl", "b.jsonl"):
            (self.folder / name).write_text(text, encoding="utf-8")
        self.runs("plot.py", "a.jsonl")
        self.runs("plot.py", "a.jsonl", "b.jsonl", "--out", "both.png")
        for name in ("a.png", "both.png"):
            self.assertTrue((self.folder / name).read_bytes().startswith(b"\x89PNG"))
        (self.folder / "bad.jsonl").write_text("{}\n", encoding="utf-8")
        status, _, errors = run_here(load("plot.py").main, "bad.jsonl")
        self.assertEqual((status, errors.count("\n")), (2, 1))
        self.assertIn("bad.jsonl has no row with a loss", errors)

    def test_inside_the_adder(self):
        self.runs("adder/adder.py", "--data.ndigit=1", "--trainer.max_iters=2")
        self.assertIn("block 1, head 1", self.runs("adder/inside.py"))


if __name__ == "__main__":
    unittest.main()
