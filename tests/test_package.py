"""The surroundings of the code: requirements, types, and the files of a distribution."""

import ast
import importlib.util
import os
import re
import shutil
import sys
import tarfile
import unittest

import mingpt
from common import ROOT, Folder, run_python

# Parts of torch that mypy need not read: it is three times as fast without.
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
        # Functions import these, with an error that says what to install; the
        # last is for mypy.
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


@unittest.skipUnless(importlib.util.find_spec("setuptools"), "setuptools is not installed")
class Distribution(Folder):
    def setup(self, *args) -> None:
        # setuptools writes into the folder of setup.py.
        copied = self.folder / "copy"
        # Beside the folders an environment of some gigabytes may stand.
        ignore = shutil.ignore_patterns("out", "__pycache__")
        for name in ("mingpt", "projects", "tests"):
            shutil.copytree(ROOT / name, copied / name, ignore=ignore)
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, copied)
        run_python("setup.py", "-q", "egg_info", f"--egg-base={self.folder}", *args, cwd=copied)

    def test_a_source_distribution_has_all_that_its_tests_need(self):
        self.setup("sdist", f"--dist-dir={self.folder}")
        with tarfile.open(next(self.folder.glob("*.tar.gz"))) as archive:
            members = {name.partition("/")[2]: name for name in archive.getnames()}
            description = archive.extractfile(members["PKG-INFO"]).read().decode("utf-8")
        wanted = {path.relative_to(ROOT).as_posix() for folder in ("mingpt", "projects", "tests")
                  for path in (ROOT / folder).rglob("*.py")}
        wanted |= {"mingpt/py.typed", "mingpt/recipes.md", "demo.ipynb", "generate.ipynb",
                   "projects/finetune/austen/model.safetensors", "requirements.txt", "LICENSE"}
        self.assertEqual(wanted - members.keys(), set())

        # An index page shows the readme, without the files that it leads to.
        self.assertIn(f"Version: {mingpt.__version__}\n", description)
        self.assertIn("# minGPT", description)
        self.assertEqual(re.findall(r"\]\((?!https?://|#)[^)]*\)|<img", description), [])

    def test_the_installed_files_are_typed_and_work_alone(self):
        library = self.folder / "lib"
        self.setup("build", f"--build-base={self.folder}/build", f"--build-lib={library}")
        self.assertTrue((library / "mingpt" / "py.typed").exists())
        names = sorted(path.stem for path in (ROOT / "mingpt").glob("[a-z]*.py"))
        modules = ", ".join(f"mingpt.{name}" for name in names)
        script = f"import {modules}; print(mingpt.__version__, mingpt.__file__)"
        shown = run_python("-W", "error", "-c", script, cwd=self.folder, PYTHONPATH=str(library))
        expected = [mingpt.__version__, str(library / "mingpt" / "__init__.py")]
        self.assertEqual(shown.stdout.split(), expected)
