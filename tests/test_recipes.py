"""
Every recipe of mingpt/recipes.md runs as it stands there, and does what it says.

    python -m unittest tests.test_recipes
"""

import contextlib
import copy
import functools
import io
import json
import os
import re
from types import SimpleNamespace
from unittest import mock

import torch

from common import ROOT, WorkingFolder, close_log, uses_cache, vocabulary_folder

TEXT = (ROOT / "mingpt" / "recipes.md").read_text(encoding="utf-8")
BEGINNING, *SECTIONS = TEXT.split("\n## ")
RECIPES = {section.splitlines()[0]: section for section in SECTIONS}
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROWS = [f"Text number {i} says é.\n" for i in range(9)]


@functools.cache
def run_recipe(title: str, part: int) -> SimpleNamespace:
    """Runs a recipe after the common beginning; returns its names, and what it `printed`.

    `first` is a copy of the model before the recipe.
    """
    torch.manual_seed(0)
    names = {}
    # Fewer tokens, so that an epoch is short.
    exec(CODE.findall(BEGINNING)[0].replace("range(500)", "range(120)"), names)
    names["first"] = copy.deepcopy(names["model"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(CODE.findall(RECIPES[title])[part], title, "exec"), names)
    return SimpleNamespace(**names, printed=printed.getvalue())


class Recipes(WorkingFolder):
    def setUp(self):
        super().setUp()
        environment = dict(MINGPT_CACHE=str(vocabulary_folder()), MPLBACKEND="Agg")
        self.patch(mock.patch.dict(os.environ, environment))
        self.addCleanup(close_log)
        text = "\n".join(json.dumps({"text": row}) for row in ROWS)
        (self.folder / "texts.jsonl").write_text(text, encoding="utf-8")

    def test_each_runs_and_has_at_most_ten_lines(self):
        for title, section in RECIPES.items():
            for part, code in enumerate(CODE.findall(section)):
                with self.subTest(title, part=part):
                    run_recipe(title, part)
                    self.assertLessEqual(len(list(filter(str.strip, code.splitlines()))), 10)

    def test_texts_of_a_jsonl_file_are_the_tokens(self):
        r = run_recipe("jsonl and Hugging Face datasets", 0)
        expected = "".join(f"{row}<|endoftext|>" for row in ROWS)
        self.assertEqual(r.encoder.decode(r.tokens), expected)

    def test_three_epochs_are_three_times_the_examples(self):
        r = run_recipe("Epochs", 0)
        self.assertFalse(r.trainer.config.replacement)
        self.assertEqual(r.trainer.steps_done, -(-3 * len(r.train_dataset) // 8))

    def test_rates_of_your_own_are_used(self):
        r = run_recipe("A schedule of the learning rate", 1)
        rates = [group["lr"] for group in r.trainer.optimizer.param_groups]
        self.assertEqual(rates, [3e-4 / 20 ** 0.5] * 2)

    def test_padding_changes_no_loss(self):
        r = run_recipe("Padding", 0)
        r.model.eval()
        total = 0
        for row in r.rows:
            _, loss = r.model(torch.tensor([row[:-1]]), torch.tensor([row[1:]]))
            total += loss * (len(row) - 1)
        torch.testing.assert_close(r.model(r.x, r.y)[1], total / 6)

    def test_attention_weights_and_hidden_states_are_of_each_block(self):
        r = run_recipe("Attention weights and hidden states", 0)
        self.assertEqual([state.shape for state in r.states], [(1, 4, 48)] * 3)
        torch.testing.assert_close(torch.stack(r.weights).sum(-1), torch.ones(3, 1, 3, 4))

    def test_lora_trains_its_low_rank_matrices_alone(self):
        r = run_recipe("LoRA", 0)
        first = r.first.state_dict()
        for name, weight in r.model.state_dict().items():
            before = first.get(name.replace("c_attn.0", "c_attn"))
            if before is None:
                self.assertRegex(name, r"c_attn\.[12]\.weight$")
                self.assertGreater(weight.abs().sum(), 0)
            else:
                self.assertTrue(weight.equal(before), name)

    def test_parts_of_your_own_keep_the_cache(self):
        idx = torch.tensor([[1, 2, 3]])
        for title in ("LoRA", "Another activation", "A block of your own"):
            with self.subTest(title):
                model = run_recipe(title, 0).model
                self.assertTrue(uses_cache(model))
                plain = model.generate(idx, 9, use_cache=False)
                self.assertTrue(model.generate(idx, 9).equal(plain))

    def test_the_log_probability_of_a_text(self):
        r = run_recipe("The log-probability of a text", 0)
        _, loss = r.model(r.idx[:, :-1], r.idx[:, 1:])
        self.assertAlmostEqual(float(r.printed.split()[0]), -4 * loss.item(), 4)

    def test_gradient_checkpointing_changes_no_gradient(self):
        r = run_recipe("Gradient checkpointing", 0)
        x, y = (part[None] for part in r.train_dataset[0])
        r.first.load_state_dict(r.model.state_dict())
        for model in (r.model, r.first):
            model.eval().zero_grad()
            model(x, y)[1].backward()
        for ours, theirs in zip(r.model.parameters(), r.first.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad)
