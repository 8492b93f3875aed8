"""Every recipe of mingpt/recipes.md runs as it stands there, and does what it says.

    python -m unittest tests.test_recipes
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import unittest
from unittest import mock

import torch

from common import ROOT, Folder, close_log, vocabulary_folder
from mingpt.generation import can_cache
from mingpt.model import GPT

TEXT = (ROOT / "mingpt" / "recipes.md").read_text(encoding="utf-8")
BEGINNING, *SECTIONS = TEXT.split("\n## ")
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ORDER = """Save and load weights, Your own dataset, Validation, Another tokenizer, Losses as a plot,
jsonl and Hugging Face datasets, Epochs, A schedule of the learning rate, Padding, A classifier,
Stop at a token, Another loss term, Attention weights and hidden states, LoRA, Triples and dicts,
Another activation, Another optimizer, The log-probability of a text, Gradient checkpointing,
A block of your own""".replace("\n", " ").split(", ")


class Recipes(Folder):
    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        environment = dict(MINGPT_CACHE=str(vocabulary_folder()), MPLBACKEND="Agg")
        self.patch(mock.patch.dict(os.environ, environment))
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        self.addCleanup(close_log)

    def run_recipe(self, title: str, part: int = 0, before: str = "") -> dict:
        """Runs a recipe after the common beginning; returns its names and what it prints."""
        section = next(section for section in SECTIONS if section.startswith(title + "\n"))
        names: dict = {}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            for code in (CODE.findall(BEGINNING)[0], before, CODE.findall(section)[part]):
                exec(compile(code, title, "exec"), names)
        return names | {"printed": printed.getvalue()}

    def check_generation(self, model: GPT):
        """Generation with the cache gives the tokens that it gives without."""
        self.assertTrue(can_cache(model))
        idx = torch.tensor([[1, 2, 3]])
        self.assertTrue(model.generate(idx, 9).equal(model.generate(idx, 9, use_cache=False)))

    def test_form(self):
        self.assertEqual([section.splitlines()[0] for section in SECTIONS], ORDER)
        for section in SECTIONS:
            with self.subTest(section.splitlines()[0]):
                title, _, prose, *_ = section.splitlines()
                self.assertTrue(prose.startswith("When "))
                link = title.lower().replace(" ", "-")
                self.assertIn(f"[{title}](#{link})", " ".join(BEGINNING.split("\n")))
                for code in CODE.findall(section):
                    self.assertLessEqual(len(list(filter(str.strip, code.splitlines()))), 10)
        self.assertLessEqual(max(map(len, TEXT.splitlines())), 100)

    def test_save_and_load_weights(self):
        names = self.run_recipe("Save and load weights", before="first = model.state_dict()")
        self.assertTrue((self.folder / "model.pt").exists())
        for name, weight in names["model"].state_dict().items():
            self.assertTrue(weight.equal(names["first"][name]))

    def test_your_own_dataset(self):
        trainer = self.run_recipe("Your own dataset")["trainer"]
        self.assertEqual(trainer.steps_done, 20)
        x, y = trainer.train_dataset[57]
        self.assertEqual((x.tolist(), y.tolist()), ([5, 7, 1], [-1, 1, 2]))

    def test_validation(self):
        names = self.run_recipe("Validation")
        self.assertAlmostEqual(float(names["printed"].split()[-2]), names["run"].val_loss, 4)
        self.assertTrue((self.folder / "out" / "best.pt").exists())

    def test_another_tokenizer(self):
        names = self.run_recipe("Another tokenizer")
        self.assertEqual(len(names["printed"].rstrip("\n")), 23)
        self.assertTrue(names["printed"].startswith("to "))

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "needs matplotlib")
    def test_losses_as_a_plot(self):
        names = self.run_recipe("Losses as a plot")
        self.assertEqual(len(names["losses"]), 20)
        self.assertTrue((self.folder / "loss.png").exists())
        names["plt"].close()

    def test_jsonl(self):
        rows = [json.dumps({"text": f"Text number {i} says é.\n"}) for i in range(9)]
        (self.folder / "texts.jsonl").write_text("\n".join(rows), encoding="utf-8")
        names = self.run_recipe("jsonl and Hugging Face datasets")
        texts = names["encoder"].decode(names["tokens"]).split("<|endoftext|>")
        self.assertEqual(texts, [json.loads(row)["text"] for row in rows] + [""])
        self.assertEqual(len(names["train_dataset"]), len(names["tokens"]) - 16)

    def test_epochs(self):
        before = ("seen = []\nclass Watched(TokenDataset):\n    def __getitems__(self, indices):\n"
                  "        seen.extend(indices)\n        return super().__getitems__(indices)\n"
                  "train_dataset = Watched(tokens[:100], block_size=16)")
        names = self.run_recipe("Epochs", before=before)
        count = len(names["train_dataset"])
        self.assertEqual(sorted(names["seen"][:count]), list(range(count)))
        self.assertEqual(names["trainer"].steps_done, -(-3 * count // 8))

    def test_schedules(self):
        names = self.run_recipe("A schedule of the learning rate")
        rate = names["trainer"].optimizer.param_groups[0]["lr"]
        self.assertLess(rate, 5e-5)
        self.assertGreaterEqual(rate, 3e-5)
        names = self.run_recipe("A schedule of the learning rate", part=1)
        rates = [group["lr"] for group in names["trainer"].optimizer.param_groups]
        self.assertEqual(rates, [3e-4 / 20 ** 0.5] * 2)

    def test_padding(self):
        names = self.run_recipe("Padding", before="model.eval()")
        total = 0
        for row in names["rows"]:
            _, loss = names["model"](torch.tensor([row[:-1]]), torch.tensor([row[1:]]))
            total += loss * (len(row) - 1)
        torch.testing.assert_close(names["loss"], total / 6)

    def test_a_classifier(self):
        names = self.run_recipe("A classifier", before="first = model.lm_head.weight.clone()")
        self.assertEqual(len(names["examples"]), len(names["train_dataset"]))
        self.assertTrue(names["model"].lm_head.weight.equal(names["first"]))

    def test_stop_at_a_token(self):
        names = self.run_recipe("Stop at a token")
        self.assertNotIn(7, names["answer"])
        self.assertEqual(names["row"][:3], [1, 2, 3])

    def test_another_loss_term(self):
        names = self.run_recipe("Another loss term")
        calm = names["CalmGPT"](names["config"]).eval()
        x, y = (part[None] for part in names["train_dataset"][0])
        logits, loss = calm(x, y)
        plain = torch.nn.functional.cross_entropy(logits[0], y[0])
        extra = 1e-4 * logits.logsumexp(dim=-1).square().mean()
        torch.testing.assert_close(loss, plain + extra)
        self.assertEqual(calm.generate(x[:, :3], 4).shape, (1, 7))

    def test_attention_weights_and_hidden_states(self):
        names = self.run_recipe("Attention weights and hidden states")
        self.assertEqual([state.shape for state in names["states"]], [(1, 4, 48)] * 3)
        for weights in names["weights"]:
            self.assertEqual(weights.shape, (1, 3, 4, 4))
            torch.testing.assert_close(weights.sum(-1), torch.ones(1, 3, 4))

    def test_lora(self):
        before = "import copy\nfirst = copy.deepcopy(model.state_dict())"
        names = self.run_recipe("LoRA", before=before)
        model = names["model"]
        for key, weight in model.state_dict().items():
            if ".c_attn.1." not in key and ".c_attn.2." not in key:
                self.assertTrue(weight.equal(names["first"][key.replace("c_attn.0", "c_attn")]))
        for block in model.transformer.h:
            self.assertGreater(block.attn.c_attn[2].weight.abs().sum(), 0)
        self.check_generation(model)

    def test_triples_and_dicts(self):
        names = self.run_recipe("Triples and dicts")
        x, y = names["Pairs"](names["dicts"]).__getitems__([3, 4])
        self.assertTrue(x.equal(torch.stack([names["train_dataset"][i][0] for i in (3, 4)])))
        self.assertEqual(y.shape, (2, 16))

    def test_another_activation(self):
        self.check_generation(self.run_recipe("Another activation")["model"])

    def test_another_optimizer(self):
        names = self.run_recipe("Another optimizer")
        optimizer = names["SGDGPT"](names["config"]).configure_optimizers(names["settings"])
        self.assertIsInstance(optimizer, torch.optim.SGD)

    def test_the_log_probability_of_a_text(self):
        names = self.run_recipe("The log-probability of a text")
        _, loss = names["model"](names["idx"][:, :-1], names["idx"][:, 1:])
        self.assertAlmostEqual(float(names["printed"].split()[0]), -4 * loss.item(), 4)

    def test_gradient_checkpointing(self):
        before = "import copy\ntwin = copy.deepcopy(model)"
        names = self.run_recipe("Gradient checkpointing", before=before)
        x, y = (part[None] for part in names["train_dataset"][0])
        model = names["model"].eval()
        twin = names["twin"].eval()
        twin.load_state_dict(model.state_dict())
        for one in (model, twin):
            one.zero_grad()
            one(x, y)[1].backward()
        for ours, theirs in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad)
        self.assertTrue(model.generate(x[:, :3], 5).equal(twin.generate(x[:, :3], 5)))

    def test_a_block_of_your_own(self):
        model = self.run_recipe("A block of your own")["model"]
        self.assertEqual({type(block).__name__ for block in model.transformer.h}, {"ParallelBlock"})
        self.check_generation(model)


if __name__ == "__main__":
    unittest.main()
