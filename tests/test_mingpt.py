"""
What people write for minGPT, in a few lines each as they write it: it runs, with minGPT's meaning.

    python -m unittest tests.test_mingpt
"""

import copy
import io
import itertools
import math
import random
import types
import unittest
from contextlib import redirect_stdout
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset

from common import tiny_config, tiny_gpt
from mingpt import model as model_module
from mingpt import trainer as trainer_module
from mingpt.data import TokenDataset
from mingpt.generation import can_cache
from mingpt.model import GPT, MLP, Block, CausalSelfAttention, NewGELU
from mingpt.run import Run
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode, set_seed
from numpy_gpt import compute_logits


class Copy(Dataset):
    """Rows of four tokens, twice: the second four are to be predicted."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        row = torch.randint(3, (4,), generator=torch.Generator().manual_seed(index))
        row = torch.cat((row, row))
        x, y = row[:-1].clone(), row[1:].clone()
        y[:3] = -1
        return x, y


def make_trainer(model=None, dataset=None, **settings) -> Trainer:
    config = Trainer.get_default_config()
    config.merge_from_dict(dict(device="cpu", max_iters=4, batch_size=4) | settings)
    set_seed(1)
    return Trainer(config, GPT(tiny_config()) if model is None else model, dataset or Copy())


def greedy(model, use_cache=True, length=9) -> list:
    idx = torch.tensor([[1, 2, 0], [0, 1, 1]])
    return model.generate(idx, length, use_cache=use_cache).tolist()


class Scripts(unittest.TestCase):
    def test_the_usual_script(self):
        set_seed(3407)
        sizes = GPT.get_default_config()
        sizes.model_type = "gpt-nano"
        sizes.vocab_size = 3
        sizes.block_size = 7
        model = GPT(sizes)

        settings = Trainer.get_default_config()
        settings.learning_rate = 5e-4
        settings.max_iters = 20
        settings.num_workers = 0
        trainer = Trainer(settings, model, Copy())

        steps = []
        def report(trainer):
            if trainer.iter_num % 10 == 0:
                steps.append((trainer.iter_num, trainer.iter_dt >= 0, trainer.loss.item() > 0))
        trainer.set_callback("on_batch_end", report)
        trainer.run()

        self.assertEqual(steps, [(0, True, True), (10, True, True)])
        model.eval()
        prompt = torch.tensor([[0, 1, 2, 1]], dtype=torch.long).to(trainer.device)
        with torch.no_grad():
            self.assertEqual(model.generate(prompt, 4, do_sample=False).shape, (1, 8))

    def test_names(self):
        for module in (model_module, trainer_module):
            self.assertIs(module.CN, CfgNode)
        model = GPT(tiny_config())
        self.assertEqual(model.block_size, 8)
        block = model.transformer.h[0]
        self.assertEqual((block.attn.n_head, block.attn.n_embd), (2, 16))
        for module, kind in (
            (model.transformer.wte, nn.Embedding), (model.transformer.wpe, nn.Embedding),
            (model.transformer.drop, nn.Dropout), (model.transformer.ln_f, nn.LayerNorm),
            (model.lm_head, nn.Linear), (block.ln_1, nn.LayerNorm), (block.ln_2, nn.LayerNorm),
            (block.attn.c_attn, nn.Linear), (block.attn.c_proj, nn.Linear),
            (block.attn.attn_dropout, nn.Dropout), (block.attn.resid_dropout, nn.Dropout),
            (block.mlp.c_fc, nn.Linear), (block.mlp.c_proj, nn.Linear),
            (block.mlp.act, NewGELU), (block.mlp.dropout, nn.Dropout),
        ):
            self.assertIsInstance(module, kind)

    def test_the_head_is_not_tied(self):
        model = GPT(tiny_config())
        self.assertIsNot(model.lm_head.weight, model.transformer.wte.weight)
        names = [name for name, _ in model.named_parameters()]
        self.assertIn("lm_head.weight", names)

    def test_parts_take_any_object_with_minGPTs_fields(self):
        config = types.SimpleNamespace(
            n_embd=16, n_head=2, block_size=8, attn_pdrop=0.1, resid_pdrop=0.1)
        x = torch.randn(2, 5, 16)
        self.assertEqual(Block(config)(x).shape, (2, 5, 16))
        self.assertEqual(CausalSelfAttention(config)(x).shape, (2, 5, 16))

    def test_a_model_saved_whole(self):
        model = tiny_gpt()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        self.assertEqual(greedy(torch.load(file, weights_only=False)), greedy(model))


class Configurations(unittest.TestCase):
    def test_sizes_are_read_back(self):
        config = GPT.get_default_config()
        config.model_type = "gpt-nano"
        config.vocab_size = 11
        config.block_size = 8
        GPT(config)
        self.assertEqual((config.n_layer, config.n_head, config.n_embd), (3, 3, 48))
        self.assertEqual((config.model_type, config.vocab_size), ("gpt-nano", 11))

    def test_nothing_else_changes_and_a_second_model_can_be_built(self):
        config = CfgNode(model_type=None, n_layer=1, n_head=1, n_embd=4, vocab_size=5,
                         block_size=3, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
        before = config.to_dict()
        GPT(config)
        self.assertEqual(config.to_dict(), before)
        config = GPT.get_default_config()
        config.merge_from_dict(dict(model_type="gpt-nano", vocab_size=5, block_size=3))
        first = GPT(config)
        self.assertEqual(GPT(config).config.to_dict(), first.config.to_dict())
        self.assertEqual(GPT(first.config).config.to_dict(), first.config.to_dict())

    def test_sizes_by_hand(self):
        config = GPT.get_default_config()
        config.model_type = None
        config.n_layer, config.n_head, config.n_embd = 1, 2, 8
        config.vocab_size, config.block_size = 5, 6
        self.assertEqual(GPT(config)(torch.zeros(1, 6, dtype=torch.long))[0].shape, (1, 6, 5))

    def test_a_configuration_is_printed_as_a_tree(self):
        config = CfgNode()
        config.system = CfgNode()
        config.system.seed = 3407
        config.system.work_dir = "./out"
        config.rate = 3e-4
        config.inner = CfgNode(deep=CfgNode(x=None))
        printed = io.StringIO()
        with redirect_stdout(printed):
            print(config)
        self.assertEqual(printed.getvalue().rstrip(), (
            "system:\n    seed: 3407\n    work_dir: ./out\nrate: 0.0003\n"
            "inner:\n    deep:\n        x: None"))

    def test_a_trainer_with_minGPTs_settings_alone(self):
        config = CfgNode(device="cpu", num_workers=0, max_iters=2, batch_size=4,
                         learning_rate=5e-4, betas=(0.9, 0.95), weight_decay=0.1,
                         grad_norm_clip=1.0)
        trainer = Trainer(config, GPT(tiny_config()), Copy())
        trainer.run()
        self.assertEqual(trainer.iter_num, 2)


class FreshWeights(unittest.TestCase):
    def test_they_equal_minGPTs_bit_for_bit(self):
        V, T, C, n_layer = 11, 8, 16, 2
        # minGPT makes its layers in this order, and each draws random numbers.
        set_seed(9)
        layers = {"transformer.wte": nn.Embedding(V, C), "transformer.wpe": nn.Embedding(T, C)}
        for i in range(n_layer):
            layers[f"transformer.h.{i}.ln_1"] = nn.LayerNorm(C)
            layers[f"transformer.h.{i}.attn.c_attn"] = nn.Linear(C, 3 * C)
            layers[f"transformer.h.{i}.attn.c_proj"] = nn.Linear(C, C)
            layers[f"transformer.h.{i}.ln_2"] = nn.LayerNorm(C)
            layers[f"transformer.h.{i}.mlp.c_fc"] = nn.Linear(C, 4 * C)
            layers[f"transformer.h.{i}.mlp.c_proj"] = nn.Linear(4 * C, C)
        layers["transformer.ln_f"] = nn.LayerNorm(C)
        layers["lm_head"] = nn.Linear(C, V, bias=False)
        # Then it draws all matrices again, and a third time some of them.
        for layer in layers.values():
            if not isinstance(layer, nn.LayerNorm):
                nn.init.normal_(layer.weight, mean=0.0, std=0.02)
        for name, layer in layers.items():
            if name.endswith("c_proj"):
                nn.init.normal_(layer.weight, mean=0.0, std=0.02 / math.sqrt(2 * n_layer))
        after = torch.rand(3)

        set_seed(9)
        model = GPT(tiny_config(n_layer=n_layer))
        self.assertTrue(torch.equal(torch.rand(3), after))
        state = model.state_dict()
        for name, layer in layers.items():
            self.assertTrue(torch.equal(state.pop(f"{name}.weight"), layer.weight), name)
            if getattr(layer, "bias", None) is not None:
                self.assertFalse(state.pop(f"{name}.bias").any())
        self.assertEqual(list(state), [])

    def test_an_override_counts(self):
        class Mine(GPT):
            def _init_weights(self, module):
                if isinstance(module, nn.Embedding):
                    nn.init.ones_(module.weight)

        model = Mine(tiny_config())
        self.assertTrue((model.transformer.wte.weight == 1).all())


def mingpt_file(head_std: float = 0.3) -> tuple[dict, dict]:
    """Returns weights as minGPT saves them, with masks, and the same in OpenAI's layout."""
    V, T, C, n_layer = 11, 8, 16, 2
    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C)}
    for h in (f"transformer.h.{i}" for i in range(n_layer)):
        shapes |= {
            f"{h}.ln_1.weight": (C,), f"{h}.ln_1.bias": (C,), f"{h}.attn.bias": (1, 1, T, T),
            f"{h}.attn.c_attn.weight": (3 * C, C), f"{h}.attn.c_attn.bias": (3 * C,),
            f"{h}.attn.c_proj.weight": (C, C), f"{h}.attn.c_proj.bias": (C,),
            f"{h}.ln_2.weight": (C,), f"{h}.ln_2.bias": (C,),
            f"{h}.mlp.c_fc.weight": (4 * C, C), f"{h}.mlp.c_fc.bias": (4 * C,),
            f"{h}.mlp.c_proj.weight": (C, 4 * C), f"{h}.mlp.c_proj.bias": (C,),
        }
    shapes |= {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    shapes["lm_head.weight"] = (V, C)
    state = {name: torch.randn(shape) * head_std for name, shape in shapes.items()}
    openai = {}
    for name in shapes:
        if name.endswith(".attn.bias"):
            state[name] = torch.ones(T, T).tril().view(1, 1, T, T)
        else:
            matrix = ".h." in name and state[name].dim() == 2
            openai[name.removeprefix("transformer.")] = state[name].t() if matrix else state[name]
    return state, openai


class SavedWeights(unittest.TestCase):
    def test_a_file_of_minGPT_loads(self):
        set_seed(4)
        state, openai = mingpt_file()
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        idx = torch.randint(11, (1, 8))
        expected = torch.from_numpy(compute_logits(openai, idx[0].tolist(), n_head=2))
        for asked_for in (False, True):
            model = GPT(tiny_config()).eval()
            if asked_for:
                # The mask that somebody asked for takes part, and still the file loads.
                model.transformer.h[0].attn.bias
            file.seek(0)
            model.load_state_dict(torch.load(file, weights_only=True))
            torch.testing.assert_close(
                model(idx)[0][0].double(), expected, atol=1e-4, rtol=1e-4)
            self.assertNotIn("transformer.h.0.attn.bias", model.state_dict())

    def test_weights_go_back_and_forth(self):
        model = tiny_gpt()
        other = GPT(tiny_config()).eval()
        other.load_state_dict(model.state_dict())
        self.assertEqual(greedy(other), greedy(model))


class Heads(unittest.TestCase):
    def test_a_classifier(self):
        class Classifier(GPT):
            def __init__(self, config):
                super().__init__(config)
                self.lm_head = nn.Linear(config.n_embd, 3)

            def forward(self, idx, targets=None):
                b, t = idx.size()
                pos = torch.arange(0, t, dtype=torch.long, device=idx.device).unsqueeze(0)
                x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
                for block in self.transformer.h:
                    x = block(x)
                logits = self.lm_head(self.transformer.ln_f(x)[:, -1, :])
                loss = None
                if targets is not None:
                    loss = F.cross_entropy(logits, targets)
                return logits, loss

        set_seed(1)
        x = torch.randint(3, (60, 5))
        model = Classifier(tiny_config())
        trainer = make_trainer(model, TensorDataset(x, x[:, 0]), max_iters=150, batch_size=60,
                               learning_rate=1e-2)
        trainer.run()
        model.eval()
        self.assertEqual(model(x)[0].argmax(-1).tolist(), x[:, 0].tolist())

    def test_a_value_on_top_of_the_features(self):
        class Critic(GPT):
            def __init__(self, config):
                super().__init__(config)
                self.value = nn.Linear(config.n_embd, 1)

            def forward(self, idx, targets=None):
                values = self.value(self.features(idx))[:, -1, 0]
                loss = None if targets is None else F.mse_loss(values, targets)
                return values, loss

        x = torch.randint(3, (8, 5))
        trainer = make_trainer(Critic(tiny_config()), TensorDataset(x, -torch.ones(8)),
                               max_iters=60, learning_rate=1e-2)
        trainer.run()
        self.assertLess(trainer.loss.item(), 0.05)

    def test_another_loss_term(self):
        class Penalised(GPT):
            def forward(self, idx, targets=None):
                logits, loss = super().forward(idx, targets)
                if targets is not None:
                    loss = loss + 0.01 * logits.square().mean()
                return logits, loss

        set_seed(2)
        model = Penalised(tiny_config()).eval()
        idx = torch.randint(11, (2, 8))
        logits, loss = model(idx, idx)
        expected = F.cross_entropy(logits.flatten(0, 1), idx.flatten())
        torch.testing.assert_close(loss, expected + 0.01 * logits.square().mean())
        trainer = make_trainer(model)
        trainer.run()
        self.assertEqual(greedy(model), greedy(model, use_cache=False))

    def test_a_larger_vocabulary_in_a_finished_model(self):
        model = tiny_gpt()
        model.transformer.wte = nn.Embedding(13, 16)
        model.lm_head = nn.Linear(16, 13, bias=False)
        written = model.generate(torch.tensor([[12, 11]]), 3)
        self.assertEqual(written.shape, (1, 5))


class Blocks(unittest.TestCase):
    def setUp(self):
        set_seed(5)
        self.model = tiny_gpt()
        self.idx = torch.randint(11, (2, 8))

    def test_a_block_of_ones_own(self):
        class Parallel(Block):
            def forward(self, x):
                return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))

        config = self.model.config
        self.model.transformer.h = nn.ModuleList([Parallel(config) for _ in range(2)])
        trainer = make_trainer(self.model)
        trainer.run()
        self.assertEqual(greedy(self.model), greedy(self.model, use_cache=False))

    def test_a_block_that_is_no_Block(self):
        class Mixer(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(16, 16)

            def forward(self, x):
                return x + self.layer(x).cumsum(dim=1)

        self.model.transformer.h[1] = Mixer()
        self.assertEqual(greedy(self.model), greedy(self.model, use_cache=False))

    def test_a_patched_block(self):
        expected = greedy(self.model)
        calls = []
        for block in self.model.transformer.h:
            original = block.forward

            def forward(x, original=original):
                calls.append(tuple(x.shape))
                return original(x)

            block.forward = forward
        self.assertEqual(greedy(self.model), expected)
        self.assertEqual(calls[:2], [(2, 3, 16)] * 2)

    def test_gradient_checkpointing(self):
        self.model(self.idx, self.idx)[1].backward()
        expected = [p.grad.clone() for p in self.model.parameters()]
        self.model.zero_grad()
        for block in self.model.transformer.h:
            original = block.forward
            block.forward = lambda x, f=original: checkpoint(f, x, use_reentrant=False)
        self.model(self.idx, self.idx)[1].backward()
        for parameter, gradient in zip(self.model.parameters(), expected):
            self.assertTrue(torch.equal(parameter.grad, gradient))

    def test_attention_of_ones_own(self):
        class NoMask(nn.Module):
            def __init__(self, config):
                super().__init__()
                self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)

            def forward(self, x):
                q, k, v = self.qkv(x).chunk(3, dim=-1)
                return F.scaled_dot_product_attention(q, k, v)

        for block in self.model.transformer.h:
            block.attn = NoMask(self.model.config)
        self.assertEqual(greedy(self.model), greedy(self.model, use_cache=False))

    def test_a_subclass_of_the_attention(self):
        class Scaled(CausalSelfAttention):
            def forward(self, x):
                return 0.5 * super().forward(x)

        for block in self.model.transformer.h:
            block.attn = Scaled(self.model.config)
        self.assertEqual(greedy(self.model), greedy(self.model, use_cache=False))

    def test_adapters_in_c_attn(self):
        class LoRA(nn.Module):
            def __init__(self, linear, rank):
                super().__init__()
                self.linear = linear
                self.a = nn.Linear(linear.in_features, rank, bias=False)
                self.b = nn.Linear(rank, linear.out_features, bias=False)
                nn.init.zeros_(self.b.weight)

            def forward(self, x):
                return self.linear(x) + self.b(self.a(x))

        before = greedy(self.model)
        frozen = copy.deepcopy(self.model.state_dict())
        for parameter in self.model.parameters():
            parameter.requires_grad = False
        for block in self.model.transformer.h:
            block.attn.c_attn = LoRA(block.attn.c_attn, rank=2)
        self.assertEqual(greedy(self.model), before)

        trainer = make_trainer(self.model, max_iters=30, learning_rate=1e-1)
        trainer.run()
        self.model.eval()
        self.assertEqual(greedy(self.model), greedy(self.model, use_cache=False))
        state = self.model.state_dict()
        for name, tensor in frozen.items():
            name = name.replace("c_attn.", "c_attn.linear.")
            self.assertTrue(torch.equal(state[name], tensor), name)
        self.assertTrue(self.model.transformer.h[0].attn.c_attn.b.weight.any())

    def test_one_part_of_a_block_called_alone(self):
        block = self.model.transformer.h[0]
        x = torch.randn(2, 5, 16)
        middle = x + block.attn(block.ln_1(x))
        expected = middle + block.mlp.dropout(block.mlp.c_proj(block.mlp.act(
            block.mlp.c_fc(block.ln_2(middle)))))
        torch.testing.assert_close(block(x), expected)
        torch.testing.assert_close(block.mlpf(x), block.mlp(x))


class Masks(unittest.TestCase):
    def setUp(self):
        set_seed(6)
        self.model = tiny_gpt()
        self.idx = torch.randint(11, (1, 8))

    def sees_ahead(self) -> bool:
        changed = self.idx.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 11
        return not torch.allclose(self.model(changed)[0][:, 0], self.model(self.idx)[0][:, 0])

    def test_minGPTs_mask_can_be_asked_for(self):
        before = self.model(self.idx)[0]
        mask = self.model.transformer.h[0].attn.bias
        self.assertTrue(torch.equal(mask, torch.ones(8, 8).tril().view(1, 1, 8, 8)))
        torch.testing.assert_close(self.model(self.idx)[0], before)
        self.assertNotIn("transformer.h.0.attn.bias", self.model.state_dict())

    def test_no_mask(self):
        self.assertFalse(self.sees_ahead())
        for block in self.model.transformer.h:
            block.attn.bias = torch.ones(1, 1, 8, 8)
            self.assertFalse(block.attn.fused)
        self.assertTrue(self.sees_ahead())
        self.assertEqual(greedy(self.model), greedy(self.model, use_cache=False))

    def test_a_mask_changed_in_place(self):
        for block in self.model.transformer.h:
            block.attn.bias[:] = 1
        self.assertTrue(self.sees_ahead())
        self.assertEqual(greedy(self.model), greedy(self.model, use_cache=False))

    def test_a_mask_registered_again(self):
        for block in self.model.transformer.h:
            block.attn.register_buffer("bias", torch.ones(1, 1, 8, 8))
        self.assertTrue(self.sees_ahead())

    def test_a_window(self):
        # Only the token itself and the one before it are seen.
        ones = torch.ones(8, 8)
        for block in self.model.transformer.h:
            block.attn.bias = (ones.tril() - ones.tril(-2)).view(1, 1, 8, 8)
        changed = self.idx.clone()
        changed[:, 0] = (changed[:, 0] + 1) % 11
        logits = self.model(self.idx)[0]
        others = self.model(changed)[0]
        # After two layers the change has come two tokens far.
        torch.testing.assert_close(others[:, 3:], logits[:, 3:])
        self.assertFalse(torch.allclose(others[:, 2], logits[:, 2]))
        self.assertEqual(greedy(self.model), greedy(self.model, use_cache=False))

    def test_a_copy_keeps_its_mask(self):
        self.model.transformer.h[0].attn.bias = torch.ones(1, 1, 8, 8)
        copied = copy.deepcopy(self.model)
        self.assertTrue(torch.equal(copied(self.idx)[0], self.model(self.idx)[0]))


class AttentionMaps(unittest.TestCase):
    def test_by_hooks_on_attn_dropout(self):
        set_seed(7)
        model = tiny_gpt()
        idx = torch.randint(11, (2, 6))
        expected = model(idx)[0]
        maps = []
        hooks = [block.attn.attn_dropout.register_forward_hook(
            lambda module, args, output: maps.append(output.detach()))
            for block in model.transformer.h]
        torch.testing.assert_close(model(idx)[0], expected)
        self.assertEqual([att.shape for att in maps], [(2, 2, 6, 6)] * 2)
        for att in maps:
            torch.testing.assert_close(att.sum(-1), torch.ones(2, 2, 6))
            self.assertFalse(att.triu(1).any())

        # With hooks, generation reads whole windows: the maps are those of minGPT.
        maps.clear()
        written = greedy(model, length=2)
        self.assertEqual([att.size(-1) for att in maps], [3, 3, 4, 4])
        for hook in hooks:
            hook.remove()
        self.assertEqual(greedy(model, length=2), written)

    def test_by_a_replaced_attn_dropout(self):
        class Recorder(nn.Module):
            def forward(self, att):
                self.att = att
                return att

        model = tiny_gpt()
        model.transformer.h[1].attn.attn_dropout = Recorder()
        model(torch.randint(11, (2, 6)))
        self.assertEqual(model.transformer.h[1].attn.attn_dropout.att.shape, (2, 2, 6, 6))


class Generation(unittest.TestCase):
    def setUp(self):
        set_seed(8)
        self.model = tiny_gpt()

    def test_an_overridden_forward_counts(self):
        class NeverTwo(GPT):
            def forward(self, idx, targets=None):
                logits, loss = super().forward(idx, targets)
                logits = logits.clone()
                logits[..., 2] = -math.inf
                return logits, loss

        model = NeverTwo(tiny_config()).eval()
        with torch.no_grad():
            model.lm_head.weight[2] += 100 * model.features(torch.tensor([[1, 2, 0]]))[0, -1]
        for row in greedy(model):
            self.assertNotIn(2, row[3:])

    def test_a_patched_forward_counts(self):
        def forward(idx, targets=None):
            logits = F.one_hot((idx + 1) % 11, 11).float()
            return logits, None

        self.model.forward = forward
        self.assertEqual(greedy(self.model, length=3), [[1, 2, 0, 1, 2, 3], [0, 1, 1, 2, 3, 4]])

    def test_hooks_on_the_model_count(self):
        lengths = []

        def hook(module, args, output):
            lengths.append(args[0].size(1))
            return torch.roll(output[0], 1, dims=-1), None

        expected = greedy(self.model, length=1)
        handle = self.model.register_forward_hook(hook)
        written = greedy(self.model, length=6)
        self.assertEqual(written[0][3], (expected[0][3] + 1) % 11)
        self.assertEqual(lengths, [3, 4, 5, 6, 7, 8])
        handle.remove()
        self.assertTrue(can_cache(self.model))

    def test_hooks_on_a_part_see_whole_windows(self):
        seen = []
        self.model.transformer.h[0].mlp.register_forward_hook(
            lambda module, args, output: seen.append(output.size(1)))
        greedy(self.model, length=6)
        self.assertEqual(seen, [3, 4, 5, 6, 7, 8])

    def test_own_sampling_with_the_models_logits(self):
        idx = torch.tensor([[1, 2, 0]])
        for _ in range(9):
            logits, _ = self.model(idx[:, -self.model.block_size:])
            idx = torch.cat((idx, logits[:, -1, :].argmax(-1, keepdim=True)), dim=1)
        self.assertEqual(idx[0].tolist(), greedy(self.model)[0])


class Shift(nn.Module):
    """Gives each token the vector of the one before."""

    def forward(self, x):
        return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)


class Running(nn.Module):
    """Adds up all tokens so far."""

    def forward(self, x):
        return x.cumsum(dim=1)


class Everything(nn.Module):
    """Adds the mean of all tokens, later ones included."""

    def forward(self, x):
        return x + x.mean(dim=1, keepdim=True)


class Place(nn.Module):
    """Multiplies by the place in the row."""

    def forward(self, x):
        places = torch.arange(1, x.size(1) + 1, dtype=x.dtype)
        return x * places.view(-1, *[1] * (x.dim() - 2))


class Recurrent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0]


class Shifting(nn.Linear):
    """A subclass of a known layer."""

    def forward(self, x):
        return super().forward(Shift()(x))


def patched(width) -> nn.Linear:
    layer = nn.Linear(width, width)
    layer.forward = lambda x: F.linear(Running()(x), layer.weight, layer.bias)
    return layer


def hooked(width) -> nn.Linear:
    layer = nn.Linear(width, width)
    layer.register_forward_pre_hook(lambda module, args: (Everything()(args[0]),))
    return layer


STRANGE_PARTS = {
    "shift": lambda width: Shift(),
    "running": lambda width: Running(),
    "everything": lambda width: Everything(),
    "place": lambda width: Place(),
    "recurrent": Recurrent,
    "softmax over time": lambda width: nn.Softmax(dim=1),
    "subclass": lambda width: Shifting(width, width),
    "patched": patched,
    "hooked": hooked,
    "nested": lambda width: nn.Sequential(nn.Linear(width, width), nn.Sequential(Shift())),
    "tokenwise": lambda width: nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width)),
}
# Names of parts, and the width of what they return.
PLACES = {
    "transformer.wte": 16, "transformer.wpe": 16, "transformer.drop": 16, "transformer.ln_f": 16,
    "lm_head": 11, "transformer.h.1.ln_1": 16, "transformer.h.1.ln_2": 16,
    "transformer.h.0.attn": 16, "transformer.h.1.attn.c_attn": 48,
    "transformer.h.0.attn.c_proj": 16, "transformer.h.1.attn.resid_dropout": 16,
    "transformer.h.0.mlp": 16, "transformer.h.1.mlp": 16, "transformer.h.1.mlp.c_fc": 64,
    "transformer.h.0.mlp.act": 64, "transformer.h.1.mlp.dropout": 16, "transformer.h.0": 16,
}


class ReplacedParts(unittest.TestCase):
    """Whatever is put in, generation with the cache gives the tokens that it gives without."""

    def check(self, model) -> None:
        self.assertEqual(greedy(model), greedy(model, use_cache=False))

    def test_random_parts_in_random_places(self):
        set_seed(9)
        original = tiny_gpt().double()
        pairs = list(itertools.product(PLACES, STRANGE_PARTS))
        for place, kind in random.Random(9).sample(pairs, 60):
            with self.subTest(place=place, kind=kind):
                model = copy.deepcopy(original)
                part = model.get_submodule(place)
                strange = STRANGE_PARTS[kind](PLACES[place]).double()
                if place == "transformer.wpe":
                    # It gives (T, C).
                    strange = nn.Sequential(nn.Unflatten(0, (1, -1)), strange, nn.Flatten(0, 1))
                model.set_submodule(place, nn.Sequential(part, strange))
                self.check(model)

    def test_instead_of_the_mlp(self):
        set_seed(10)
        original = tiny_gpt().double()
        for kind, make in STRANGE_PARTS.items():
            with self.subTest(kind):
                model = copy.deepcopy(original)
                model.transformer.h[0].mlp = make(16).double()
                self.check(model)

    def test_patched_classes(self):
        model = tiny_gpt().double()
        forward = MLP.forward
        with mock.patch.object(MLP, "forward", lambda self, x: forward(self, Running()(x))):
            self.check(model)
        features = GPT.features
        with mock.patch.object(GPT, "features", lambda self, idx: features(self, idx.flip(0))):
            self.check(model)

    def test_global_hooks(self):
        model = tiny_gpt().double()

        def hook(module, args, output):
            return Running()(output) if isinstance(module, MLP) else None

        handle = nn.modules.module.register_module_forward_hook(hook)
        self.addCleanup(handle.remove)
        self.check(model)

    def test_a_part_of_ones_own_takes_part_by_an_argument(self):
        class Swish(nn.Module):
            def forward(self, x, cache=None):
                return x * torch.sigmoid(x)

        model = tiny_gpt().double()
        model.transformer.h[0].mlp.act = Swish()
        self.assertTrue(can_cache(model))
        self.check(model)

    def test_a_part_that_takes_a_cache_and_leaves_it_empty(self):
        class Forgetful(CausalSelfAttention):
            def forward(self, x, cache=None):
                return super().forward(x)

        model = tiny_gpt().double()
        model.transformer.h[1].attn = Forgetful(model.config).double().eval()
        self.check(model)


class OwnLoop(unittest.TestCase):
    def test_with_configure_optimizers(self):
        set_seed(11)
        model = GPT(tiny_config())
        train_config = Trainer.get_default_config()
        train_config.learning_rate = 1e-2
        optimizer = model.configure_optimizers(train_config)
        idx = torch.randint(11, (8, 8))
        losses = []
        for _ in range(30):
            logits, loss = model(idx[:, :-1], idx[:, 1:])
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train_config.grad_norm_clip)
            optimizer.step()
            losses.append(loss.item())
        self.assertLess(losses[-1], 0.7 * losses[0])

    def test_with_a_configuration_of_minGPTs_three_fields(self):
        config = CfgNode(learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.2)
        groups = GPT(tiny_config()).configure_optimizers(config).param_groups
        self.assertEqual([group["weight_decay"] for group in groups], [0.2, 0.0])
        self.assertEqual([group["lr"] for group in groups], [1e-3, 1e-3])

    def test_a_subclass_of_the_trainer_with_a_loop_of_its_own(self):
        class Mine(Trainer):
            def run(self):
                model, config = self.model, self.config
                self.optimizer = model.configure_optimizers(config)
                model.train()
                self.iter_num = 0
                while self.iter_num < config.max_iters:
                    x, y = (part.unsqueeze(0).to(self.device) for part in self.train_dataset[0])
                    logits, self.loss = model(x, y)
                    model.zero_grad(set_to_none=True)
                    self.loss.backward()
                    self.optimizer.step()
                    self.trigger_callbacks("on_batch_end")
                    self.iter_num += 1

        trainer = make_trainer()
        mine = Mine(trainer.config, trainer.model, trainer.train_dataset)
        seen = []
        mine.set_callback("on_batch_end", lambda trainer: seen.append(trainer.iter_num))
        mine.run()
        self.assertEqual(seen, [0, 1, 2, 3])


class Callbacks(unittest.TestCase):
    def test_set_replaces_and_add_adds(self):
        trainer = make_trainer(max_iters=2)
        calls = []
        trainer.set_callback("on_batch_end", lambda trainer: calls.append("replaced"))
        trainer.set_callback("on_batch_end", lambda trainer: calls.append(trainer.iter_num))
        trainer.add_callback("on_batch_end", lambda trainer: calls.append("added"))
        trainer.run()
        self.assertEqual(calls, [0, "added", 1, "added"])

    def test_events_of_ones_own(self):
        trainer = make_trainer(max_iters=2)
        calls = []
        trainer.add_callback("on_sample", lambda trainer: calls.append(trainer.iter_num))
        trainer.set_callback(
            "on_batch_end", lambda trainer: trainer.trigger_callbacks("on_sample"))
        trainer.run()
        self.assertEqual(calls, [0, 1])
        trainer.trigger_callbacks("on_nothing")

    def test_gradients_are_there_in_a_callback(self):
        for make in (Trainer, Run):
            trainer = make_trainer(max_iters=2)
            trainer = make(trainer.config, trainer.model, Copy())
            norms = []
            trainer.set_callback("on_batch_end", lambda trainer: norms.append(
                trainer.model.lm_head.weight.grad.norm().item()))
            trainer.run()
            self.assertEqual(len(norms), 2)
            self.assertTrue(all(norm > 0 for norm in norms))


class Rates(unittest.TestCase):
    def test_written_into_the_groups(self):
        used = []

        def cosine(trainer):
            used.append([group["lr"] for group in trainer.optimizer.param_groups])
            for group in trainer.optimizer.param_groups:
                group["lr"] = 1e-3 * (trainer.iter_num + 1)

        for make in (Trainer, Run):
            trainer = make_trainer(max_iters=3, learning_rate=5e-4)
            trainer = make(trainer.config, trainer.model, Copy())
            used.clear()
            trainer.set_callback("on_batch_end", cosine)
            trainer.run()
            self.assertEqual(used, [[5e-4] * 2, [1e-3] * 2, [2e-3] * 2])

    def test_a_rate_of_zero_stops_learning(self):
        trainer = make_trainer(max_iters=3)
        states = []

        def freeze(trainer):
            states.append(copy.deepcopy(trainer.model.state_dict()))
            for group in trainer.optimizer.param_groups:
                group["lr"] = 0.0

        trainer.set_callback("on_batch_end", freeze)
        trainer.run()
        self.assertTrue(all(torch.equal(states[0][name], states[2][name]) for name in states[0]))

    def test_schedulers_of_torch(self):
        for optimizer in ("adamw", "muon"):
            trainer = make_trainer(max_iters=4, learning_rate=1e-2, optimizer=optimizer)
            used = []

            def start(trainer):
                trainer.scheduler = torch.optim.lr_scheduler.StepLR(
                    trainer.optimizer, step_size=1, gamma=0.5)

            def step(trainer):
                used.append(trainer.optimizer.param_groups[0]["lr"])
                trainer.scheduler.step()

            trainer.set_callback("on_train_start", start)
            trainer.set_callback("on_batch_end", step)
            trainer.run()
            self.assertEqual(used, [1e-2, 5e-3, 2.5e-3, 1.25e-3])

    def test_groups_of_ones_own_keep_their_rates_under_a_schedule(self):
        class Mine(GPT):
            def configure_optimizers(self, train_config):
                head = list(self.lm_head.parameters())
                body = list(self.transformer.parameters())
                return torch.optim.AdamW([dict(params=body, lr=1e-4), dict(params=head, lr=1e-2)])

        used = []
        trainer = make_trainer(Mine(tiny_config()), schedule="linear", max_iters=4)
        trainer.set_callback("on_batch_end", lambda trainer: used.append(
            [group["lr"] for group in trainer.optimizer.param_groups]))
        trainer.run()
        for step, rates in enumerate(used):
            self.assertAlmostEqual(rates[0], 1e-4 * (1 - step / 4))
            self.assertAlmostEqual(rates[1], 1e-2 * (1 - step / 4))


class Changed(unittest.TestCase):
    """What is changed between Trainer(...) and run() counts."""

    def test_a_new_head_learns(self):
        trainer = make_trainer()
        trainer.model.lm_head = nn.Linear(16, 11)
        before = trainer.model.lm_head.weight.detach().clone()
        trainer.run()
        self.assertFalse(torch.equal(trainer.model.lm_head.weight, before))

    def test_a_frozen_layer_stays(self):
        trainer = make_trainer()
        frozen = trainer.model.transformer.h[0]
        for parameter in frozen.parameters():
            parameter.requires_grad = False
        before = copy.deepcopy(frozen.state_dict())
        trainer.run()
        for name, tensor in frozen.state_dict().items():
            self.assertTrue(torch.equal(tensor, before[name]))

    def test_settings(self):
        trainer = make_trainer()
        trainer.config.weight_decay = 0.7
        trainer.config.learning_rate = 1e-5
        trainer.run()
        group = trainer.optimizer.param_groups[0]
        self.assertEqual((group["weight_decay"], group["lr"]), (0.7, 1e-5))

    def test_each_run_makes_its_optimizer(self):
        trainer = make_trainer()
        trainer.config.max_iters = 1
        trainer.run()
        first = trainer.optimizer
        trainer.run()
        self.assertIsNot(trainer.optimizer, first)


class Runs(unittest.TestCase):
    def seen(self, trainer) -> list:
        batches = []
        dataset = trainer.train_dataset

        class Watched(Dataset):
            def __len__(self):
                return len(dataset)

            def __getitem__(self, index):
                batches.append(index)
                return dataset[index]

        trainer.train_dataset = Watched()
        trainer.run()
        trainer.train_dataset = dataset
        return batches

    def test_a_second_run_draws_other_examples(self):
        for seed in (None, 5):
            trainer = make_trainer(seed=seed)
            first = self.seen(trainer)
            second = self.seen(trainer)
            self.assertEqual((len(first), trainer.iter_num), (16, 4))
            self.assertNotEqual(first, second)

    def test_without_a_seed_the_seed_of_torch_counts(self):
        rows = []
        for seed in (3, 3, 4):
            trainer = make_trainer()
            torch.manual_seed(seed)
            rows.append(self.seen(trainer))
        self.assertEqual(rows[0], rows[1])
        self.assertNotEqual(rows[0], rows[2])

    def test_max_iters_is_any_number(self):
        for max_iters, steps in ((0, 0), (2.5, 3), (3.0, 3), (len(Copy()) / 16 * 2, 7)):
            trainer = make_trainer(max_iters=max_iters)
            trainer.run()
            self.assertEqual(trainer.iter_num, steps)

    def test_it_says_on_which_device_it_runs_and_nothing_more(self):
        with self.assertLogs("mingpt", "INFO") as logged:
            trainer = make_trainer(GPT(tiny_config()))
            trainer.run()
        lines = [line.split(":", 2)[2] for line in logged.output]
        self.assertEqual(lines[1:], ["running on device cpu"])

    def test_settings_of_Run_are_named_in_one_line(self):
        with self.assertLogs("mingpt", "WARNING") as logged:
            make_trainer(work_dir="out", eval_interval=10)
        self.assertEqual(len(logged.output), 1)
        self.assertIn("work_dir, eval_interval", logged.output[0])


class FoundByFreshEyes(unittest.TestCase):
    """Programs that once went wrong without a word."""

    def test_settings_in_a_class(self):
        class Settings:
            device = "cpu"
            max_iters = 3
            batch_size = 4
            learning_rate = 1e-2

        trainer = Trainer(Settings(), GPT(tiny_config()), Copy())
        trainer.run()
        self.assertEqual((trainer.steps_done, trainer.config.batch_size), (3, 4))

        class Sizes:
            model_type = None
            n_layer, n_head, n_embd, vocab_size, block_size = 2, 2, 16, 11, 8

        self.assertEqual(len(GPT(Sizes).transformer.h), 2)

    def test_numbers_of_numpy_in_a_tuple(self):
        make_trainer(betas=(np.float64(0.9), np.float32(0.95)), max_iters=1).run()

    def test_a_rate_of_a_callback_goes_on_after_an_interruption(self):
        used = []

        def halve(trainer):
            groups = trainer.optimizer.param_groups
            used.append(groups[0]["lr"])
            for group in groups:
                group["lr"] *= 0.5
            if len(used) == 2:
                raise KeyboardInterrupt

        trainer = make_trainer(learning_rate=0.01, max_iters=4)
        trainer.set_callback("on_batch_end", halve)
        with self.assertRaises(KeyboardInterrupt):
            trainer.run()
        trainer.run()
        self.assertEqual(used, [0.01, 0.005, 0.0025, 0.00125])

    def test_a_loss_of_ones_own_counts_its_own_targets(self):
        class OwnLoss(GPT):
            def forward(self, idx, targets=None, cache=None):
                logits, _ = super().forward(idx)
                return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())

        class NoTargets(Copy):
            def __getitem__(self, index):
                return super().__getitem__(index)[0], torch.tensor(-1)

        model = OwnLoss(tiny_config())
        before = copy.deepcopy(model.state_dict())
        make_trainer(model, NoTargets(), max_iters=1).run()
        changed = [name for name, value in model.state_dict().items()
                   if not torch.equal(value, before[name])]
        self.assertIn("lm_head.weight", changed)

    def test_an_example_that_a_subclass_changes(self):
        class Masked(TokenDataset):
            def __getitem__(self, index):
                x, y = super().__getitem__(index)
                y = y.clone()
                y[:3] = -1
                return x, y

        seen = []
        model = GPT(tiny_config())
        model.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        make_trainer(model, Masked(np.arange(11).repeat(4), 8), max_iters=1).run()
        self.assertTrue((seen[0][:, :3] == -1).all())
        self.assertTrue((seen[0][:, 3:] >= 0).all())

    def test_the_formula_of_ones_own(self):
        class Distance(CausalSelfAttention):
            def attend(self, q, k, v):
                pos = torch.arange(k.size(2))
                scores = q @ k.transpose(2, 3) + (pos - pos[:, None]).clamp(max=0) * 0.5
                causal = torch.ones(len(pos), len(pos)).tril() == 1
                return scores.masked_fill(~causal, -torch.inf).softmax(3) @ v

        model = tiny_gpt()
        plain = greedy(model)
        for block in model.transformer.h:
            block.attn.__class__ = Distance
        self.assertFalse(can_cache(model))
        self.assertEqual(greedy(model), greedy(model, use_cache=False))
        self.assertNotEqual(greedy(model), plain)

    def test_every_way_to_watch_the_attention_weights(self):
        model = GPT(tiny_config(attn_pdrop=0.0))
        idx = torch.tensor([[1, 2, 3]])
        seen = []
        dropout = model.transformer.h[0].attn.attn_dropout
        dropout.register_full_backward_hook(lambda *args: seen.append("backward"))
        model(idx, idx)[1].backward()
        dropout = model.transformer.h[1].attn.attn_dropout
        dropout.forward = lambda x: seen.append("forward") or x
        model(idx)
        self.assertEqual(seen, ["backward", "forward"])

    def test_a_buffer_with_the_name_mask(self):
        class Own(CausalSelfAttention):
            def __init__(self, config):
                super().__init__(config)
                self.register_buffer("mask", torch.ones(8, 8).triu(1).bool())

        attention = Own(tiny_config()).eval()
        x = torch.randn(2, 5, 16)
        expected = attention(x)
        attention.fused = False
        torch.testing.assert_close(attention(x), expected)

    def test_a_model_without_wte(self):
        class Vectors(GPT):
            def __init__(self, config):
                super().__init__(config)
                self.embed = self.transformer["wte"]
                del self.transformer["wte"]

            def forward(self, idx, targets=None):
                x = self.embed(idx) + self.transformer.wpe(torch.arange(idx.size(1)))
                for block in self.transformer.h:
                    x = block(x)
                return self.lm_head(self.transformer.ln_f(x)), None

        model = Vectors(tiny_config())
        self.assertEqual(model.generate(torch.tensor([[1, 2]]), 3).shape, (1, 5))
        model.configure_optimizers(Trainer.get_default_config())


if __name__ == "__main__":
    unittest.main()
