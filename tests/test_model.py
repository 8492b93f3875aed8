"""
The model against its formulas: an oracle in NumPy, the loss, the cache, generation.

    python -m unittest tests.test_model
"""

import concurrent.futures
import copy
import itertools
import math
import pickle
import unittest
from unittest import mock

import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn import functional as F

from common import oracle, tiny_config, tiny_gpt, uses_cache
from mingpt.generation import KVCache, logits_to_probs
from mingpt.model import GPT, PRESETS, CausalSelfAttention
from mingpt.trainer import Trainer
from mingpt.utils import set_seed


def set_fused(model, fused: bool) -> None:
    for block in model.transformer.h:
        block.attn.fused = fused


def new_cache(model) -> list[KVCache]:
    return [KVCache(model.block_size) for _ in model.transformer.h]


class Oracle(unittest.TestCase):
    """Holds the model against a forward pass that NumPy computes by the paper."""

    def setUp(self):
        set_seed(1)
        self.sizes = dict(vocab_size=67, block_size=12, n_embd=24, n_layer=3, n_head=4)
        self.model = tiny_gpt(**self.sizes).double()
        self.idx = torch.randint(67, (3, 12))
        self.targets = torch.randint(67, (3, 12))
        self.targets[0, :5] = -1
        self.targets[2] = -1

    def test_logits_by_the_kernel_and_step_by_step(self):
        # Float32 rounds 24 to 96 products of each sum to 24 bits, in 3 layers.
        bounds = {torch.float32: 1e-4, torch.float64: 1e-10}
        for tie, fused, dtype in itertools.product((False, True), (True, False), bounds):
            with self.subTest(tie=tie, fused=fused, dtype=dtype):
                model = tiny_gpt(tie_weights=tie, **self.sizes).to(dtype)
                set_fused(model, fused)
                logits, loss = model(self.idx)
                torch.testing.assert_close(logits.double(), oracle(model, self.idx),
                                           atol=bounds[dtype], rtol=bounds[dtype])
                self.assertIsNone(loss)
                features = model.features(self.idx)
                self.assertTrue(torch.equal(model.lm_head(features), logits))

    def test_loss_is_the_mean_over_targets_that_count(self):
        loss = self.model(self.idx, self.targets)[1]
        counted = self.targets != -1
        expected = F.cross_entropy(oracle(self.model, self.idx)[counted], self.targets[counted])
        torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
        self.assertEqual(self.model.count_targets(self.targets), 19)

        loss = self.model(self.idx, torch.full((3, 12), -1))[1]
        loss.backward()
        self.assertEqual(loss.item(), 0)
        self.assertFalse(any(p.grad.any() for p in self.model.parameters()))

    def test_gradient_by_the_kernel_and_step_by_step(self):
        names, parameters = zip(*self.model.named_parameters())

        def loss(*weights):
            weights = dict(zip(names, weights))
            return functional_call(self.model, weights, (self.idx, self.targets))[1]

        for fused in (True, False):
            set_fused(self.model, fused)
            # This compares slopes in a random direction.
            self.assertTrue(gradcheck(loss, parameters, fast_mode=True))

    def test_a_cache_changes_nothing(self):
        expected = oracle(self.model, self.idx)
        for fused, prompt in itertools.product((True, False), (1, 5, 12)):
            set_fused(self.model, fused)
            cache = new_cache(self.model)
            rows = [self.model(self.idx[:, :prompt], cache=cache)[0]]
            for t in range(prompt, 12):
                rows.append(self.model(self.idx[:, t:t + 1], cache=cache)[0])
            torch.testing.assert_close(
                torch.cat(rows, dim=1), expected[:, prompt - 1:], atol=1e-10, rtol=1e-10)


class Attention(unittest.TestCase):
    def setUp(self):
        set_seed(1)

    def test_att_holds_the_weights_before_dropout(self):
        attention = CausalSelfAttention(tiny_config(attn_pdrop=0.5))
        attention.fused = False
        attention(torch.randn(3, 5, 16))
        self.assertEqual(attention.att.shape, (3, 2, 5, 5))
        self.assertFalse(attention.att.requires_grad)
        torch.testing.assert_close(attention.att.sum(-1), torch.ones(3, 2, 5))
        self.assertFalse(attention.att.triu(1).any())
        # For a whole program it is set in the class.
        with mock.patch.object(CausalSelfAttention, "fused", False):
            other = CausalSelfAttention(tiny_config()).eval()
            other(torch.randn(3, 5, 16))
        self.assertEqual(other.att.shape, (3, 2, 5, 5))

    def test_dropout_keeps_the_mean_and_acts_in_training_only(self):
        attention = CausalSelfAttention(tiny_config(attn_pdrop=0.25, resid_pdrop=0.0))
        x = torch.randn(1, 2, 16).expand(4000, 2, 16)
        for fused in (True, False):
            attention.fused = fused
            drawn = attention.train()(x)
            expected = attention.eval()(x)
            self.assertTrue(torch.equal(attention(x), expected))
            self.assertFalse(torch.allclose(drawn, expected))
            # The mean of 4,000 draws strays by a standard deviation in 63.
            torch.testing.assert_close(drawn.mean(0), expected[0], atol=0.05, rtol=0)


class Config(unittest.TestCase):
    def test_presets(self):
        for name, sizes in PRESETS.items():
            config = GPT.get_default_config()
            config.merge_from_dict(dict(model_type=name, vocab_size=50257, block_size=1024))
            with torch.device("meta"), self.assertLogs("mingpt", "INFO") as logged:
                parts = GPT(config).transformer
            made = (len(parts.h), parts.h[0].attn.n_head, parts.wte.embedding_dim)
            self.assertEqual(made, sizes)
            if name == "gpt2":
                # OpenAI's checkpoint has as many, without a separate head.
                self.assertIn("number of parameters: 124.44M", logged.output[-1])

    def test_mistakes_are_named_and_change_nothing(self):
        for changes, message in (
            (dict(model_type="gpt3"), "model_type='gpt3', expected .*gpt2"),
            (dict(model_type="gpt-nano"), "'gpt-nano' means n_layer=3, but n_layer=2 is given"),
            (dict(vocab_size=None), "vocab_size=None"),
            (dict(block_size=8.0), "block_size=8.0"),
            (dict(n_head=None), "n_head=None, .*model_type"),
            (dict(n_embd=10, n_head=3), "n_embd=10, expected a multiple of n_head=3"),
            (dict(embd_pdrop=1.5), "embd_pdrop=1.5, expected a share"),
            (dict(resid_pdrop=math.nan), "resid_pdrop=nan"),
        ):
            config = tiny_config(**changes)
            before = str(config)
            with self.subTest(changes), self.assertRaisesRegex(ValueError, message):
                GPT(config)
            self.assertEqual(str(config), before)


class Model(unittest.TestCase):
    def setUp(self):
        set_seed(2)
        self.model = tiny_gpt()
        self.idx = torch.randint(11, (2, 8))

    def test_half_precision_is_scored_in_float32(self):
        for dtype in (torch.bfloat16, torch.float16):
            logits, loss = self.model.to(dtype)(self.idx, self.idx)
            self.assertEqual((logits.dtype, loss.dtype), (dtype, torch.float32))
            expected = F.cross_entropy(logits.float().flatten(0, 1), self.idx.flatten())
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
            self.assertEqual(logits_to_probs(logits[:, -1]).dtype, torch.float32)
            self.assertEqual(self.model.generate(self.idx, 4, do_sample=True).shape, (2, 12))

    def test_too_many_tokens_are_refused(self):
        with self.assertRaisesRegex(ValueError, "9 tokens.*block_size is 8"):
            self.model(torch.zeros(1, 9, dtype=torch.long))
        cache = new_cache(self.model)
        self.model(self.idx[:, :3], cache=cache)
        with self.assertRaisesRegex(ValueError, "2 tokens after a prompt, expected one at a time"):
            self.model(self.idx[:, :2], cache=cache)

    def test_deepcopy_and_pickle_are_independent(self):
        for tie in (False, True):
            model = tiny_gpt(tie_weights=tie)
            expected = model(self.idx)[0]
            for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                self.assertTrue(torch.equal(copied(self.idx)[0], expected))
                self.assertEqual(copied.lm_head.weight is copied.transformer.wte.weight, tie)
                for parameter in copied.parameters():
                    parameter.data += 1
                self.assertTrue(torch.equal(model(self.idx)[0], expected))

    def test_weights_load_with_and_without_a_head_of_their_own(self):
        own = tiny_gpt()
        shared = tiny_gpt(tie_weights=True)
        without_head = shared.state_dict()
        del without_head["lm_head.weight"]
        for saved, state in ((own, own.state_dict()), (shared, shared.state_dict()),
                             (shared, without_head)):
            for tie in (False, True):
                with self.subTest(tie=tie), self.assertLogs("mingpt", "INFO") as logged:
                    model = GPT(tiny_config(tie_weights=tie)).eval()
                    model.load_state_dict(state)
                self.assertTrue(torch.equal(model(self.idx)[0], saved(self.idx)[0]))
                # Only a head of its own unties the model, and the log says so.
                self.assertEqual(model.is_tied, tie and saved is shared)
                self.assertEqual(model.config.tie_weights, model.is_tied)
                unties = tie and saved is own
                self.assertEqual("a head of their own" in logged.output[-1], unties)

    def test_it_compiles_in_one_piece(self):
        compiled = torch.compile(self.model, fullgraph=True, backend="eager")
        expected = self.model(self.idx, self.idx)[1]
        torch.testing.assert_close(compiled(self.idx, self.idx)[1], expected)

    def test_compiled_blocks_need_two_translations(self):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        expected = self.model.double().generate(self.idx[:, :3], 5).tolist()
        for block in self.model.transformer.h:
            block.compile(backend=backend, fullgraph=True, dynamic=True)
        self.assertEqual(self.model.generate(self.idx[:, :3], 5).tolist(), expected)
        # One reads the prompt, one a token after it. All layers and lengths
        # share them.
        self.assertEqual(len(graphs), 2)
        for graph in graphs:
            self.assertIn("scaled_dot_product_attention", graph.code)


def plain_probs(logits: list, temperature: float, top_k: int | None, top_p: float | None) -> list:
    """Computes logits_to_probs for one row, token by token."""
    weights = [math.exp(logit / temperature) for logit in logits]
    likeliest = sorted(range(len(logits)), key=lambda i: -weights[i])[:top_k]
    total = sum(weights[i] for i in likeliest)
    kept = []
    for i in likeliest:
        if top_p is not None and sum(weights[j] for j in kept) / total >= top_p:
            break
        kept.append(i)
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def plain_generate(model, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
    """Writes in minGPT's way: reads the whole window for every token, one draw a step."""
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.block_size:])[0][:, -1]  # (B, V)
        # The likeliest token is drawn if no other one is left.
        k = top_k if do_sample else 1
        probs = [plain_probs(row, temperature, k, None) for row in logits.tolist()]
        token = torch.multinomial(torch.tensor(probs, dtype=torch.float64), 1)  # (B, 1)
        idx = torch.cat((idx, token), dim=1)
    return idx


class Generate(unittest.TestCase):
    def setUp(self):
        set_seed(5)
        # Float64 leaves no near ties to rounding.
        self.model = tiny_gpt().double()
        self.idx = torch.randint(11, (2, 3))

    def test_probabilities_are_a_plain_loop_over_the_tokens(self):
        for settings in itertools.product(
                (1.0, 0.6, 2.0), (None, 1, 5, 30), (None, 0.01, 0.5, 0.9, 1.0)):
            with self.subTest(settings):
                logits = torch.randn(3, 20, dtype=torch.float64) * 3
                expected = [plain_probs(row, *settings) for row in logits.tolist()]
                torch.testing.assert_close(
                    logits_to_probs(logits, *settings), torch.tensor(expected, dtype=logits.dtype))

    def test_it_equals_a_plain_loop_with_and_without_cache(self):
        self.assertTrue(uses_cache(self.model))
        for length, batch, settings, use_cache in itertools.product(
                (1, 4, 8, 13), (1, 5), ((1.0, False), (1.0, True), (0.7, True, 4)), (True, False)):
            with self.subTest(length=length, batch=batch, settings=settings, use_cache=use_cache):
                idx = torch.randint(11, (batch, length))
                set_seed(6)
                expected = plain_generate(self.model, idx, 15, *settings).tolist()
                set_seed(6)
                written = self.model.generate(idx, 15, *settings, use_cache=use_cache)
                self.assertEqual(written.tolist(), expected)

    def test_the_cache_reads_each_token_once(self):
        lengths = []
        features = self.model.features

        def watch(idx, cache=None):
            lengths.append(idx.size(1))
            return features(idx, cache)

        with mock.patch.object(self.model, "features", watch):
            self.model.generate(self.idx, 8)
        # Three tokens of prompt, five to fill the block, then a window.
        self.assertEqual(lengths, [3, 1, 1, 1, 1, 1, 8, 8])

    def test_a_long_text_costs_no_more_a_token_than_a_short_one(self):
        with mock.patch("torch.cat", wraps=torch.cat) as cat:
            list(self.model.stream(self.idx, 60))
        # Six tokens need no window. Then a token is joined to the window, not
        # to all that was written.
        joined = [sum(piece.size(1) for piece in pieces) for (pieces,), _ in cat.call_args_list]
        self.assertEqual(joined, [9] * 54)

    def test_very_small_settings_are_greedy(self):
        expected = self.model.generate(self.idx, 9).tolist()
        for settings in (dict(temperature=0.0), dict(temperature=1e-20), dict(temperature=1e-300),
                         dict(top_k=1), dict(top_p=1e-6)):
            with self.subTest(settings):
                written = self.model.generate(self.idx, 9, do_sample=True, **settings)
                self.assertEqual(written.tolist(), expected)

    def test_after_its_stop_token_a_row_has_stop_tokens_and_all_end_with_the_last(self):
        idx = torch.randint(11, (4, 2))
        free = self.model.generate(idx, 20)[:, 2:].tolist()
        stop = free[0][4]
        rows = [row[:row.index(stop)] if stop in row else row for row in free]
        written = self.model.generate(idx, 20, stop_token=stop)[:, 2:].tolist()
        length = min(20, max(map(len, rows)) + 1)
        self.assertEqual(written, [row + [stop] * (length - len(row)) for row in rows])

    def test_modes_are_put_back_and_written_tokens_can_be_trained_on(self):
        self.model.train()
        self.model.transformer.h[0].eval()
        modes = [module.training for module in self.model.modules()]
        stream = self.model.stream(self.idx, 5)
        token = next(stream)
        self.assertEqual([module.training for module in self.model.modules()], modes)
        self.model(token[:, None], token[:, None])[1].backward()
        idx = self.model.generate(self.idx, 5)
        self.model(idx[:, :-1], idx[:, 1:])[1].backward()
        # A stream that is left alone undoes nothing.
        self.model.eval()
        stream.close()
        self.assertFalse(any(module.training for module in self.model.modules()))

    def test_streams_in_turns_and_threads_write_as_one_alone(self):
        prompts = [torch.randint(11, (1, 3)) for _ in range(8)]
        expected = [self.model.generate(prompt, 12).tolist() for prompt in prompts]
        # With dropout, each of them would go wrong.
        self.model.train()
        turns = list(zip(*(self.model.stream(prompt, 12) for prompt in prompts)))
        for i, tokens in enumerate(zip(*turns)):
            self.assertEqual(torch.cat(tokens).tolist(), expected[i][0][3:])

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            written = threads.map(lambda prompt: self.model.generate(prompt, 12), prompts * 3)
            self.assertEqual([idx.tolist() for idx in written], expected * 3)
        self.assertTrue(all(module.training for module in self.model.modules()))

    def test_bad_arguments_are_refused_at_the_call(self):
        idx = torch.zeros(1, 2, dtype=torch.long)
        for prompt, settings, message in (
            (idx[:, :0], {}, "one token or more"),
            (idx[0], {}, "shape"),
            (idx + 11, {}, "tokens from 11 to 11, expected 0 to 10"),
            (idx, dict(max_new_tokens=-1), "max_new_tokens=-1"),
            (idx, dict(max_new_tokens=5.0), "max_new_tokens=5.0"),
            (idx, dict(temperature=math.nan), "temperature=nan"),
            (idx, dict(top_k=0), "top_k=0"),
            (idx, dict(top_k=2.5), "top_k=2.5"),
            (idx, dict(top_p=0.0), "top_p=0"),
        ):
            settings = dict(max_new_tokens=3, do_sample=True) | settings
            for method in (self.model.stream, self.model.generate):
                with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                    method(prompt, **settings)


def names_in(groups, model) -> list[str]:
    """Returns the sorted names of the parameters in an optimizer's groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return sorted(names[id(parameter)] for group in groups for parameter in group["params"])


class Optimizer(unittest.TestCase):
    def test_matrices_decay_and_muon_takes_those_of_the_blocks_never_the_head(self):
        for optimizer, tie in itertools.product(("adamw", "muon"), (True, False)):
            config = Trainer.get_default_config()
            config.merge_from_dict(dict(optimizer=optimizer, momentum=0.7))
            model = tiny_gpt(tie_weights=tie)
            groups = model.configure_optimizers(config).param_groups
            decayed = [group for group in groups if group["weight_decay"] == 0.1]
            by_muon = [group for group in groups if group.get("momentum") == 0.7]

            every = sorted(dict(model.named_parameters()))
            in_blocks = [name for name in every if ".c_" in name and name.endswith("weight")]
            head = [] if tie else ["lm_head.weight"]
            with self.subTest(optimizer, tie=tie):
                self.assertEqual(names_in(groups, model), every)
                self.assertEqual(names_in(decayed, model), head + in_blocks)
                expected = in_blocks if optimizer == "muon" else []
                self.assertEqual(names_in(by_muon, model), expected)

    def test_a_matrix_that_embeds_does_not_decay_wherever_it_stands(self):
        class Table(nn.Module):
            def __init__(self, weight):
                super().__init__()
                self.weight = weight

        # An embedding of one's own with the head tied to it, and a second head.
        own = tiny_gpt()
        own.transformer.wte = Table(own.lm_head.weight)
        second = tiny_gpt()
        second.other = nn.Linear(16, 11, bias=False)
        second.other.weight = second.transformer.wte.weight
        for model in (own, second):
            groups = model.configure_optimizers(Trainer.get_default_config()).param_groups
            weight = model.transformer.wte.weight
            self.assertFalse(any(weight is matrix for matrix in groups[0]["params"]))
