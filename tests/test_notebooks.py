"""Both notebooks, from top to bottom."""

import os
import tempfile
import unittest
from unittest import mock

import nbclient
import nbformat

from common import ROOT, tiny_config, vocabulary_folder
from mingpt.model import GPT
from mingpt.utils import set_seed

def execute(name: str, **environment) -> list[str]:
    """Runs a notebook and returns what each of its code cells printed."""
    notebook = nbformat.read(ROOT / name, as_version=4)
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", **environment}):
        nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]


class Notebooks(unittest.TestCase):
    def test_demo_sorts_every_held_out_list(self):
        printed = "".join(execute("demo.ipynb"))
        self.assertIn("549 lists to learn from, 180 held out", printed)
        self.assertIn("held out: 180 of 180 lists sorted without a mistake", printed)

    def test_generate_with_a_model_in_a_folder(self):
        set_seed(1)
        with tempfile.TemporaryDirectory() as folder:
            GPT(tiny_config(vocab_size=50257, block_size=64)).save_pretrained(folder)
            printed = execute("generate.ipynb", MINGPT_MODEL=folder, MINGPT_CACHE=str(vocabulary_folder()), HF_ENDPOINT="http://127.0.0.1:9")
        self.assertIn("0.8M parameters", printed[0])
        self.assertEqual(printed[1].count("And the king said unto"), 3)

    def test_both_are_stored_with_their_outputs(self):
        for name in ("demo.ipynb", "generate.ipynb"):
            notebook = nbformat.read(ROOT / name, as_version=4)
            outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
            self.assertTrue(any("image/png" in output.get("data", {}) for output in outputs), name)
            self.assertFalse(any(output.output_type == "error" for output in outputs), name)


if __name__ == "__main__":
    unittest.main()
