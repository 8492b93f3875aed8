"""What surrounds the code: its version, its types, the source distribution that is made of it."""

import ast
import importlib.util
import re
import subprocess
import sys
import tarfile
import unittest

import mingpt
from common import ROOT, Folder, run_python

def imported(nodes) -> set[str]:
    """The packages that some nodes of a syntax tree import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


class Package(Folder):
    def test_version(self):
        shown = run_python("setup.py", "--version", cwd=ROOT).stdout.split()
        self.assertEqual(shown[-1], mingpt.__version__)
        self.assertRegex(mingpt.__version__, r"^\d+\.\d+\.\d+$")

    def test_requirements_are_what_is_imported(self):
        names = re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
        self.assertEqual(sorted(names), ["numpy", "regex", "requests", "torch"])
        known = {*sys.stdlib_module_names, *names, "mingpt"}
        extras = {"tqdm", "huggingface_hub", "safetensors"} # in the function that needs them, with an error that says what to install
        for path in sorted((ROOT / "mingpt").glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            self.assertLessEqual(imported(tree.body), known, path.name)
            self.assertLessEqual(imported(ast.walk(tree)), known | extras, path.name)

    @unittest.skipUnless(importlib.util.find_spec("mypy"), "mypy is not installed")
    def test_types(self):
        result = run_python("-m", "mypy", "mingpt", cwd=ROOT, check=False) # some 20 s, a second once its cache is there
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    @unittest.skipUnless(importlib.util.find_spec("setuptools"), "setuptools is not installed")
    def test_source_distribution_has_all_that_its_tests_need(self):
        run_python("setup.py", "-q", "egg_info", f"--egg-base={self.folder}", "sdist", f"--dist-dir={self.folder}", cwd=ROOT)
        with tarfile.open(next(self.folder.glob("*.tar.gz"))) as archive:
            held = {name.partition("/")[2] for name in archive.getnames()}
        wanted = subprocess.run(["git", "ls-files", "mingpt", "projects", "tests", "*.ipynb", "*.txt", "README.md", "LICENSE", "setup.py"],
                                cwd=ROOT, capture_output=True, text=True).stdout.split()
        wanted = wanted or ["mingpt/model.py", "projects/adder/adder.py", "tests/common.py", "demo.ipynb", "requirements.txt"]
        self.assertLessEqual(set(wanted), held)


if __name__ == "__main__":
    unittest.main()
