"""
Tests what surrounds the code: version, requirements, types, and the files of a distribution.

    python -m unittest tests/test_package.py
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import unittest

import mingpt
from common import ROOT, Folder, run_python

HAS_SETUPTOOLS = importlib.util.find_spec("setuptools") is not None

# Parts of torch that mypy need not read: with them it takes three times as long.
UNREAD = ("_decomp", "_dynamo", "_export", "_functorch", "_higher_order_ops", "_inductor", "_prims",
          "_refs", "_subclasses", "ao", "distributed", "export", "fx", "onnx", "testing")
MYPY_CONFIG = f"""
[mypy]
[mypy-sympy.*,huggingface_hub.*,{",".join(f"torch.{name}.*" for name in UNREAD)}]
follow_imports = skip
"""

USER = """
import torch
from mingpt.model import GPT
from mingpt.trainer import Trainer


class Mine(GPT):
    pass


config = GPT.get_default_config()
idx = torch.zeros(1, 1, dtype=torch.long)
reveal_type(GPT(config).generate(idx, 5))
reveal_type(Mine.from_pretrained("gpt2"))
reveal_type(Trainer(config, GPT(config), []).run())
"""


def imported(nodes) -> set[str]:
    """Returns the packages that some nodes of a syntax tree import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


class Code(Folder):
    def test_requirements_are_what_is_imported(self):
        text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
        names = re.findall(r"^\w+", text, re.MULTILINE)
        self.assertEqual(sorted(names), ["numpy", "regex", "requests", "torch"])
        known = {*sys.stdlib_module_names, *names, "mingpt"}
        # Functions import these, with an error that says what to install; the last is for mypy.
        extras = {"tqdm", "huggingface_hub", "safetensors", "typing_extensions"}
        for path in sorted((ROOT / "mingpt").glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            self.assertLessEqual(imported(tree.body), known, path.name)
            self.assertLessEqual(imported(ast.walk(tree)), known | extras, path.name)

    def test_the_encoder_stands_alone(self):
        tree = ast.parse((ROOT / "mingpt" / "bpe.py").read_text(encoding="utf-8"))
        self.assertNotIn("mingpt", imported(ast.walk(tree)))

    @unittest.skipUnless(importlib.util.find_spec("mypy"), "mypy is not installed")
    def test_types_are_right_and_reach_the_user(self):
        user = self.folder / "user.py"
        user.write_text(USER, encoding="utf-8")
        config = self.folder / "mypy.ini"
        config.write_text(MYPY_CONFIG, encoding="utf-8")
        shown = run_python("-m", "mypy", "--config-file", config, f"--cache-dir={os.devnull}",
                           "mingpt", user, cwd=ROOT, check=False).stdout
        revealed = re.findall(r'Revealed type is "(.+)"', shown)
        self.assertEqual(revealed, ["torch._tensor.Tensor", "user.Mine", "None"], shown)
        self.assertIn("Success: no issues found", shown)


@unittest.skipUnless(HAS_SETUPTOOLS, "setuptools is not installed")
class Distribution(Folder):
    def test_source_distribution_has_all_that_its_tests_need(self):
        run_python("setup.py", "-q", "egg_info", f"--egg-base={self.folder}",
                   "sdist", f"--dist-dir={self.folder}", cwd=ROOT)
        with tarfile.open(next(self.folder.glob("*.tar.gz"))) as archive:
            members = {name.partition("/")[2]: name for name in archive.getnames()}
            description = archive.extractfile(members["PKG-INFO"]).read().decode("utf-8")
        wanted = subprocess.run(
            ["git", "ls-files", "mingpt", "projects", "tests", "*.ipynb", "*.txt", "*.md", "LICENSE",
             "setup.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
        wanted += ["mingpt/model.py", "mingpt/py.typed", "projects/adder/adder.py",
                   "tests/common.py", "demo.ipynb", "requirements.txt"]
        self.assertEqual(set(wanted) - members.keys(), set())

        # An index page shows the readme, without the files that it leads to.
        self.assertIn(f"Version: {mingpt.__version__}\n", description)
        self.assertIn("# minGPT", description)
        self.assertEqual(re.findall(r"\]\((?!https?://|#)[^)]*\)|<img", description), [])

    def test_the_installed_files_are_typed_and_work_alone(self):
        run_python("setup.py", "-q", "egg_info", f"--egg-base={self.folder}",
                   "build", f"--build-base={self.folder}/build", f"--build-lib={self.folder}/lib",
                   cwd=ROOT)
        built = self.folder / "lib" / "mingpt"
        names = sorted(path.name for path in built.iterdir())
        source = sorted(path.name for path in (ROOT / "mingpt").glob("*.py"))
        self.assertEqual([name for name in names if name.endswith(".py")], source)
        self.assertIn("py.typed", names)

        modules = ", ".join(f"mingpt.{name[:-3]}" for name in source if name != "__init__.py")
        script = f"import {modules}; print(mingpt.__version__, mingpt.__file__)"
        shown = run_python("-W", "error", "-c", script, cwd=self.folder, PYTHONPATH=str(built.parent))
        self.assertEqual(shown.stdout.split(), [mingpt.__version__, str(built / "__init__.py")])


if __name__ == "__main__":
    unittest.main()
