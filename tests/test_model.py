"""The model against the formulas it stands for, and against transformers' GPT-2."""

import concurrent.futures
import copy
import io
import math
import pickle
import unittest

import torch
from torch.nn import functional as F

from common import tiny_config, tiny_gpt
from mingpt.model import GPT, SIZES, Block, CausalSelfAttention, KVCache, logits_to_probs
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode, set_seed


class Attention(unittest.TestCase):
    def setUp(self):
        set_seed(1)

    def test_equals_the_formula(self):
        attention = CausalSelfAttention(tiny_config(n_embd=12, n_head=3)).eval()
        x = torch.randn(2, 7, 12)
        q, k, v = (part.view(2, 7, 3, 4).transpose(1, 2) for part in attention.c_attn(x).split(12, dim=2))
        scores = q @ k.transpose(2, 3) / math.sqrt(4)
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        expected = attention.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 12))
        torch.testing.assert_close(attention(x), expected)

    def test_dropout_acts_in_training_only(self):
        attention = CausalSelfAttention(tiny_config(attn_pdrop=0.5, resid_pdrop=0.0))
        x = torch.randn(1, 8, 16)
        self.assertFalse(torch.equal(attention(x), attention(x)))
        attention.eval()
        self.assertTrue(torch.equal(attention(x), attention(x)))

    def test_heads_must_divide_the_channels(self):
        with self.assertRaisesRegex(ValueError, "n_embd=10, expected a multiple of n_head=3"):
            GPT(tiny_config(n_embd=10, n_head=3))


class Config(unittest.TestCase):
    def test_every_preset_has_its_sizes(self):
        for name, sizes in SIZES.items():
            config = GPT.get_default_config()
            config.model_type, config.vocab_size, config.block_size = name, 50257, 1024
            with torch.device("meta"):
                model = GPT(config)
            self.assertEqual((model.config.n_layer, model.config.n_head, model.config.n_embd), sizes)

    def test_gpt2_has_124_million_parameters(self):
        config = GPT.get_default_config()
        config.model_type, config.vocab_size, config.block_size = "gpt2", 50257, 1024
        with torch.device("meta"):
            self.assertEqual(sum(p.numel() for p in GPT(config).parameters()), 124_439_808) # what OpenAI's checkpoint holds

    def test_a_config_stays_as_it_is_and_can_be_used_twice(self):
        config = tiny_config(n_layer=None, n_head=None, n_embd=None, model_type="gpt-nano")
        before = config.to_dict()
        first, second = GPT(config), GPT(config)
        self.assertEqual(config.to_dict(), before)
        self.assertEqual(first.config.to_dict(), second.config.to_dict())
        self.assertEqual(GPT(first.config).config.to_dict(), first.config.to_dict())

    def test_a_config_of_minGPT_without_our_fields_works(self):
        config = CfgNode(model_type=None, n_layer=1, n_head=1, n_embd=4, vocab_size=5, block_size=3, embd_pdrop=0.0,
                         resid_pdrop=0.0, attn_pdrop=0.0)
        self.assertTrue(GPT(config).config.tie_weights)

    def test_what_is_wrong_is_named(self):
        for changes, message in (
            (dict(model_type="gpt3"), "unknown model_type 'gpt3'"),
            (dict(vocab_size=None), "vocab_size=None"),
            (dict(block_size=None), "block_size=None"),
            (dict(n_head=None), "n_head=None, .*model_type"),
            (dict(model_type="gpt-nano"), "'gpt-nano' means n_layer=3, but n_layer=2 is given"),
        ):
            with self.subTest(changes), self.assertRaisesRegex(ValueError, message):
                GPT(tiny_config(**changes))


class Forward(unittest.TestCase):
    def setUp(self):
        set_seed(2)
        self.model = tiny_gpt()

    def test_shapes_and_loss(self):
        idx = torch.randint(11, (3, 8))
        logits, loss = self.model(idx)
        self.assertEqual((logits.shape, loss), ((3, 8, 11), None))
        targets = torch.randint(11, (3, 8))
        targets[:, :5] = -1
        _, loss = self.model(idx, targets)
        picked = logits.log_softmax(-1)[:, 5:].gather(2, targets[:, 5:, None])
        torch.testing.assert_close(loss, -picked.mean())

    def test_no_token_sees_a_later_one(self):
        idx = torch.randint(11, (1, 8))
        logits, _ = self.model(idx)
        for t in range(1, 8):
            changed = idx.clone()
            changed[:, t:] = (changed[:, t:] + 1) % 11
            torch.testing.assert_close(self.model(changed)[0][:, :t], logits[:, :t])
            self.assertFalse(torch.allclose(self.model(changed)[0][:, t], logits[:, t]))

    def test_targets_that_do_not_count(self):
        idx, targets = torch.randint(11, (2, 8)), torch.full((2, 8), -1)
        _, loss = self.model(idx, targets)
        loss.backward()
        self.assertEqual(loss.item(), 0)
        self.assertTrue(all(p.grad is None or not p.grad.any() for p in self.model.parameters()))
        for token in (-2, 11):
            targets[1, 3] = token
            with self.assertRaisesRegex(ValueError, "vocabulary goes from 0 to 10"):
                self.model(idx, targets)

    def test_half_precision_models_compute_their_loss_in_float32(self):
        idx = torch.randint(11, (2, 8))
        for dtype in (torch.bfloat16, torch.float16):
            logits, loss = copy.deepcopy(self.model).to(dtype)(idx, idx)
            self.assertEqual((logits.dtype, loss.dtype), (dtype, torch.float32))
            torch.testing.assert_close(loss, F.cross_entropy(logits.float().flatten(0, 1), idx.flatten()), rtol=1e-6, atol=0)
        self.assertEqual(copy.deepcopy(self.model).double()(idx, idx)[1].dtype, torch.float64)

    def test_too_long_or_unknown(self):
        with self.assertRaisesRegex(ValueError, "9 tokens.*block_size is 8"):
            self.model(torch.zeros(1, 9, dtype=torch.long))
        for token in (-1, 11):
            with self.assertRaisesRegex(ValueError, "vocabulary goes from 0 to 10"):
                self.model(torch.tensor([[1, token]]))

    def test_deepcopy_and_pickle_are_independent(self):
        idx = torch.randint(11, (2, 8))
        expected = self.model(idx)[0]
        for copied in (copy.deepcopy(self.model), pickle.loads(pickle.dumps(self.model))):
            torch.testing.assert_close(copied(idx)[0], expected)
            self.assertIs(copied.lm_head.weight, copied.transformer.wte.weight)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(1)
            torch.testing.assert_close(copied(idx)[0], expected)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.sub_(1)

    def test_initialisation(self):
        model = GPT(tiny_config(n_embd=256, n_head=4, vocab_size=500))
        self.assertAlmostEqual(model.transformer.wte.weight.std().item(), 0.02, delta=0.001)
        self.assertAlmostEqual(model.transformer.h[0].attn.c_attn.weight.std().item(), 0.02, delta=0.001)
        for module in (model.transformer.h[1].attn.c_proj, model.transformer.h[1].mlp.c_proj):
            self.assertAlmostEqual(module.weight.std().item(), 0.02 / math.sqrt(2 * 2), delta=0.001)
            self.assertEqual(module.bias.abs().max().item(), 0)

    def test_state_dict_has_the_names_of_GPT2_and_no_mask(self):
        from transformers import GPT2Config, GPT2LMHeadModel
        theirs = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2)).state_dict()
        self.assertEqual(set(self.model.state_dict()), {key for key in theirs if not key.endswith(".attn.bias")})

    def test_a_checkpoint_of_minGPT_loads(self):
        model = tiny_gpt(tie_weights=False)
        state = model.state_dict()
        for layer in range(2):
            state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
        names = set(state)
        fresh = GPT(tiny_config(tie_weights=False)).eval()
        fresh.load_state_dict(state)
        self.assertEqual(set(state), names)
        idx = torch.randint(11, (2, 8))
        torch.testing.assert_close(fresh(idx)[0], model(idx)[0])
        with self.assertRaisesRegex(ValueError, "tie_weights = False"):
            GPT(tiny_config()).load_state_dict(state)

    def test_compiles_in_one_piece(self):
        idx = torch.randint(11, (2, 8))
        compiled = torch.compile(self.model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(idx, idx)[1], self.model(idx, idx)[1])


class Transformers(unittest.TestCase):
    """The same weights in transformers' GPT2LMHeadModel."""

    def setUp(self):
        from transformers import GPT2Config, GPT2LMHeadModel
        set_seed(3)
        self.theirs = GPT2LMHeadModel(GPT2Config(vocab_size=67, n_positions=40, n_embd=48, n_layer=3, n_head=4)).eval()
        with torch.no_grad():
            for parameter in self.theirs.parameters():
                parameter += torch.randn_like(parameter) * 0.1
        self.ours = GPT(tiny_config(vocab_size=67, block_size=40, n_embd=48, n_layer=3, n_head=4)).eval()
        with torch.no_grad():
            for name, tensor in self.ours.state_dict().items():
                other = self.theirs.state_dict()[name]
                tensor.copy_(other.t() if ".h." in name and tensor.dim() == 2 else other) # transformers stores (in, out)
        self.idx = torch.randint(67, (3, 40))

    def test_logits_loss_and_gradient(self):
        (logits, loss), expected = self.ours(self.idx[:, :-1], self.idx[:, 1:]), self.theirs(self.idx, labels=self.idx)
        torch.testing.assert_close(logits, expected.logits[:, :-1], atol=1e-4, rtol=0)
        torch.testing.assert_close(loss, expected.loss)
        loss.backward()
        expected.loss.backward()
        torch.testing.assert_close(self.ours.transformer.wte.weight.grad, self.theirs.transformer.wte.weight.grad)

    def test_greedy_tokens(self):
        theirs = self.theirs.generate(self.idx[:, :10], attention_mask=torch.ones(3, 10), max_new_tokens=30, do_sample=False, pad_token_id=0)
        self.assertEqual(self.ours.generate(self.idx[:, :10], 30).tolist(), theirs.tolist())


class Sampling(unittest.TestCase):
    def test_logits_to_probs(self):
        logits = torch.tensor([[1.0, 2.0, 3.0, 2.5], [0.0, 0.0, 5.0, 0.0]])
        torch.testing.assert_close(logits_to_probs(logits), logits.softmax(-1))
        torch.testing.assert_close(logits_to_probs(logits, temperature=2.0), (logits / 2).softmax(-1))
        kept = logits_to_probs(logits, top_k=2)[0]
        self.assertEqual((kept > 0).tolist(), [False, False, True, True])
        torch.testing.assert_close(kept[2] / kept[3], (logits[0, 2] - logits[0, 3]).exp())
        torch.testing.assert_close(logits_to_probs(logits, top_k=100), logits.softmax(-1))

    def test_top_p_keeps_the_fewest_that_hold_enough(self):
        probs = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
        for top_p, kept in ((0.4, {1}), (0.51, {1, 3}), (0.76, {1, 3, 2}), (0.95, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})):
            result = logits_to_probs(probs.log(), top_p=top_p)[0]
            self.assertEqual({i for i in range(4) if result[i] > 0}, kept)
            expected = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(probs[0].tolist())])
            torch.testing.assert_close(result, expected / expected.sum())

    def test_random_rows_against_a_plain_loop(self):
        set_seed(4)
        for _ in range(50):
            logits, k, p = torch.randn(1, 20) * 3, int(torch.randint(1, 25, ())), float(torch.rand(()).clamp(min=0.01))
            order = sorted(range(20), key=lambda i: -logits[0, i])[:k]
            weights = {i: math.exp(logits[0, i]) for i in order}
            total, mass, kept = sum(weights.values()), 0.0, []
            for i in order:
                if mass < p - 1e-6:
                    kept.append(i)
                mass += weights[i] / total
            expected = torch.zeros(20)
            for i in kept:
                expected[i] = weights[i] / sum(weights[j] for j in kept)
            torch.testing.assert_close(logits_to_probs(logits, top_k=k, top_p=p)[0], expected)


class Generate(unittest.TestCase):
    def setUp(self):
        set_seed(5)
        self.model = tiny_gpt()

    def plain(self, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
        """minGPT's way: the whole window again for every token, one draw a step."""
        for _ in range(max_new_tokens):
            logits = self.model(idx[:, -8:])[0][:, -1] / temperature
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, 11)).values[:, [-1]]] = -math.inf
            probs = logits.softmax(-1)
            token = torch.multinomial(probs, 1) if do_sample else probs.argmax(-1, keepdim=True)
            idx = torch.cat((idx, token), dim=1)
        return idx

    def test_equals_the_plain_loop_with_and_without_cache(self):
        for use_cache in (True, False):
            for length in (1, 4, 8, 13):
                for batch in (1, 5):
                    for options in (dict(), dict(do_sample=True), dict(do_sample=True, temperature=0.7, top_k=4)):
                        with self.subTest(use_cache=use_cache, length=length, batch=batch, **options):
                            idx = torch.randint(11, (batch, length))
                            set_seed(6)
                            expected = self.plain(idx, 15, **options)
                            set_seed(6)
                            self.assertEqual(self.model.generate(idx, 15, use_cache=use_cache, **options).tolist(), expected.tolist())

    def test_half_precision(self):
        model = tiny_gpt().bfloat16()
        idx = torch.randint(11, (2, 3))
        self.assertEqual(model.generate(idx, 4).tolist(), model.generate(idx, 4, use_cache=False).tolist())

    def test_cache_continues_with_several_tokens(self):
        idx = torch.randint(11, (2, 8))
        expected = self.model(idx)[0]
        for cuts in ((1, 7), (3, 5), (2, 3, 3), (1,) * 8, (8,)):
            cache, parts, start = [KVCache(8) for _ in self.model.transformer.h], [], 0
            for cut in cuts:
                parts.append(self.model(idx[:, start:start + cut], cache=cache)[0])
                start += cut
            torch.testing.assert_close(torch.cat(parts, dim=1), expected)
        with self.assertRaisesRegex(ValueError, "9 tokens"):
            self.model(idx[:, :1], cache=cache)

    def test_compiled_blocks_need_two_translations(self):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        model = copy.deepcopy(self.model)
        for block in model.transformer.h:
            block.compile(backend=backend, fullgraph=True, dynamic=True)
        idx = torch.randint(11, (2, 3))
        self.assertEqual(model.generate(idx, 5).tolist(), self.model.generate(idx, 5).tolist())
        self.assertEqual(len(graphs), 2) # one reads the prompt, one a token after it; all layers and lengths share them

    def test_stream_gives_the_tokens_of_generate(self):
        idx = torch.randint(11, (2, 3))
        tokens = list(self.model.stream(idx, 12))
        self.assertEqual([token.shape for token in tokens], [(2,)] * 12)
        self.assertEqual(torch.stack(tokens, dim=1).tolist(), self.model.generate(idx, 12)[:, 3:].tolist())

    def test_tiny_temperatures_are_greedy(self):
        idx = torch.randint(11, (2, 3))
        for temperature in (1e-20, 1e-37, 1e-39, 1e-45, 1e-300):
            self.assertEqual(self.model.generate(idx, 9, temperature=temperature, do_sample=True).tolist(), self.model.generate(idx, 9).tolist())

    def test_temperature_zero_is_greedy(self):
        idx = torch.randint(11, (2, 3))
        self.assertEqual(self.model.generate(idx, 9, temperature=0.0, do_sample=True).tolist(), self.model.generate(idx, 9).tolist())

    def test_top_p_small_is_greedy(self):
        idx = torch.randint(11, (2, 3))
        self.assertEqual(self.model.generate(idx, 9, do_sample=True, top_p=1e-6).tolist(), self.model.generate(idx, 9).tolist())

    def test_stop_token(self):
        idx = torch.randint(11, (4, 2))
        free = self.model.generate(idx, 20)[:, 2:].tolist()
        stop = free[0][4]
        expected = [row[:row.index(stop) + 1] if stop in row else row for row in free]
        length = max(map(len, expected))
        padded = [row + [stop] * (length - len(row)) for row in expected]
        self.assertEqual(self.model.generate(idx, 20, stop_token=stop)[:, 2:].tolist(), padded)

    def test_modes_are_put_back_and_gradients_can_flow_after(self):
        self.model.train()
        self.model.transformer.h[0].eval()
        modes = [module.training for module in self.model.modules()]
        stream = self.model.stream(torch.zeros(1, 1, dtype=torch.long), 5)
        token = next(stream)
        self.assertEqual([module.training for module in self.model.modules()], modes)
        self.model(token[:, None], token[:, None])[1].backward() # it is an ordinary tensor
        idx = self.model.generate(torch.zeros(1, 1, dtype=torch.long), 5)
        self.model(idx[:, :-1], idx[:, 1:])[1].backward()
        self.assertEqual([module.training for module in self.model.modules()], modes)

    def test_an_abandoned_stream_undoes_nothing(self):
        self.model.train()
        stream = self.model.stream(torch.zeros(1, 1, dtype=torch.long), 5)
        next(stream)
        self.model.eval() # the user's own decision
        stream.close()
        self.assertFalse(any(module.training for module in self.model.modules()))

    def test_two_streams_in_turns_and_eight_threads_run_without_dropout(self):
        prompts = [torch.randint(11, (1, 3)) for _ in range(8)]
        expected = [self.model.generate(prompt, 12).tolist() for prompt in prompts]
        self.model.train() # with dropout, each of them would go wrong
        first, second = (self.model.stream(prompt, 12) for prompt in prompts[:2])
        pairs = [(a.item(), b.item()) for a, b in zip(first, second)]
        self.assertEqual([list(row) for row in zip(*pairs)], [expected[i][0][3:] for i in range(2)])
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            for _ in range(3):
                self.assertEqual(list(threads.map(lambda prompt: self.model.generate(prompt, 12).tolist(), prompts)), expected)
        self.assertTrue(all(module.training for module in self.model.modules()))

    def test_bad_arguments_are_refused_at_the_call(self):
        for options, message in ((dict(top_k=0), "top_k=0"), (dict(top_k=1.5), "top_k=1.5"), (dict(top_k="a"), "top_k='a'"),
                                 (dict(max_new_tokens=1.5), "max_new_tokens=1.5"), (dict(max_new_tokens=None), "max_new_tokens=None"),
                                 (dict(temperature="hot"), "temperature='hot'"), (dict(top_p=2), "top_p=2")):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                self.model.stream(torch.zeros(1, 1, dtype=torch.long), **dict(max_new_tokens=5, do_sample=True) | options)

    def test_bad_settings(self):
        idx = torch.zeros(1, 2, dtype=torch.long)
        for prompt, options, message in (
            (idx[:, :0], {}, "one token or more"), (idx[0], {}, "shape"), (idx, dict(temperature=-1.0), "temperature=-1"),
            (idx, dict(temperature=math.nan), "temperature=nan"), (idx, dict(temperature=math.inf), "temperature=inf"), (idx, dict(top_k=0), "top_k=0"), (idx, dict(top_p=0.0), "top_p=0"),
            (idx, dict(top_p=1.5), "top_p=1.5"), (idx, dict(max_new_tokens=-1), "max_new_tokens=-1"),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                self.model.generate(prompt, **(dict(max_new_tokens=3, do_sample=True) | options))
        with self.assertRaisesRegex(ValueError, "vocabulary"):
            self.model.generate(idx + 11, 3)
        self.assertEqual(self.model.generate(idx, 0).tolist(), idx.tolist())


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
            expected = {name for name in names.values() if name.endswith(".weight") and (".c_" in name or name == "lm_head.weight")}
            self.assertEqual({names[id(parameter)] for parameter in decayed["params"]}, expected)
            self.assertEqual("lm_head.weight" in expected, not tie)

    def test_a_step_learns(self):
        set_seed(7)
        model = GPT(tiny_config())
        config = Trainer.get_default_config()
        config.learning_rate = 1e-2
        optimizer, idx = model.configure_optimizers(config), torch.randint(11, (8, 8))
        losses = []
        for _ in range(30):
            loss = model(idx[:, :-1], idx[:, 1:])[1]
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.assertLess(losses[-1], 0.7 * losses[0])


class Parts(unittest.TestCase):
    def test_block_adds_to_the_residual_stream(self):
        set_seed(8)
        block = Block(tiny_config()).eval()
        x = torch.randn(2, 5, 16)
        middle = x + block.attn(F.layer_norm(x, (16,), block.ln_1.weight, block.ln_1.bias))
        inner = block.mlp.c_fc(F.layer_norm(middle, (16,), block.ln_2.weight, block.ln_2.bias))
        gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner ** 3)))
        torch.testing.assert_close(block(x), middle + block.mlp.c_proj(gelu))

    def test_state_dict_survives_a_file(self):
        model, file = tiny_gpt(), io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        fresh = GPT(tiny_config()).eval()
        fresh.load_state_dict(torch.load(file, weights_only=True))
        idx = torch.randint(11, (1, 8))
        self.assertTrue(torch.equal(fresh(idx)[0], model(idx)[0]))


if __name__ == "__main__":
    unittest.main()
