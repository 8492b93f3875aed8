"""
Both notebooks, from top to bottom and without a network: they print the outputs they show.

    python -m unittest tests.test_notebooks
"""

import os
import re
import subprocess
from unittest import mock

import nbclient
import nbformat

from common import ROOT, Folder, tiny_config, vocabulary_folder
from mingpt.model import GPT
from mingpt.utils import set_seed


def read(name: str):
    return nbformat.read(ROOT / name, as_version=4)


def printed(notebook) -> str:
    """Returns all that the code cells of a notebook have printed."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


class Notebooks(Folder):
    def execute(self, name: str, **environment) -> str:
        """Runs a notebook in a kernel of its own and returns all that it printed."""
        notebook = read(name)
        places = {variable: str(self.folder) for variable in
                  ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR")}
        settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                    "HF_ENDPOINT": "http://127.0.0.1:9"}
        with mock.patch.dict(os.environ, places | settings | environment):
            nbclient.NotebookClient(
                notebook, timeout=240, kernel_name="python3",
                resources={"metadata": {"path": str(self.folder)}},
                # The kernel warns that it talks over a port of this machine.
            ).execute(stderr=subprocess.DEVNULL)
        return printed(notebook)

    def test_demo_learns_to_sort_and_its_outputs_are_those_of_now(self):
        now = self.execute("demo.ipynb")
        right, total = map(int, re.search(r"held out: (\d+) of (\d+) lists sorted", now).groups())
        self.assertEqual(total, 180)
        self.assertGreaterEqual(right, 170)
        # The first loss comes from one forward pass: its fourth digit may vary.
        losses = [re.search(r"loss\D*(\d+\.\d+)", text)[1]
                  for text in (now, printed(read("demo.ipynb")))]
        self.assertAlmostEqual(float(losses[0]), float(losses[1]), delta=1.5e-4)

    def test_generate_with_a_model_in_a_folder(self):
        set_seed(1)
        GPT(tiny_config(vocab_size=50257, block_size=64)).save_pretrained(self.folder / "model")
        now = self.execute("generate.ipynb", MINGPT_MODEL=str(self.folder / "model"),
                           MINGPT_CACHE=str(vocabulary_folder()))
        self.assertIn("parameters", now)

    def test_both_are_stored_with_their_outputs(self):
        for name in ("demo.ipynb", "generate.ipynb"):
            cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
            outputs = [output for cell in cells for output in cell.outputs]
            self.assertTrue(any("image/png" in output.get("data", {}) for output in outputs), name)
            self.assertFalse(any(output.output_type == "error" for output in outputs), name)
            self.assertEqual([cell.execution_count for cell in cells],
                             list(range(1, len(cells) + 1)), name)
