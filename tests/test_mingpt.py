"""
Programs as people write them for minGPT: they run, with minGPT's meaning.

    python -m unittest tests.test_mingpt
"""

import contextlib
import copy
import inspect
import math
import unittest
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from common import tiny_config, tiny_gpt, uses_cache
from mingpt import model as model_module
from mingpt import trainer as trainer_module
from mingpt.bpe import BPETokenizer, Encoder
from mingpt.data import TokenDataset
from mingpt.generation import KVCache
from mingpt.model import GPT, MLP, Block, CausalSelfAttention, NewGELU
from mingpt.run import Run
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode, set_seed
from test_trainer import at_step, make_trainer, record
from train_script import Pairs


def rates(trainer) -> list:
    return [group["lr"] for group in trainer.optimizer.param_groups]


def greedy(model, use_cache=True) -> list:
    idx = torch.tensor([[1, 2, 0], [0, 1, 1]])
    return model.generate(idx, 9, use_cache=use_cache).tolist()


class WithModel(unittest.TestCase):
    """Gives each test a model in eval mode, and a row that fills its block."""

    def setUp(self):
        set_seed(5)
        # Float64 leaves no near ties to rounding.
        self.model = tiny_gpt().double()
        self.idx = torch.randint(11, (1, 8))

    def check_generation(self, model) -> None:
        self.assertEqual(greedy(model), greedy(model, use_cache=False))


class Scripts(unittest.TestCase):
    def test_the_usual_script(self):
        set_seed(3407)
        model_config = GPT.get_default_config()
        model_config.model_type = "gpt-nano"
        model_config.vocab_size = 5
        model_config.block_size = 8
        model = GPT(model_config)

        train_config = Trainer.get_default_config()
        train_config.learning_rate = 5e-4
        train_config.max_iters = 20
        train_config.num_workers = 0
        trainer = Trainer(train_config, model, Pairs())

        lines = []
        def report(trainer):
            if trainer.iter_num % 10 == 0:
                lines.append(f"iter {trainer.iter_num}: {trainer.loss.item():.5f}")
        trainer.set_callback("on_batch_end", report)
        trainer.run()

        self.assertEqual([line.split(":")[0] for line in lines], ["iter 0", "iter 10"])
        model.eval()
        prompt = torch.tensor([[0, 1, 2, 1]], dtype=torch.long).to(trainer.device)
        with torch.no_grad():
            self.assertEqual(model.generate(prompt, 4, do_sample=False).shape, (1, 8))

    def test_every_part_has_its_name(self):
        for module in (model_module, trainer_module):
            self.assertIs(module.CN, CfgNode)
        model = GPT(tiny_config()).eval()
        block = model.transformer.h[0]
        for dropout in (model.transformer.drop, block.attn.attn_dropout,
                        block.attn.resid_dropout, block.mlp.dropout):
            self.assertIsInstance(dropout, nn.Dropout)
        self.assertIsInstance(block.mlp.act, NewGELU)
        self.assertIs(block.mlp["act"], block.mlp.act)
        self.assertEqual((model.block_size, block.attn.n_head, block.attn.n_embd), (8, 2, 16))
        x = torch.randn(1, 3, 16)
        self.assertTrue(torch.equal(block.mlpf(x), block.mlp(x)))

    def test_arguments_have_minGPTs_names_and_order(self):
        for function, names in (
            (GPT, "config"), (GPT.forward, "self idx targets"), (Block.forward, "self x"),
            (GPT.generate, "self idx max_new_tokens temperature do_sample top_k"),
            (GPT.from_pretrained, "model_type"), (GPT._init_weights, "self module"),
            (GPT.configure_optimizers, "self train_config"),
            (Trainer, "config model train_dataset"),
            (Trainer.add_callback, "self onevent callback"),
            (Trainer.set_callback, "self onevent callback"),
            (Trainer.trigger_callbacks, "self onevent"),
            (Encoder, "encoder bpe_merges"), (Encoder.encode, "self text"),
            (Encoder.decode, "self bpe_idx"), (BPETokenizer.__call__, "self text return_tensors"),
            (BPETokenizer.decode, "self idx"), (CfgNode.merge_from_dict, "self d"),
            (CfgNode.merge_from_args, "self args"), (set_seed, "seed"),
        ):
            expected = names.split()
            self.assertEqual([*inspect.signature(function).parameters][:len(expected)], expected)

    def test_the_config_is_completed_and_builds_a_second_model(self):
        config = tiny_config(model_type="gpt-nano", n_layer=None, n_head=None, n_embd=None)
        expected = vars(config) | dict(n_layer=3, n_head=3, n_embd=48)
        first = GPT(config)
        self.assertEqual(vars(config), expected)
        self.assertEqual(vars(GPT(config).config), vars(first.config))

    def test_settings_may_be_any_object_with_minGPTs_fields(self):
        class Sizes:
            model_type = None
            n_layer, n_head, n_embd, vocab_size, block_size = 2, 2, 16, 11, 8
            # Libraries of configurations keep fields of their own.
            _parent = None

        class Settings:
            device, max_iters, batch_size, num_workers = "cpu", 2, 4, 0
            learning_rate, betas, weight_decay, grad_norm_clip = 5e-4, (0.9, 0.95), 0.1, 1.0

        model = GPT(Sizes)
        self.assertNotIn("_parent", vars(model.config))
        trainer = Trainer(Settings, model, Pairs())
        trainer.run()
        self.assertEqual(trainer.iter_num, 2)
        parts = SimpleNamespace(n_embd=16, n_head=2, block_size=8, attn_pdrop=0.1, resid_pdrop=0.1)
        for kind in (Block, CausalSelfAttention):
            self.assertEqual(kind(parts)(torch.randn(2, 5, 16)).shape, (2, 5, 16))

    def test_a_subclass_may_have_minGPTs_defaults_and_its_own(self):
        class Mine(GPT):
            @staticmethod
            def get_default_config():
                return CfgNode(model_type="gpt-nano", n_layer=None, n_head=None, n_embd=None,
                               vocab_size=11, block_size=8, embd_pdrop=0.1, resid_pdrop=0.1,
                               attn_pdrop=0.1, rank=4)

        class MyTrainer(Trainer):
            @staticmethod
            def get_default_config():
                return CfgNode(device="cpu", num_workers=0, max_iters=2, batch_size=4,
                               learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1,
                               grad_norm_clip=1.0, patience=3)

        model = Mine(Mine.get_default_config())
        trainer = MyTrainer(MyTrainer.get_default_config(), model, Pairs())
        trainer.run()
        self.assertEqual((model.config.rank, trainer.config.patience), (4, 3))
        self.assertEqual(trainer.iter_num, 2)


class Weights(WithModel):
    def test_fresh_ones_equal_minGPTs_bit_for_bit(self):
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
        # The head is a matrix of its own, not tied to wte.
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
        state = GPT(tiny_config(n_layer=n_layer)).state_dict()
        self.assertTrue(torch.equal(torch.rand(3), after))
        for name, layer in layers.items():
            self.assertTrue(torch.equal(state.pop(f"{name}.weight"), layer.weight), name)
            if getattr(layer, "bias", None) is not None:
                self.assertFalse(state.pop(f"{name}.bias").any())
        self.assertEqual(list(state), [])

    def test_an_overridden_init_weights_counts(self):
        class Ones(GPT):
            def _init_weights(self, module):
                if isinstance(module, nn.Embedding):
                    nn.init.ones_(module.weight)

        self.assertTrue((Ones(tiny_config()).transformer.wte.weight == 1).all())

    def test_init_weights_makes_a_trained_model_fresh(self):
        self.model.apply(self.model._init_weights)
        for name, parameter in self.model.named_parameters():
            if ".ln_" in name:
                self.assertTrue((parameter == name.endswith("weight")).all(), name)

    def test_a_file_of_minGPT_with_its_masks_loads(self):
        state = self.model.state_dict()
        for i in range(2):
            state[f"transformer.h.{i}.attn.bias"] = torch.ones(8, 8).tril().view(1, 1, 8, 8)
        for asked_for in (False, True):
            model = GPT(tiny_config()).double().eval()
            if asked_for:
                # A mask that somebody asked for takes part from then on.
                model.transformer.h[0].attn.bias
            model.load_state_dict(state)
            torch.testing.assert_close(model(self.idx)[0], self.model(self.idx)[0])

    def test_an_attention_with_minGPTs_mask_takes_the_weights_of_one_without(self):
        class Masked(nn.Module):
            def __init__(self, config):
                super().__init__()
                self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
                self.c_proj = nn.Linear(config.n_embd, config.n_embd)
                self.register_buffer("bias", torch.ones(1, 1, 8, 8))

        model = tiny_gpt()
        for block in model.transformer.h:
            block.attn = Masked(tiny_config())
        model.load_state_dict(self.model.state_dict())
        theirs, ours = (m.transformer.h[1].attn.c_attn.weight for m in (model, self.model))
        torch.testing.assert_close(theirs, ours.float())
        self.assertTrue(model.transformer.h[1].attn.bias.all())

    def test_a_larger_vocabulary_in_a_finished_model(self):
        layers = tiny_gpt()
        layers.transformer.wte = nn.Embedding(13, 16)
        layers.lm_head = nn.Linear(16, 13, bias=False)
        matrices = tiny_gpt()
        matrices.transformer.wte.weight = nn.Parameter(torch.randn(13, 16))
        matrices.lm_head.weight = nn.Parameter(torch.randn(13, 16))
        for model in (layers, matrices):
            self.assertEqual(model.generate(torch.tensor([[12, 11]]), 3).shape, (1, 5))

    def test_an_embedding_alone_leaves_the_head_as_it_is(self):
        model = tiny_gpt()
        before = model.lm_head.weight.detach().clone()
        part = {"transformer.wte.weight": torch.randn(11, 16)}
        self.assertIn("lm_head.weight", model.load_state_dict(part, strict=False).missing_keys)
        self.assertTrue(torch.equal(model.lm_head.weight, before))


class Subclasses(WithModel):
    def test_another_head_on_the_features_learns(self):
        class Classifier(GPT):
            def __init__(self, config):
                super().__init__(config)
                self.lm_head = nn.Linear(config.n_embd, 3)

            def forward(self, idx, targets=None):
                logits = self.lm_head(self.features(idx)[:, -1])
                return logits, F.cross_entropy(logits, targets)

        x = torch.randint(3, (12, 5))
        trainer = make_trainer(Classifier(tiny_config()), TensorDataset(x, x[:, 0]), max_iters=60,
                               batch_size=12, learning_rate=1e-2)
        trainer.run()
        # To know nothing costs 1.1 nats.
        self.assertLess(trainer.loss.item(), 0.7)

    def test_a_forward_over_parts_with_other_names(self):
        class Renamed(GPT):
            def __init__(self, config):
                super().__init__(config)
                self.embed = self.transformer.pop("wte")
                self.blocks = self.transformer.pop("h")

            def forward(self, idx, targets=None):
                pos = torch.arange(idx.size(1)).unsqueeze(0)  # (1, T)
                x = self.transformer.drop(self.embed(idx) + self.transformer.wpe(pos))
                for block in self.blocks:
                    x = block(x)
                return self.lm_head(self.transformer.ln_f(x)), None

        model = Renamed(tiny_config())
        self.assertEqual(model.generate(torch.tensor([[1, 2]]), 3).shape, (1, 5))
        model.transformer.h = nn.ModuleDict(dict(one=model.blocks[0]))
        self.assertEqual(model.generate(torch.tensor([[1, 2]]), 3).shape, (1, 5))
        model.configure_optimizers(Trainer.get_default_config())

    def test_a_module_for_positions_gets_a_row_of_them(self):
        class Sines(nn.Module):
            def forward(self, pos):
                B, T = pos.shape
                return torch.sin(pos.view(B, T, 1) / 2.0 ** torch.arange(16))

        self.model.transformer.wpe = Sines()
        self.assertEqual(self.model(self.idx)[0].shape, (1, 8, 11))
        self.check_generation(self.model)

    def test_a_loss_of_ones_own_counts_its_own_targets(self):
        class OwnLoss(GPT):
            def forward(self, idx, targets=None, cache=None):
                logits, _ = super().forward(idx)
                return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())

        # The loss ignores these targets, which GPT's would not count.
        x = torch.randint(11, (8, 8))
        model = OwnLoss(tiny_config())
        before = model.lm_head.weight.detach().clone()
        make_trainer(model, TensorDataset(x, -torch.ones(8)), max_iters=1).run()
        self.assertFalse(torch.equal(model.lm_head.weight, before))

    def test_a_loss_without_targets_learns(self):
        class Reconstruction(nn.Linear):
            def forward(self, x, y):
                return None, F.mse_loss(super().forward(x), x)

        model = Reconstruction(3, 3)
        before = model.weight.detach().clone()
        make_trainer(model, TensorDataset(torch.randn(8, 3), torch.empty(8, 0)), max_iters=1).run()
        self.assertFalse(torch.equal(model.weight, before))

    def test_a_dataset_that_changes_its_examples(self):
        class NoTargets(TokenDataset):
            def __getitem__(self, index):
                x, y = super().__getitem__(index)
                return x, torch.full_like(y, -1)

        trainer = make_trainer(train_dataset=NoTargets(np.arange(11).repeat(4), 8))
        trainer.run()
        self.assertEqual(trainer.loss.item(), 0)


class Parallel(Block):
    def forward(self, x):
        return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))


class Forgetful(CausalSelfAttention):
    """Takes a cache and leaves it empty."""

    def forward(self, x, cache=None):
        return super().forward(x)


class Recurrent(nn.GRU):
    """Stands for a block, or for attention."""

    def __init__(self, width):
        super().__init__(width, width, batch_first=True)

    def forward(self, x):
        return super().forward(x)[0]


class Blocks(WithModel):
    def test_parts_of_ones_own_train_and_write(self):
        config = tiny_config()
        patched = Block(config)
        forward = patched.forward
        patched.forward = lambda x: forward(x)
        in_c = NewGELU()
        in_c.forward = torch.tanh
        for place, part in (
            ("transformer.h.0", Parallel(config)), ("transformer.h.0", Recurrent(16)),
            ("transformer.h.0", patched), ("transformer.h.0.mlp.act", in_c),
            ("transformer.h.0.attn", Recurrent(16)), ("transformer.h.0.attn", Forgetful(config)),
        ):
            with self.subTest(place, part=type(part)):
                model = copy.deepcopy(self.model)
                model.set_submodule(place, part.double())
                make_trainer(model, max_iters=2).run()
                self.assertTrue(all(p.grad.any() for p in part.parameters()))
                self.check_generation(model.eval())

    def test_a_scripted_part_writes(self):
        mlp = self.model.transformer.h[0].mlp
        plain = nn.Sequential(mlp.c_fc, nn.ReLU(), mlp.c_proj)
        model = copy.deepcopy(self.model)
        expected = copy.deepcopy(self.model)
        with warnings.catch_warnings():
            # torch advises its newer compiler.
            warnings.simplefilter("ignore")
            model.transformer.h[0].mlp = torch.jit.script(copy.deepcopy(plain))
        expected.transformer.h[0].mlp = plain
        self.assertEqual(greedy(model), greedy(expected))

    def test_the_name_mlpf_may_be_given_to_another_part(self):
        part = nn.Linear(16, 16).double()

        class Method(Block):
            def mlpf(self, x):
                return part(x)

        other = copy.deepcopy(self.model)
        other.transformer.h[0].mlp = part
        for name, value in (("mlpf", part), ("mlpf", part.forward), ("__class__", Method)):
            with self.subTest(name, value=value):
                model = copy.deepcopy(self.model)
                setattr(model.transformer.h[0], name, value)
                self.assertTrue(torch.equal(model(self.idx)[0], other(self.idx)[0]))
                self.check_generation(model)

    def test_a_call_of_ones_own_counts(self):
        for place in ("transformer.h.0", "transformer.h.0.attn", "transformer.h.0.mlp.act"):
            class Called(type(self.model.get_submodule(place))):
                def __call__(self, x):
                    return super().__call__(x).cumsum(dim=1)

            with self.subTest(place):
                model = copy.deepcopy(self.model)
                model.get_submodule(place).__class__ = Called
                self.check_generation(model)

    def test_without_any_it_trains_and_writes(self):
        model = GPT(tiny_config(n_layer=0))
        make_trainer(model, max_iters=2).run()
        self.model.transformer.h = nn.ModuleList()
        for without in (model, self.model):
            self.check_generation(without)

    def test_a_formula_of_ones_own_counts(self):
        def add_up(q, k, v):
            """Adds up the values of all tokens so far."""
            return v.cumsum(dim=2)

        class Property(CausalSelfAttention):
            attend = property(lambda self: add_up)

        class Reversed(CausalSelfAttention):
            def compute_qkv(self, x):
                """Gives the keys another order, which depends on how many there are."""
                q, k, v = super().compute_qkv(x)
                return q, k.flip(2), v

        for name, value in (("attend", add_up), ("__class__", Property), ("__class__", Reversed)):
            model = copy.deepcopy(self.model)
            setattr(model.transformer.h[0].attn, name, value)
            self.assertNotEqual(greedy(model), greedy(self.model))
            self.check_generation(model)

    def test_a_cache_comes_by_its_name(self):
        class Masked(CausalSelfAttention):
            def forward(self, x, mask=None, cache=None):
                assert mask is None
                return super().forward(x, cache)

            def compute_qkv(self, x, mask=None, cache=None):
                assert mask is None
                return super().compute_qkv(x, cache)

        class MaskedBlock(Block):
            def forward(self, x, mask=None, cache=None):
                assert mask is None
                return super().forward(x, cache)

        class Weighted(GPT):
            def features(self, idx, weights=None, cache=None):
                assert weights is None
                return super().features(idx, cache)

        for place, part in (("", Weighted), ("transformer.h.0", MaskedBlock),
                            ("transformer.h.0.attn", Masked)):
            with self.subTest(place):
                model = copy.deepcopy(self.model)
                model.get_submodule(place).__class__ = part
                self.assertTrue(uses_cache(model))
                self.check_generation(model)

    def test_parts_inside_attention_count_beside_a_cache(self):
        class Double(nn.Module):
            def forward(self, att, cache=None):
                return 2 * att

        class Reversed(CausalSelfAttention):
            def attend(self, q, k, v, cache=None):
                return super().attend(-q, k, v)

        for change in (lambda attn: setattr(attn, "attn_dropout", Double()),
                       lambda attn: setattr(attn, "__class__", Reversed)):
            model = copy.deepcopy(self.model)
            change(model.transformer.h[0].attn)
            self.assertTrue(uses_cache(model))
            cache = [KVCache(8) for _ in model.transformer.h]
            torch.testing.assert_close(model(self.idx, cache=cache)[0], model(self.idx)[0][:, -1:])


class Masks(WithModel):
    def sees_ahead(self, model) -> bool:
        changed = self.idx.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 11
        return not torch.allclose(model(changed)[0][:, 0], model(self.idx)[0][:, 0])

    def test_minGPTs_mask_can_be_asked_for(self):
        attention = self.model.transformer.h[0].attn
        # A part of one's own may lack a weight.
        attention.c_proj = nn.Sequential(attention.c_proj)
        before = self.model(self.idx)[0]
        mask = attention.bias
        self.assertTrue(torch.equal(mask, torch.ones(8, 8).tril().view(1, 1, 8, 8)))
        torch.testing.assert_close(self.model(self.idx)[0], before)
        self.assertNotIn("transformer.h.0.attn.bias", self.model.state_dict())

    def test_it_can_be_assigned_registered_and_edited(self):
        def assign(attn):
            attn.bias = torch.ones(1, 1, 8, 8)

        def register(attn):
            attn.register_buffer("bias", torch.ones(1, 1, 8, 8))

        def assign_buffer(attn):
            attn.bias = nn.Buffer(torch.ones(1, 1, 8, 8))

        def edit(attn):
            attn.bias[:] = 1

        self.assertFalse(self.sees_ahead(self.model))
        for change in (assign, register, assign_buffer, edit):
            with self.subTest(change.__name__):
                model = copy.deepcopy(self.model)
                for block in model.transformer.h:
                    change(block.attn)
                    self.assertFalse(block.attn.fused)
                self.assertTrue(self.sees_ahead(model))
                self.assertTrue(self.sees_ahead(copy.deepcopy(model)))
                self.check_generation(model)

    def test_it_counts_wherever_attention_stands(self):
        class Wrapped(nn.Module):
            def __init__(self, block):
                super().__init__()
                self.block = block

            def forward(self, x, cache=None):
                return self.block(x, cache)

        for block in self.model.transformer.h:
            block.attn.bias = torch.ones(1, 1, 8, 8)
        self.model.transformer.h = nn.ModuleList(map(Wrapped, self.model.transformer.h))
        self.check_generation(self.model)

    def test_it_can_be_deleted(self):
        class Own(CausalSelfAttention):
            def __init__(self, config):
                super().__init__(config)
                del self.bias
                self.register_buffer("bias", torch.ones(1, 1, 8, 8))

        before = self.model(self.idx)[0]
        for block in self.model.transformer.h:
            del block.attn.bias
        torch.testing.assert_close(self.model(self.idx)[0], before)
        for block in self.model.transformer.h:
            block.attn = Own(tiny_config()).double().eval()
        self.assertTrue(self.sees_ahead(self.model))

    def test_it_is_a_buffer_without_the_usual_start_as_well(self):
        class Own(CausalSelfAttention):
            def __init__(self, attention):
                nn.Module.__init__(self)
                vars(self).update(vars(attention), _buffers={})
                self.register_buffer("bias", torch.ones(1, 1, 8, 8))

        for block in self.model.transformer.h:
            block.attn = Own(block.attn)
        self.assertTrue(self.sees_ahead(self.model))
        self.check_generation(self.model)
        self.assertEqual(self.model.to("meta").transformer.h[0].attn.bias.device.type, "meta")

    def test_a_buffer_with_the_name_mask(self):
        expected = self.model(self.idx)[0]
        attention = self.model.transformer.h[0].attn
        attention.register_buffer("mask", torch.ones(8, 8).triu(1).bool())
        attention.fused = False
        torch.testing.assert_close(self.model(self.idx)[0], expected)


class AttentionMaps(WithModel):
    def test_by_hooks_on_attn_dropout(self):
        expected = self.model(self.idx)[0]
        written = greedy(self.model)
        maps = []
        for block in self.model.transformer.h:
            block.attn.attn_dropout.register_forward_hook(
                lambda module, args, output: maps.append(output.detach()))
        torch.testing.assert_close(self.model(self.idx)[0], expected)
        self.assertEqual([att.shape for att in maps], [(1, 2, 8, 8)] * 2)
        for att in maps:
            torch.testing.assert_close(att.sum(-1), torch.ones(1, 2, 8, dtype=torch.float64))
            self.assertFalse(att.triu(1).any())

        # With hooks, generation reads whole windows: the maps are minGPT's.
        maps.clear()
        self.assertEqual(greedy(self.model), written)
        self.assertEqual([att.size(-1) for att in maps[:4]], [3, 3, 4, 4])

    def test_the_name_att_is_free(self):
        class Scaled(CausalSelfAttention):
            def __init__(self, config):
                super().__init__(config)
                self.att = nn.Linear(16, 16)

            def forward(self, x):
                return super().forward(self.att(x))

        self.assertEqual(Scaled(tiny_config())(torch.randn(2, 5, 16)).shape, (2, 5, 16))

    def test_by_any_other_way_to_watch_it(self):
        class Recorder(nn.Module):
            def forward(self, att):
                seen.append("replaced")
                return att

        seen = []
        model = GPT(tiny_config(n_layer=3, attn_pdrop=0.0))
        first, second, third = (block.attn for block in model.transformer.h)
        first.attn_dropout.register_full_backward_hook(lambda *args: seen.append("backward"))
        second.attn_dropout.forward = lambda att: seen.append("patched") or att
        third.attn_dropout = Recorder()
        model(self.idx, self.idx)[1].backward()
        self.assertEqual(seen, ["patched", "replaced", "backward"])


def shift(x):
    """Gives each token the vector of the one before."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)


class Shifting(nn.Linear):
    """Changes a known layer in a subclass."""

    def forward(self, x):
        return super().forward(shift(x))


def strange_parts(width) -> dict:
    """Returns layers (B, T, width) -> (B, T, width) by name; all but the last mix tokens."""
    patched = nn.Linear(width, width)
    patched.forward = lambda x: F.linear(shift(x), patched.weight, patched.bias)
    hooked = nn.Linear(width, width)
    hooked.register_forward_pre_hook(lambda module, args: shift(args[0]))
    return {
        "subclass": Shifting(width, width),
        "patched": patched,
        "hooked": hooked,
        "recurrent": Recurrent(width),
        "softmax over time": nn.Softmax(dim=1),
        "tokenwise": nn.Sequential(nn.Linear(width, width), nn.GELU()),
    }


# Names of parts, and the width of what they return.
PLACES = {
    "transformer.wte": 16, "transformer.ln_f": 16, "lm_head": 11, "transformer.h.0": 16,
    "transformer.h.1.attn": 16, "transformer.h.1.attn.c_attn": 48, "transformer.h.0.mlp": 16,
    "transformer.h.0.mlp.act": 64,
}


class Generation(WithModel):
    """Holds generation with parts of all kinds against generation without a cache."""

    def test_a_strange_part_in_any_place(self):
        for place, width in PLACES.items():
            for name, part in strange_parts(width).items():
                with self.subTest(place, part=name):
                    model = copy.deepcopy(self.model)
                    both = nn.Sequential(model.get_submodule(place), part.double())
                    model.set_submodule(place, both)
                    self.check_generation(model)

    def test_attention_in_another_place(self):
        places = {"lm_head": 11, "transformer.ln_f": 16, "transformer.h.0.mlp": 16,
                  "transformer.h.0.attn.c_proj": 16}
        for place, width in places.items():
            with self.subTest(place):
                model = copy.deepcopy(self.model)
                block = tiny_gpt(n_embd=width, n_head=1).transformer.h[0].double()
                model.set_submodule(place, nn.Sequential(model.get_submodule(place), block))
                self.assertFalse(uses_cache(model))
                self.check_generation(model)

    def test_attention_that_stands_in_two_places(self):
        for place in ("transformer.ln_f", "transformer.h.1.mlp"):
            with self.subTest(place):
                model = copy.deepcopy(self.model)
                model.set_submodule(place, model.transformer.h[0].attn)
                self.assertFalse(uses_cache(model))
                self.check_generation(model)

    def test_a_block_in_place_of_attention(self):
        self.model.transformer.h[0].attn = Block(tiny_config()).double()
        self.assertTrue(uses_cache(self.model))
        self.check_generation(self.model)

    def test_a_model_of_other_parts(self):
        class Other(GPT):
            def __init__(self, config):
                nn.Module.__init__(self)
                self.block_size = config.block_size
                self.layers = nn.Sequential(nn.Embedding(11, 16), Block(config), nn.Linear(16, 11))

            def forward(self, idx, targets=None):
                return self.layers(idx), None

        self.check_generation(Other(tiny_config()).double())

    def test_patched_classes_and_global_hooks(self):
        forward = MLP.forward
        with mock.patch.object(MLP, "forward", lambda self, x: forward(self, shift(x))):
            self.check_generation(self.model)
        features = GPT.features
        with mock.patch.object(GPT, "features", lambda self, idx: features(self, idx.flip(0))):
            self.check_generation(self.model)

        def hook(module, args, output):
            return shift(output) if isinstance(module, MLP) else None

        with nn.modules.module.register_module_forward_hook(hook):
            self.check_generation(self.model)

    def test_another_forward_of_the_model_counts(self):
        def add_up(idx, targets=None):
            """Writes as the next token the sum of all so far."""
            return F.one_hot(idx.cumsum(dim=1) % 11, 11), None

        class Adder(GPT):
            def forward(self, idx, targets=None):
                return add_up(idx)

        class Called(GPT):
            def __call__(self, idx, targets=None):
                return add_up(idx)

        patched = tiny_gpt()
        patched.forward = add_up
        hooked = tiny_gpt()
        hooked.register_forward_hook(lambda module, args, output: add_up(args[0]))
        for model in (Adder(tiny_config()), Called(tiny_config()), patched, hooked):
            self.assertEqual(model.generate(torch.tensor([[1, 2, 0]]), 4).tolist(),
                             [[1, 2, 0, 3, 6, 1, 2]])

    def test_tokens_beyond_the_embedding_are_for_a_part_that_knows_them(self):
        class Padded(GPT):
            def forward(self, idx, targets=None):
                return super().forward(idx.clamp(min=0), targets)

        model = Padded(tiny_config()).double()
        padded = model.generate(torch.tensor([[-1, 3]]), 5)
        self.assertTrue(padded[:, 1:].equal(model.generate(torch.tensor([[0, 3]]), 5)[:, 1:]))

    def test_tensors_that_are_kept_may_be_used_in_training(self):
        class Scaled(NewGELU):
            scale = None

            def forward(self, x, cache=None):
                if self.scale is None:
                    self.scale = torch.full_like(x[0, 0], 2)
                return super().forward(x) * self.scale

        scaled = copy.deepcopy(self.model)
        scaled.transformer.h[0].mlp.act = Scaled()
        greedy(scaled)
        scaled(self.idx, self.idx)[1].backward()

        attention = self.model.transformer.h[0].attn
        attention.fused = False
        greedy(self.model)
        attention.att *= torch.ones(2, 1, 1, requires_grad=True)


class OwnLoop(unittest.TestCase):
    def test_with_the_optimizer_of_three_settings(self):
        set_seed(11)
        model = GPT(tiny_config())
        config = CfgNode(learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.2)
        optimizer = model.configure_optimizers(config)
        idx = torch.randint(11, (8, 8))
        losses = []
        for _ in range(30):
            logits, loss = model(idx[:, :-1], idx[:, 1:])
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        self.assertLess(losses[-1], 0.7 * losses[0])

    def test_another_module_may_borrow_methods(self):
        class Other(nn.Module):
            block_size = 8
            configure_optimizers = GPT.configure_optimizers
            generate = GPT.generate

            def __init__(self):
                super().__init__()
                self.layers = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 11))

            def forward(self, idx, targets=None):
                return self.layers(idx), None

        other = Other()
        groups = other.configure_optimizers(Trainer.get_default_config()).param_groups
        self.assertIs(groups[0]["params"][0], other.layers[1].weight)
        self.assertEqual([len(group["params"]) for group in groups], [1, 2])
        self.assertEqual(other.generate(torch.zeros(2, 3, dtype=torch.long), 9).shape, (2, 12))

    def test_a_group_that_is_added_decays_by_torchs_default(self):
        optimizer = GPT(tiny_config()).configure_optimizers(Trainer.get_default_config())
        parameter = nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [parameter]})
        expected = torch.optim.AdamW([parameter]).defaults["weight_decay"]
        self.assertEqual([group["weight_decay"] for group in optimizer.param_groups],
                         [0.1, 0.0, expected])

    def test_in_a_subclass_of_the_trainer_without_a_dataset(self):
        class Mine(Trainer):
            def run(self):
                self.optimizer = self.model.configure_optimizers(self.config)
                self.iter_num = 0
                while self.iter_num < self.config.max_iters:
                    idx = torch.randint(11, (4, 8), device=self.device)
                    logits, self.loss = self.model(idx, idx)
                    self.model.zero_grad(set_to_none=True)
                    self.loss.backward()
                    self.optimizer.step()
                    self.trigger_callbacks("on_batch_end")
                    self.iter_num += 1

        trainer = Mine(CfgNode(device="cpu", max_iters=4), GPT(tiny_config()), None)
        seen = record(trainer, lambda trainer: trainer.iter_num)
        trainer.run()
        self.assertEqual(seen, [0, 1, 2, 3])


class Callbacks(unittest.TestCase):
    def test_set_replaces_add_adds_and_any_event_may_have_some(self):
        trainer = make_trainer(max_iters=2)
        calls = []
        trainer.set_callback("on_batch_end", lambda trainer: calls.append("replaced"))
        trainer.set_callback("on_batch_end", lambda trainer: calls.append(trainer.iter_num))
        trainer.add_callback("on_batch_end", lambda trainer: trainer.trigger_callbacks("on_mine"))
        trainer.add_callback("on_mine", lambda trainer: calls.append("mine"))
        trainer.run()
        self.assertEqual(calls, [0, "mine", 1, "mine"])
        trainer.trigger_callbacks("on_nothing")

    def test_they_see_when_the_last_step_ended(self):
        trainer = make_trainer(max_iters=2)
        seen = record(trainer, lambda trainer: trainer.iter_time)
        with mock.patch("time.time", lambda: 1e9):
            trainer.run()
        self.assertEqual([*seen, trainer.iter_time], [1e9] * 3)

    def test_they_may_set_iter_num_to_end_the_run(self):
        trainer = make_trainer(max_iters=100)
        trainer.set_callback("on_batch_end", lambda trainer: setattr(trainer, "iter_num", 999))
        trainer.run()
        self.assertEqual((len(trainer.train_dataset.drawn), trainer.steps_done), (8, 1))


class Rates(unittest.TestCase):
    def test_written_by_a_callback_also_after_an_interruption(self):
        def halve(trainer):
            for group in trainer.optimizer.param_groups:
                group["lr"] *= 0.5
            if trainer.iter_num == 1:
                raise KeyboardInterrupt

        for kind in (Trainer, Run):
            trainer = make_trainer(kind=kind)
            used = record(trainer, rates)
            trainer.add_callback("on_batch_end", halve)
            with self.assertRaises(KeyboardInterrupt):
                trainer.run()
            trainer.run()
            self.assertEqual(used, [[0.01] * 2, [0.005] * 2, [0.0025] * 2, [0.00125] * 2])

    def test_written_by_a_callback_after_the_warm_up(self):
        def decay(trainer):
            for group in trainer.optimizer.param_groups:
                group["lr"] = 1 / 2 ** trainer.iter_num

        trainer = make_trainer(learning_rate=1.0, warmup_iters=2)
        used = record(trainer, lambda trainer: rates(trainer)[0])
        trainer.add_callback("on_batch_end", decay)
        trainer.run()
        self.assertEqual(used, [0.5, 1.0, 0.5, 0.25])

    def test_written_by_a_callback_in_the_last_step_of_the_warm_up_that_is_interrupted(self):
        def halve(trainer):
            for group in trainer.optimizer.param_groups:
                group["lr"] *= 0.5
            raise KeyboardInterrupt

        trainer = make_trainer(learning_rate=1.0, warmup_iters=2)
        used = record(trainer, lambda trainer: rates(trainer)[0])
        at_step(trainer, 1, halve)
        with self.assertRaises(KeyboardInterrupt):
            trainer.run()
        trainer.run()
        self.assertEqual(used, [0.5, 1.0, 0.5, 0.5])

    def test_set_by_a_scheduler_of_torch(self):
        def start(trainer):
            if trainer.iter_num == 0:
                trainer.scheduler = torch.optim.lr_scheduler.StepLR(
                    trainer.optimizer, step_size=1, gamma=0.5)

        for optimizer in ("adamw", "muon"):
            for interrupt_at in ((), (0, 1, 2)):
                trainer = make_trainer(optimizer=optimizer)
                trainer.set_callback("on_train_start", start)
                used = record(trainer, lambda trainer: rates(trainer)[0])
                trainer.add_callback("on_batch_end", lambda trainer: trainer.scheduler.step())
                for step in interrupt_at:
                    at_step(trainer, step, mock.Mock(side_effect=KeyboardInterrupt))
                while trainer.steps_done < 4:
                    with contextlib.suppress(KeyboardInterrupt):
                        trainer.run()
                self.assertEqual(used, [1e-2, 5e-3, 2.5e-3, 1.25e-3])

    def test_set_by_an_object_around_an_optimizer(self):
        class Noam:
            def __init__(self, optimizer):
                self.optimizer = optimizer
                self.steps = 0

            def step(self):
                self.steps += 1
                for group in self.optimizer.param_groups:
                    group["lr"] = 1e-3 * self.steps
                self.optimizer.step()

        class Mine(GPT):
            def configure_optimizers(self, train_config):
                return Noam(super().configure_optimizers(train_config))

        trainer = make_trainer(Mine(tiny_config()))
        at_step(trainer, 1, mock.Mock(side_effect=KeyboardInterrupt))
        with self.assertRaises(KeyboardInterrupt):
            trainer.run()
        trainer.run()
        self.assertEqual((trainer.iter_num, trainer.optimizer.steps), (4, 2))

    def test_groups_of_ones_own_and_of_a_callback_keep_their_rates_under_a_schedule(self):
        class Mine(GPT):
            def configure_optimizers(self, train_config):
                return torch.optim.AdamW(self.transformer.parameters(), lr=1e-4)

        def bring(trainer):
            head = trainer.model.lm_head.parameters()
            trainer.optimizer.add_param_group(dict(params=head, lr=1e-2))

        trainer = make_trainer(Mine(tiny_config()), schedule="linear")
        trainer.set_callback("on_train_start", bring)
        used = record(trainer, rates)
        trainer.run()
        expected = [[1e-4 * (1 - step / 4), 1e-2 * (1 - step / 4)] for step in range(4)]
        torch.testing.assert_close(used, expected)


class Runs(unittest.TestCase):
    def drawn(self, trainer) -> list:
        """Returns the examples that a run draws."""
        trainer.train_dataset.drawn.clear()
        trainer.run()
        return trainer.train_dataset.drawn.copy()

    def test_changes_before_it_count(self):
        trainer = make_trainer()
        trainer.run()
        model = trainer.model
        model.lm_head = nn.Linear(16, 11)
        model.transformer.wte.requires_grad_(False)
        before = copy.deepcopy(model)
        trainer.config.weight_decay = 0.7
        trainer.config.learning_rate = 1e-5
        trainer.run()
        self.assertFalse(torch.equal(model.lm_head.weight, before.lm_head.weight))
        self.assertTrue(torch.equal(model.transformer.wte.weight, before.transformer.wte.weight))
        group = trainer.optimizer.param_groups[0]
        self.assertEqual((group["weight_decay"], group["lr"]), (0.7, 1e-5))

    def test_a_second_one_draws_other_examples(self):
        for seed in (None, 5):
            trainer = make_trainer(seed=seed)
            first = self.drawn(trainer)
            second = self.drawn(trainer)
            self.assertEqual((len(first), trainer.iter_num), (32, 4))
            self.assertNotEqual(first, second)

    def test_a_dataset_that_a_callback_gives_is_for_the_next_one(self):
        trainer = make_trainer(train_dataset=TokenDataset(torch.arange(12) % 5, block_size=8))
        larger = Pairs()
        at_step(trainer, 0, lambda trainer: setattr(trainer, "train_dataset", larger))
        trainer.run()
        self.assertEqual(larger.drawn, [])
        self.assertEqual(len(self.drawn(trainer)), 32)

    def test_without_a_seed_torchs_seed_counts(self):
        examples = []
        for seed in (3, 3, 4):
            trainer = make_trainer(seed=None)
            torch.manual_seed(seed)
            examples.append(self.drawn(trainer))
        self.assertEqual(examples[0], examples[1])
        self.assertNotEqual(examples[0], examples[2])

    def test_without_replacement_it_is_an_epoch(self):
        trainer = make_trainer(replacement=False, batch_size=250)
        self.assertEqual(sorted(self.drawn(trainer)), list(range(1000)))

    def test_max_iters_is_any_number(self):
        for max_iters, steps in ((0, 0), (2.5, 3), (3.0, 3), (len(Pairs()) / 320 * 2, 7)):
            trainer = make_trainer(max_iters=max_iters)
            trainer.run()
            self.assertEqual(trainer.iter_num, steps)

    def test_it_says_where_it_runs_and_which_settings_are_for_Run(self):
        with self.assertLogs("mingpt", "INFO") as logged:
            model = GPT(tiny_config())
            make_trainer(model, work_dir="out", eval_interval=10).run()
        self.assertEqual([record.getMessage() for record in logged.records][1:], [
            "Trainer (see Run) does not use work_dir, eval_interval", "running on device cpu"])
