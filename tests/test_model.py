"""
The model against its formulas: an oracle in NumPy, the loss, the cache, generation.

    python -m unittest tests.test_model
"""

import concurrent.futures
import copy
import io
import math
import pickle
import unittest
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

from common import tiny_config, tiny_gpt
from mingpt.generation import KVCache, can_cache, logits_to_probs
from mingpt.model import GPT, PRESETS, Block, CausalSelfAttention, NewGELU
from mingpt.trainer import Trainer
from mingpt.utils import eval_mode, set_seed
from numpy_gpt import compute_logits, openai_layout


def oracle(model, idx) -> torch.Tensor:
    """Returns the logits that the oracle gives for tokens (B, T): (B, T, V) in float64."""
    weights = openai_layout(model)
    rows = [compute_logits(weights, row.tolist(), model.config.n_head) for row in idx]
    return torch.from_numpy(np.stack(rows))


def set_fused(model, fused: bool) -> None:
    for block in model.transformer.h:
        block.attn.fused = fused


class Oracle(unittest.TestCase):
    """GPT-2's forward pass, written in NumPy from the paper."""

    def setUp(self):
        set_seed(1)
        self.model = tiny_gpt(vocab_size=67, block_size=12, n_embd=24, n_layer=3, n_head=4)
        self.idx = torch.randint(67, (3, 12))

    def test_logits_by_the_kernel_and_step_by_step(self):
        expected = oracle(self.model, self.idx)
        for fused in (True, False):
            set_fused(self.model, fused)
            # Sums of 24 to 96 products, each rounded to 24 bits, through three layers.
            logits, loss = self.model(self.idx)
            torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)
            self.assertIsNone(loss)
            model = copy.deepcopy(self.model).double()
            torch.testing.assert_close(model(self.idx)[0], expected, atol=1e-10, rtol=1e-10)

    def test_tied(self):
        model = tiny_gpt(tie_weights=True).double()
        idx = torch.randint(11, (2, 8))
        torch.testing.assert_close(model(idx)[0], oracle(model, idx), atol=1e-10, rtol=1e-10)

    def test_loss(self):
        model = copy.deepcopy(self.model).double()
        targets = torch.randint(67, (3, 12))
        targets[0, :5] = -1
        targets[2] = -1
        loss = model(self.idx, targets)[1]
        logits = oracle(model, self.idx)
        losses = -logits.log_softmax(-1).gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0]
        expected = losses[targets != -1].mean()
        torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)

    def test_gradient(self):
        # The oracle has no gradient, but differences: of 8 numbers, one in each kind of layer.
        model = copy.deepcopy(self.model).double()
        targets = self.idx.roll(-1, dims=1)
        model(self.idx, targets)[1].backward()

        def loss_at(parameter, place, value):
            with torch.no_grad():
                before = parameter.flatten()[place].item()
                parameter.view(-1)[place] = value + before
                logits = oracle(model, self.idx)
                parameter.view(-1)[place] = before
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()

        block = model.transformer.h[1]
        for module in (model.transformer.wte, model.transformer.wpe, block.ln_1, block.attn.c_attn,
                       block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj, model.lm_head):
            place = int(module.weight.grad.abs().argmax())
            step = 1e-5
            up = loss_at(module.weight, place, step)
            down = loss_at(module.weight, place, -step)
            # A central difference errs by step**2 and by 1e-16 / step.
            self.assertAlmostEqual(
                module.weight.grad.flatten()[place].item(), (up - down) / (2 * step), delta=1e-7)

    def test_cache(self):
        model = copy.deepcopy(self.model).double()
        expected = oracle(model, self.idx)
        for prompt in (1, 5, 12):
            cache = [KVCache(12) for _ in model.transformer.h]
            logits, _ = model(self.idx[:, :prompt], cache=cache)
            rows = [logits]
            for t in range(prompt, 12):
                rows.append(model(self.idx[:, t:t + 1], cache=cache)[0])
            for logits in rows:
                self.assertEqual(logits.shape, (3, 1, 67))
            torch.testing.assert_close(
                torch.cat(rows, dim=1), expected[:, prompt - 1:], atol=1e-10, rtol=1e-10)


class Attention(unittest.TestCase):
    def setUp(self):
        set_seed(1)

    def test_both_ways_have_one_gradient(self):
        attention = CausalSelfAttention(tiny_config()).double().eval()
        x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
        gradients = []
        for fused in (True, False):
            attention.fused = fused
            gradients.append(torch.autograd.grad(attention(x).square().sum(), x)[0])
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-10, rtol=1e-10)

    def test_weights_stay_to_be_looked_at(self):
        attention = CausalSelfAttention(tiny_config(attn_pdrop=0.5))
        attention(torch.randn(3, 5, 16))
        self.assertIsNone(attention.att)
        attention.fused = False
        attention(torch.randn(3, 5, 16))
        self.assertEqual(attention.att.shape, (3, 2, 5, 5))
        self.assertFalse(attention.att.requires_grad)
        # They are those before dropout: each row sums up to 1, and nothing looks ahead.
        torch.testing.assert_close(attention.att.sum(-1), torch.ones(3, 2, 5))
        self.assertFalse(attention.att.triu(1).any())

    def test_weights_with_a_cache(self):
        model = tiny_gpt()
        set_fused(model, False)
        cache = [KVCache(8) for _ in model.transformer.h]
        idx = torch.randint(11, (1, 4))
        whole = model(idx)[0]
        expected = model.transformer.h[1].attn.att[:, :, -1:]  # (1, 2, 1, 4)
        model(idx[:, :3], cache=cache)
        logits, _ = model(idx[:, 3:], cache=cache)
        torch.testing.assert_close(logits[:, 0], whole[:, -1])
        torch.testing.assert_close(model.transformer.h[1].attn.att, expected)

    def test_dropout_acts_in_training_only(self):
        for fused in (True, False):
            attention = CausalSelfAttention(tiny_config(attn_pdrop=0.5, resid_pdrop=0.0))
            attention.fused = fused
            x = torch.randn(1, 8, 16)
            self.assertFalse(torch.equal(attention(x), attention(x)))
            attention.eval()
            self.assertTrue(torch.equal(attention(x), attention(x)))

    def test_a_share_of_dropout_is_kept_on_average(self):
        for fused in (True, False):
            attention = CausalSelfAttention(tiny_config(attn_pdrop=0.25, resid_pdrop=0.0))
            attention.fused = fused
            x = torch.randn(4000, 2, 16)
            with torch.no_grad():
                first = attention(x[:1].expand(4000, 2, 16)).mean(dim=0)
                expected = attention.eval()(x[:1])[0]
            # The mean of 4,000 draws strays by a standard deviation in 63.
            torch.testing.assert_close(first, expected, atol=0.05, rtol=0)

    def test_heads_must_divide_the_channels(self):
        with self.assertRaisesRegex(ValueError, "n_embd=10, expected a multiple of n_head=3"):
            GPT(tiny_config(n_embd=10, n_head=3))

    def test_several_tokens_after_a_past_are_refused(self):
        model = tiny_gpt()
        cache = [KVCache(8) for _ in model.transformer.h]
        model(torch.zeros(1, 3, dtype=torch.long), cache=cache)
        with self.assertRaisesRegex(ValueError, "2 tokens after a prompt, expected one at a time"):
            model(torch.zeros(1, 2, dtype=torch.long), cache=cache)

    def test_gelu(self):
        x = torch.linspace(-4, 4, 81, dtype=torch.float64)
        expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        torch.testing.assert_close(NewGELU()(x), expected)


class Config(unittest.TestCase):
    def test_every_preset_has_its_sizes(self):
        for name, sizes in PRESETS.items():
            config = GPT.get_default_config()
            config.model_type = name
            config.vocab_size = 50257
            config.block_size = 1024
            with torch.device("meta"):
                model = GPT(config)
            blocks = model.transformer.h
            made = (len(blocks), blocks[0].attn.n_head, model.transformer.wte.embedding_dim)
            self.assertEqual(made, sizes)

    def test_gpt2_has_124_million_parameters(self):
        config = GPT.get_default_config()
        config.model_type = "gpt2"
        config.vocab_size = 50257
        config.block_size = 1024
        with torch.device("meta"), self.assertLogs("mingpt", "INFO") as logged:
            model = GPT(config)
        # OpenAI's checkpoint holds as many. The head is a matrix of its own, which minGPT does
        # not count either.
        count = sum(p.numel() for p in model.transformer.parameters())
        self.assertEqual(count, 124_439_808)
        self.assertIn("number of parameters: 124.44M", logged.output[-1])

    def test_mistakes_are_named(self):
        for changes, message in (
            (dict(model_type="gpt3"), "model_type='gpt3', expected .*gpt2"),
            (dict(vocab_size=None), "vocab_size=None"),
            (dict(vocab_size=0), "vocab_size=0"),
            (dict(block_size=None), "block_size=None"),
            (dict(block_size=8.0), "block_size=8.0"),
            (dict(n_head=None), "n_head=None, .*model_type"),
            (dict(n_layer=-1), "n_layer=-1"),
            (dict(embd_pdrop=1.5), "embd_pdrop=1.5, expected a share"),
            (dict(attn_pdrop=-0.1), "attn_pdrop=-0.1"),
            (dict(resid_pdrop=math.nan), "resid_pdrop=nan"),
            (dict(model_type="gpt-nano"), "'gpt-nano' means n_layer=3, but n_layer=2 is given"),
        ):
            config = tiny_config(**changes)
            before = config.to_dict()
            with self.subTest(changes), self.assertRaisesRegex(ValueError, message):
                GPT(config)
            self.assertEqual(repr(config.to_dict()), repr(before))


class Forward(unittest.TestCase):
    def setUp(self):
        set_seed(2)
        self.model = tiny_gpt()

    def test_no_token_sees_a_later_one(self):
        idx = torch.randint(11, (1, 8))
        for fused in (True, False):
            set_fused(self.model, fused)
            logits, _ = self.model(idx)
            for t in range(1, 8):
                changed = idx.clone()
                changed[:, t:] = (changed[:, t:] + 1) % 11
                others, _ = self.model(changed)
                torch.testing.assert_close(others[:, :t], logits[:, :t])
                self.assertFalse(torch.allclose(others[:, t], logits[:, t]))

    def test_features_are_all_but_the_head(self):
        idx = torch.randint(11, (3, 8))
        features = self.model.features(idx)
        self.assertEqual(features.shape, (3, 8, 16))
        self.assertTrue(torch.equal(self.model.lm_head(features), self.model(idx)[0]))

    def test_targets_that_do_not_count(self):
        idx = torch.randint(11, (2, 8))
        targets = torch.full((2, 8), -1)
        _, loss = self.model(idx, targets)
        loss.backward()
        self.assertEqual(loss.item(), 0)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.assertFalse(any(gradient.any() for gradient in gradients))
        targets[0, 3:] = 2
        self.assertEqual(self.model.count_targets(targets), 5)

    def test_half_precision_models_compute_their_loss_in_float32(self):
        idx = torch.randint(11, (2, 8))
        for dtype in (torch.bfloat16, torch.float16):
            logits, loss = copy.deepcopy(self.model).to(dtype)(idx, idx)
            self.assertEqual((logits.dtype, loss.dtype), (dtype, torch.float32))
            expected = F.cross_entropy(logits.float().flatten(0, 1), idx.flatten())
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        self.assertEqual(copy.deepcopy(self.model).double()(idx, idx)[1].dtype, torch.float64)

    def test_too_long(self):
        with self.assertRaisesRegex(ValueError, "9 tokens.*block_size is 8"):
            self.model(torch.zeros(1, 9, dtype=torch.long))
        cache = [KVCache(8) for _ in self.model.transformer.h]
        self.model(torch.zeros(1, 8, dtype=torch.long), cache=cache)
        with self.assertRaisesRegex(ValueError, "9 tokens.*block_size is 8"):
            self.model(torch.zeros(1, 1, dtype=torch.long), cache=cache)

    def test_an_index_error_keeps_its_name(self):
        def look_up(module, args):
            return [][3]

        self.model.transformer.h[0].register_forward_pre_hook(look_up)
        with self.assertRaisesRegex(IndexError, "list index out of range"):
            self.model(torch.zeros(1, 2, dtype=torch.long))

    def test_deepcopy_and_pickle_are_independent(self):
        for tie in (False, True):
            model = tiny_gpt(tie_weights=tie)
            idx = torch.randint(11, (2, 8))
            expected = model(idx)[0]
            for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                self.assertTrue(torch.equal(copied(idx)[0], expected))
                self.assertEqual(copied.lm_head.weight is copied.transformer.wte.weight, tie)
                with torch.no_grad():
                    for parameter in copied.parameters():
                        parameter.add_(1)
                self.assertTrue(torch.equal(model(idx)[0], expected))

    def test_initialisation(self):
        model = GPT(tiny_config(n_embd=256, n_head=4, vocab_size=500))
        block = model.transformer.h[1]
        usual = (model.transformer.wte, model.transformer.h[0].attn.c_attn, block.mlp.c_fc,
                 model.lm_head)
        for module in usual:
            self.assertAlmostEqual(module.weight.std().item(), 0.02, delta=0.001)
        for module in (block.attn.c_proj, block.mlp.c_proj):
            self.assertAlmostEqual(module.weight.std().item(), 0.02 / math.sqrt(4), delta=0.001)
        self.assertFalse(any(p.any() for name, p in model.named_parameters()
                             if name.endswith("bias")))

    def test_compiles_in_one_piece(self):
        idx = torch.randint(11, (2, 8))
        compiled = torch.compile(self.model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(idx, idx)[1], self.model(idx, idx)[1])


class Weights(unittest.TestCase):
    """State dicts load in every combination of heads."""

    def setUp(self):
        set_seed(3)
        self.idx = torch.randint(11, (2, 8))

    def load(self, state, tie) -> GPT:
        model = GPT(tiny_config(tie_weights=tie)).eval()
        model.load_state_dict(state)
        return model

    def test_a_head_of_its_own_unties(self):
        saved = tiny_gpt(tie_weights=False)
        for tie in (False, True):
            model = self.load(saved.state_dict(), tie)
            self.assertTrue(torch.equal(model(self.idx)[0], saved(self.idx)[0]))
            self.assertIsNot(model.lm_head.weight, model.transformer.wte.weight)
        model = GPT(tiny_config(tie_weights=True))
        with self.assertLogs("mingpt", "INFO") as logged:
            model.load_state_dict(saved.state_dict())
        self.assertEqual(len(logged.output), 1)
        self.assertFalse(model.config.tie_weights)

    def test_a_tied_one_stays_tied_where_it_was(self):
        saved = tiny_gpt(tie_weights=True)
        for tie in (False, True):
            model = self.load(saved.state_dict(), tie)
            self.assertTrue(torch.equal(model(self.idx)[0], saved(self.idx)[0]))
            self.assertEqual(model.lm_head.weight is model.transformer.wte.weight, tie)

    def test_a_missing_head_is_the_embedding(self):
        saved = tiny_gpt(tie_weights=True)
        state = {k: v for k, v in saved.state_dict().items() if k != "lm_head.weight"}
        names = list(state)
        for tie in (False, True):
            model = self.load(state, tie)
            self.assertTrue(torch.equal(model(self.idx)[0], saved(self.idx)[0]))
            self.assertEqual(list(state), names)

    def test_a_file_with_weights_alone(self):
        model = tiny_gpt()
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        fresh = self.load(torch.load(file, weights_only=True), tie=False)
        self.assertTrue(torch.equal(fresh(self.idx)[0], model(self.idx)[0]))

    def test_other_sizes_are_refused(self):
        with self.assertRaisesRegex(RuntimeError, "size mismatch"):
            self.load(tiny_gpt(n_embd=8).state_dict(), tie=False)


class Transformers(unittest.TestCase):
    """The one test against transformers' GPT2LMHeadModel."""

    def test_logits_gradient_and_greedy_tokens(self):
        from transformers import GPT2Config, GPT2LMHeadModel
        set_seed(3)
        sizes = dict(vocab_size=67, n_embd=48, n_layer=3, n_head=4)
        theirs = GPT2LMHeadModel(GPT2Config(n_positions=40, **sizes)).double().eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter += torch.randn_like(parameter) * 0.1
        ours = GPT(tiny_config(block_size=40, tie_weights=True, **sizes)).double().eval()
        with torch.no_grad():
            for name, tensor in ours.state_dict().items():
                other = theirs.state_dict()[name]
                # transformers stores the matrix of a layer as (in, out).
                tensor.copy_(other.t() if ".h." in name and tensor.dim() == 2 else other)

        idx = torch.randint(67, (3, 40))
        logits, loss = ours(idx[:, :-1], idx[:, 1:])
        expected = theirs(idx, labels=idx)
        torch.testing.assert_close(logits, expected.logits[:, :-1], atol=1e-9, rtol=1e-9)
        # transformers computes its loss in float32.
        torch.testing.assert_close(loss.float(), expected.loss.float(), atol=1e-5, rtol=1e-5)
        loss.backward()
        expected.loss.backward()
        torch.testing.assert_close(ours.transformer.wte.weight.grad,
                                   theirs.transformer.wte.weight.grad, atol=1e-5, rtol=1e-4)

        prompt = idx[:, :10]
        written = theirs.generate(prompt, attention_mask=torch.ones(3, 10), max_new_tokens=30,
                                  do_sample=False, pad_token_id=0)
        self.assertEqual(ours.generate(prompt, 30).tolist(), written.tolist())


class Sampling(unittest.TestCase):
    def test_logits_to_probs(self):
        logits = torch.tensor([[1.0, 2.0, 3.0, 2.5], [0.0, 0.0, 5.0, 0.0]])
        torch.testing.assert_close(logits_to_probs(logits), logits.softmax(-1))
        warm = logits_to_probs(logits, temperature=2.0)
        torch.testing.assert_close(warm, (logits / 2).softmax(-1))
        kept = logits_to_probs(logits, top_k=2)[0]
        self.assertEqual((kept > 0).tolist(), [False, False, True, True])
        torch.testing.assert_close(kept[2] / kept[3], (logits[0, 2] - logits[0, 3]).exp())
        torch.testing.assert_close(logits_to_probs(logits, top_k=100), logits.softmax(-1))

    def test_top_p_keeps_the_fewest_that_hold_enough(self):
        probs = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
        for top_p, kept in ((0.4, {1}), (0.51, {1, 3}), (0.76, {1, 3, 2}), (0.95, {0, 1, 2, 3}),
                            (1.0, {0, 1, 2, 3})):
            result = logits_to_probs(probs.log(), top_p=top_p)[0]
            self.assertEqual({i for i in range(4) if result[i] > 0}, kept)
            expected = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(probs[0])])
            torch.testing.assert_close(result, expected / expected.sum())

    def test_random_rows_against_a_plain_loop(self):
        set_seed(4)
        for _ in range(50):
            logits = torch.randn(1, 20, dtype=torch.float64) * 3
            k = int(torch.randint(1, 25, ()))
            p = float(torch.rand(()).clamp(min=0.01))
            order = sorted(range(20), key=lambda i: -logits[0, i])[:k]
            weights = {i: math.exp(logits[0, i]) for i in order}
            total = sum(weights.values())
            mass = 0.0
            kept = []
            for i in order:
                if mass < p:
                    kept.append(i)
                mass += weights[i] / total
            expected = torch.zeros(20, dtype=torch.float64)
            for i in kept:
                expected[i] = weights[i] / sum(weights[j] for j in kept)
            torch.testing.assert_close(logits_to_probs(logits, top_k=k, top_p=p)[0], expected)


class Generate(unittest.TestCase):
    def setUp(self):
        set_seed(5)
        # Float64 leaves no near ties to rounding.
        self.model = tiny_gpt().double()
        self.idx = torch.randint(11, (2, 3))

    def plain(self, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
        """Writes as minGPT does: reads the whole window for every token, one draw a step."""
        for _ in range(max_new_tokens):
            logits = self.model(idx[:, -8:])[0][:, -1] / temperature  # (B, V)
            if top_k is not None:
                least = logits.topk(min(top_k, 11)).values[:, [-1]]
                logits[logits < least] = -math.inf
            probs = logits.softmax(-1)
            drawn = torch.multinomial(probs, 1) if do_sample else None
            token = drawn if do_sample else probs.argmax(-1, keepdim=True)
            idx = torch.cat((idx, token), dim=1)
        return idx

    def test_equals_the_plain_loop_with_and_without_cache(self):
        self.assertTrue(can_cache(self.model))
        for length in (1, 4, 8, 13):
            for batch in (1, 5):
                idx = torch.randint(11, (batch, length))
                for options in (dict(), dict(do_sample=True),
                                dict(do_sample=True, temperature=0.7, top_k=4)):
                    set_seed(6)
                    expected = self.plain(idx, 15, **options).tolist()
                    for use_cache in (True, False):
                        with self.subTest(use_cache=use_cache, length=length, **options):
                            set_seed(6)
                            written = self.model.generate(idx, 15, use_cache=use_cache, **options)
                            self.assertEqual(written.tolist(), expected)

    def test_the_cache_reads_each_token_once(self):
        lengths = []
        features = self.model.features

        def watch(idx, cache=None):
            lengths.append(idx.size(1))
            return features(idx, cache)

        with mock.patch.object(self.model, "features", watch):
            self.model.generate(self.idx, 8)
        # Three tokens of prompt, five to fill the block, then the window slides.
        self.assertEqual(lengths, [3, 1, 1, 1, 1, 1, 8, 8])

    def test_two_rows_do_not_mix(self):
        both = self.model.generate(self.idx, 9)
        for row in range(2):
            alone = self.model.generate(self.idx[row:row + 1], 9)
            self.assertEqual(alone[0].tolist(), both[row].tolist())

    def test_half_precision(self):
        model = tiny_gpt().bfloat16()
        written = model.generate(self.idx, 4)
        self.assertEqual(written.shape, (2, 7))
        self.assertEqual(written[:, :3].tolist(), self.idx.tolist())

    def test_five_positional_arguments(self):
        set_seed(6)
        expected = self.plain(self.idx, 6, 0.8, True, 5)
        set_seed(6)
        self.assertEqual(self.model.generate(self.idx, 6, 0.8, True, 5).tolist(), expected.tolist())

    def test_compiled_blocks_need_two_translations(self):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        model = copy.deepcopy(self.model)
        for block in model.transformer.h:
            block.compile(backend=backend, fullgraph=True, dynamic=True)
        expected = self.model.generate(self.idx, 5).tolist()
        self.assertEqual(model.generate(self.idx, 5).tolist(), expected)
        # One reads the prompt, one a token after it. All layers and lengths share them.
        self.assertEqual(len(graphs), 2)

    def test_stream_gives_the_tokens_of_generate(self):
        tokens = list(self.model.stream(self.idx, 12))
        self.assertEqual([token.shape for token in tokens], [(2,)] * 12)
        expected = self.model.generate(self.idx, 12)[:, 3:]
        self.assertEqual(torch.stack(tokens, dim=1).tolist(), expected.tolist())

    def test_a_very_low_temperature_and_a_very_small_top_p_are_greedy(self):
        expected = self.model.generate(self.idx, 9).tolist()
        for options in (dict(temperature=0.0), dict(temperature=1e-20), dict(temperature=1e-45),
                        dict(temperature=1e-300), dict(top_k=1), dict(top_p=1e-6)):
            with self.subTest(options):
                written = self.model.generate(self.idx, 9, do_sample=True, **options)
                self.assertEqual(written.tolist(), expected)

    def test_stop_token(self):
        idx = torch.randint(11, (4, 2))
        free = self.model.generate(idx, 20)[:, 2:].tolist()
        stop = free[0][4]
        rows = [row[:row.index(stop) + 1] if stop in row else row for row in free]
        length = max(map(len, rows))
        expected = [row + [stop] * (length - len(row)) for row in rows]
        written = self.model.generate(idx, 20, stop_token=stop)
        self.assertEqual(written[:, 2:].tolist(), expected)

    def test_modes_are_put_back_and_gradients_can_flow_after(self):
        self.model.train()
        self.model.transformer.h[0].eval()
        modes = [module.training for module in self.model.modules()]
        token = next(self.model.stream(self.idx, 5))
        self.assertEqual([module.training for module in self.model.modules()], modes)
        self.model(token[:, None], token[:, None])[1].backward()
        idx = self.model.generate(self.idx, 5)
        self.model(idx[:, :-1], idx[:, 1:])[1].backward()
        self.assertEqual([module.training for module in self.model.modules()], modes)

    def test_an_abandoned_stream_undoes_nothing(self):
        self.model.train()
        stream = self.model.stream(self.idx, 5)
        next(stream)
        # The user's own decision.
        self.model.eval()
        stream.close()
        self.assertFalse(any(module.training for module in self.model.modules()))

    def test_two_streams_in_turns_and_eight_threads_run_without_dropout(self):
        prompts = [torch.randint(11, (1, 3)) for _ in range(8)]
        expected = [self.model.generate(prompt, 12).tolist() for prompt in prompts]
        # With dropout, each of them would go wrong.
        self.model.train()
        first, second = (self.model.stream(prompt, 12) for prompt in prompts[:2])
        pairs = [(a.item(), b.item()) for a, b in zip(first, second)]
        written = [list(row) for row in zip(*pairs)]
        self.assertEqual(written, [expected[i][0][3:] for i in range(2)])

        def write(prompt):
            return self.model.generate(prompt, 12).tolist()

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            for _ in range(3):
                self.assertEqual(list(threads.map(write, prompts)), expected)
        self.assertTrue(all(module.training for module in self.model.modules()))

    def test_two_models_do_not_wait_for_each_other(self):
        other = tiny_gpt()
        with eval_mode(self.model), concurrent.futures.ThreadPoolExecutor(1) as threads:
            written = threads.submit(other.generate, self.idx, 4).result(timeout=60)
        self.assertEqual(written.shape, (2, 7))

    def test_bad_arguments_are_refused_at_the_call(self):
        idx = torch.zeros(1, 2, dtype=torch.long)
        for prompt, options, message in (
            (idx[:, :0], {}, "one token or more"),
            (idx[0], {}, "shape"),
            (idx + 11, {}, "tokens from 11 to 11, expected 0 to 10"),
            (idx - 1, {}, "tokens from -1 to -1, expected 0 to 10"),
            (idx, dict(max_new_tokens=-1), "max_new_tokens=-1"),
            (idx, dict(max_new_tokens=1.5), "max_new_tokens=1.5"),
            (idx, dict(max_new_tokens=None), "max_new_tokens=None"),
            (idx, dict(temperature=-1.0), "temperature=-1"),
            (idx, dict(temperature=math.nan), "temperature=nan"),
            (idx, dict(temperature=math.inf), "temperature=inf"),
            (idx, dict(temperature="hot"), "temperature='hot'"),
            (idx, dict(top_k=0), "top_k=0"),
            (idx, dict(top_k=1.5), "top_k=1.5"),
            (idx, dict(top_p=0.0), "top_p=0"),
            (idx, dict(top_p=1.5), "top_p=1.5"),
            (idx, dict(stop_token=11), "stop_token=11"),
        ):
            settings = dict(max_new_tokens=3, do_sample=True) | options
            for method in (self.model.stream, self.model.generate):
                with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                    method(prompt, **settings)
        self.assertEqual(self.model.generate(idx, 0).tolist(), idx.tolist())

    def test_a_long_text_costs_no_more_a_token_than_a_short_one(self):
        # What is kept from token to token does not grow: the window and nothing else.
        sizes = []
        cat = torch.cat

        def watch(tensors, dim):
            result = cat(tensors, dim=dim)
            sizes.append(result.size(1))
            return result

        with mock.patch("torch.cat", watch):
            for _ in self.model.stream(self.idx, 60):
                pass
        self.assertLessEqual(max(sizes), 9)


class Optimizer(unittest.TestCase):
    def test_two_groups_hold_every_parameter_once(self):
        config = Trainer.get_default_config()
        for tie in (True, False):
            model = GPT(tiny_config(tie_weights=tie))
            decayed, free = model.configure_optimizers(config).param_groups
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            held = [id(parameter) for group in (decayed, free) for parameter in group["params"]]
            self.assertEqual(sorted(held), sorted(names))
            self.assertEqual((decayed["weight_decay"], free["weight_decay"]), (0.1, 0.0))
            expected = {name for name in names.values() if ".c_" in name and "weight" in name}
            if not tie:
                expected.add("lm_head.weight")
            self.assertEqual({names[id(p)] for p in decayed["params"]}, expected)

    def test_muon_takes_the_matrices_of_the_blocks_never_the_head(self):
        config = Trainer.get_default_config()
        config.optimizer = "muon"
        config.momentum = 0.7
        model = GPT(tiny_config())
        optimizer = model.configure_optimizers(config)
        self.assertIsInstance(optimizer, torch.optim.Optimizer)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        self.assertEqual(sorted(held), sorted(map(id, model.parameters())))
        by_muon = {id(p) for group in optimizer.param_groups if "momentum" in group
                   for p in group["params"]}
        expected = {id(p) for name, p in model.named_parameters()
                    if ".h." in name and p.dim() == 2}
        self.assertEqual(by_muon, expected)
        momenta = {group["momentum"] for group in optimizer.param_groups if "momentum" in group}
        self.assertEqual(momenta, {0.7})
        config.optimizer = "sgd"
        with self.assertRaisesRegex(ValueError, "optimizer='sgd'"):
            model.configure_optimizers(config)

    def test_a_step_learns(self):
        for name in ("adamw", "muon"):
            set_seed(7)
            model = GPT(tiny_config())
            config = Trainer.get_default_config()
            config.learning_rate = 1e-2
            config.optimizer = name
            optimizer = model.configure_optimizers(config)
            idx = torch.randint(11, (8, 8))
            losses = []
            for _ in range(30):
                loss = model(idx[:, :-1], idx[:, 1:])[1]
                losses.append(loss.item())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            self.assertLess(losses[-1], 0.7 * losses[0])


if __name__ == "__main__":
    unittest.main()
