"""
How a model learns: steps, batches, targets, rates, an interrupted run.

    python -m unittest tests.test_trainer
"""

import copy
import itertools
import math
import unittest
from unittest import mock

import torch
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

from common import tiny_config
from mingpt import processes
from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode, set_seed
from train_script import Masked, Pairs


def no_dropout(**changes) -> GPT:
    """Returns a GPT for the datasets of train_script, without dropout."""
    set_seed(1)
    rates = dict(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    return GPT(tiny_config(vocab_size=5, **rates | changes))


def make_trainer(model=None, train_dataset=None, kind=Trainer, **settings) -> Trainer:
    usual = dict(device="cpu", batch_size=8, max_iters=4, seed=5, learning_rate=1e-2)
    config = CfgNode(**usual | settings)
    model = no_dropout() if model is None else model
    return kind(config, model, Pairs() if train_dataset is None else train_dataset)


def weights(model) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def record(trainer, look) -> list:
    """Returns a list that gets look(trainer) at the end of each step."""
    seen = []
    trainer.add_callback("on_batch_end", lambda trainer: seen.append(look(trainer)))
    return seen


def at_step(trainer, number, act) -> None:
    """Lets a trainer call act(trainer) at the end of one step."""
    def callback(trainer):
        if trainer.iter_num == number:
            act(trainer)

    trainer.add_callback("on_batch_end", callback)


class Regression(torch.nn.Module):
    """Stands for a module without configure_optimizers and count_targets."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x, y):
        output = self.layer(x)
        return output, ((output - y) ** 2).mean()


class Bigrams(torch.nn.Module):
    """Returns a loss of NaN where no target counts."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(5, 5)

    def forward(self, x, y):
        logits = self.table(x).flatten(0, 1)
        return logits, F.cross_entropy(logits, y.flatten(), ignore_index=-1)

    def count_targets(self, y):
        return (y != -1).sum()


X = torch.linspace(0, 1, 100)[:, None] ** torch.arange(3)  # (100, 3)
LINE = TensorDataset(X, X[:, 1:2] * 2 + 1)


class Loop(unittest.TestCase):
    def test_any_module_learns(self):
        trainer = make_trainer(Regression(), LINE, max_iters=200, learning_rate=5e-2,
                               weight_decay=0.0)
        trainer.run()
        self.assertLess(trainer.loss.item(), 0.01)

    def test_a_gpt_memorises_eight_rows_in_each_precision(self):
        first = []
        for settings in (dict(), dict(optimizer="muon"), dict(dtype="bfloat16"),
                         dict(dtype="float16")):
            with self.subTest(**settings):
                trainer = make_trainer(train_dataset=Subset(Pairs(), range(8)), max_iters=60,
                                       **settings)
                seen = []
                trainer.model.lm_head.register_forward_hook(
                    lambda module, args, output: seen.append(output.dtype))
                losses = record(trainer, lambda trainer: (trainer.loss, trainer.grad_norm))
                trainer.run()
                self.assertLess(losses[-1][0], 0.6 * losses[0][0])
                self.assertEqual(seen[0], getattr(torch, settings.get("dtype", "float32")))
                self.assertEqual(trainer.model.lm_head.weight.dtype, torch.float32)
                first.append(losses[0])
        for values in first:
            # The first step has the same weights. bfloat16 has 8 bits, logits
            # are about 1, and a gradient is not one that float16 has scaled.
            torch.testing.assert_close(values, first[0], atol=0.02, rtol=0.1)

    def test_a_callback_sees_the_step_that_it_follows(self):
        trainer = make_trainer(no_dropout().eval(), max_iters=3)
        calls = []
        for event in ("on_train_start", "on_train_end"):
            trainer.add_callback(event, lambda _, event=event: calls.append(event))
        trainer.add_callback("on_batch_end", lambda trainer: calls.append(
            (trainer.iter_num, trainer.model.training)))
        has_gradient = record(trainer, lambda trainer: trainer.model.lm_head.weight.grad.any())
        trainer.run()
        self.assertEqual(calls, ["on_train_start", (0, True), (1, True), (2, True), "on_train_end"])
        self.assertEqual(has_gradient, [True] * 3)
        self.assertEqual(trainer.iter_num, 3)
        self.assertGreater(trainer.iter_dt, 0)

    def test_a_wrong_setting_is_named(self):
        for settings in (
            dict(batch_size=0), dict(grad_accum_steps=2.0), dict(max_iters=math.nan),
            dict(num_workers=1.0), dict(num_workers=10**9), dict(grad_norm_clip=-1.0),
            dict(weight_decay=math.nan), dict(learning_rate="fast"), dict(seed=0.5),
            dict(schedule="step"), dict(dtype="float8"), dict(betas=(0.9, 1.0)),
            dict(momentum=1.0), dict(device="cuda:99"), dict(device="meta"),
            dict(batch_size=6, grad_accum_steps=4), dict(min_lr=1.0, learning_rate=0.1),
            dict(schedule="cosine", max_iters=None), dict(schedule="linear", warmup_iters=5),
            dict(schedule="linear", max_iters=math.inf),
            dict(optimizer="sgd"), dict(optimizer="muon", model=Regression()),
        ):
            name = next(iter(settings))
            with self.subTest(**settings), self.assertRaisesRegex(ValueError, f"got {name}="):
                make_trainer(**settings).run()
        for words, model, dataset in (("empty", Regression(), Subset(LINE, [])),
                                      ("a pair", torch.nn.Bilinear(3, 1, 1), LINE)):
            with self.subTest(words), self.assertRaisesRegex(ValueError, words):
                make_trainer(model, dataset).run()

    def test_bfloat16_is_taken_only_where_a_gpu_has_it_by_itself(self):
        for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
            # Older GPUs emulate it.
            with mock.patch("torch.cuda.is_bf16_supported",
                            lambda including_emulation=True: including_emulation or has):
                self.assertEqual(processes.choose_dtype("auto", "cuda"), expected)
        self.assertEqual(processes.choose_dtype("auto", "cpu"), torch.float32)


class Batches(unittest.TestCase):
    def seen(self, first=0, count=6, rank=0, world_size=1, **settings) -> list:
        """Returns x of the micro-batches of some steps, as lists."""
        trainer = make_trainer(**settings)
        trainer.begin()
        trainer.steps_done = first
        trainer.rank = rank
        trainer.world_size = world_size
        batches = trainer.draw_batches()
        return [[x.tolist() for x, _ in next(batches)] for _ in range(count)]

    def test_depend_on_seed_and_step_alone(self):
        everything = self.seen()
        torch.manual_seed(123)
        self.assertEqual(self.seen(num_workers=2), everything)
        self.assertEqual(self.seen(first=4, count=2), everything[4:])
        self.assertNotEqual(self.seen(seed=6), everything)
        self.assertNotEqual(everything[0], everything[1])
        self.assertEqual(len(self.seen(first=10**9, count=1, seed=2**63)), 1)

    def test_processes_and_micro_batches_share_them_out(self):
        whole = self.seen(count=2)
        for world_size, steps in ((2, 1), (1, 4), (4, 2)):
            parts = [self.seen(count=2, rank=rank, world_size=world_size, grad_accum_steps=steps)
                     for rank in range(world_size)]
            for step in range(2):
                joined = [row for micro in range(steps) for rank in range(world_size)
                          for row in parts[rank][step][micro]]
                self.assertEqual(joined, whole[step][0])


class Targets(unittest.TestCase):
    """Cuts a step in all ways: its loss is the mean over the targets that count."""

    def test_a_step_against_plain_torch(self):
        for make, steps in itertools.product((no_dropout, Bigrams), (1, 4, 12)):
            plain = make().double()
            trainer = make_trainer(copy.deepcopy(plain), Masked(), grad_accum_steps=steps,
                                   batch_size=12, max_iters=1, grad_norm_clip=0.0)
            shown = []
            trainer.model.register_forward_pre_hook(lambda module, args: shown.append(args))
            trainer.run()

            x, y = (torch.cat(parts) for parts in zip(*shown))
            logits = plain(x, y)[0].reshape(-1, 5)
            expected = F.cross_entropy(logits[y.flatten() >= 0], y[y >= 0])
            expected.backward()
            torch.testing.assert_close(trainer.loss, expected.detach(), atol=1e-12, rtol=0)
            for p, q in zip(trainer.model.parameters(), plain.parameters()):
                torch.testing.assert_close(p.grad, q.grad, atol=1e-12, rtol=0)

    def test_gradients_are_clipped(self):
        for clip, shortened in ((1e-3, True), (1e3, False), (0.0, False), (math.inf, False)):
            trainer = make_trainer(no_dropout().double(), max_iters=1, grad_norm_clip=clip)
            trainer.run()
            norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
            # grad_norm is the length before. torch divides by 1e-6 more.
            expected = clip if shortened else trainer.grad_norm.item()
            self.assertAlmostEqual(norm.item(), expected, delta=1e-5 * expected)
            self.assertGreater(trainer.grad_norm.item(), 0.01)

    def test_nothing_to_count_is_no_step(self):
        x = torch.zeros(4, 8, dtype=torch.long)
        trainer = make_trainer(train_dataset=TensorDataset(x, x - 1), max_iters=3)
        before = weights(trainer.model)
        trainer.run()
        self.assertEqual((trainer.loss.item(), trainer.grad_norm.item()), (0, 0))
        self.assertTrue(torch.equal(weights(trainer.model), before))

    def test_a_model_says_which_count_and_else_all_do(self):
        for y in (torch.tensor([[-1]]), torch.tensor([[-100]]), torch.tensor([[255]]).byte()):
            self.assertEqual(make_trainer(Regression(), LINE).count_targets(y), 1)
        y = torch.tensor([[1, -1, -1, 2]])
        for model in (no_dropout(), torch.compile(no_dropout(), backend="eager")):
            self.assertEqual(make_trainer(model).count_targets(y), 2)


class Rates(unittest.TestCase):
    def test_warmup_and_decay(self):
        half = math.sqrt(0.5) / 2
        for settings, expected in (
            (dict(max_iters=3), [1.0] * 3),
            (dict(max_iters=6, warmup_iters=4), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
            (dict(warmup_iters=2.5), [0.4, 0.8, 1.0, 1.0]),
            (dict(schedule="linear"), [1.0, 0.75, 0.5, 0.25]),
            (dict(max_iters=8, schedule="cosine", warmup_iters=2, lr_decay_iters=6, min_lr=0.1),
             [0.5, 1.0, 1.0, 0.1 + 0.9 * (0.5 + half), 0.55, 0.1 + 0.9 * (0.5 - half), 0.1, 0.1]),
        ):
            with self.subTest(**settings):
                trainer = make_trainer(learning_rate=1.0, **settings)
                rates = record(trainer, lambda trainer: {
                    group["lr"] for group in trainer.optimizer.param_groups})
                trainer.run()
                # All groups have one rate.
                torch.testing.assert_close([rate for step in rates for rate in step], expected)


class Interruptions(unittest.TestCase):
    """Interrupts runs by Ctrl-C: the next run() goes on where it was."""

    def left_by(self, error, **settings) -> Trainer:
        """Returns a trainer with two of four steps done."""
        trainer = make_trainer(**settings)
        at_step(trainer, 1, mock.Mock(side_effect=error))
        with self.assertRaises(error):
            trainer.run()
        trainer.callbacks.clear()
        return trainer

    def test_the_batch_that_was_under_way_is_taken_again(self):
        def train(interrupt_at, **settings):
            trainer = make_trainer(max_iters=8, **settings)
            batches = []

            def watch(module, args):
                if interrupt_at and trainer.steps_done == interrupt_at[0]:
                    interrupt_at.pop(0)
                    raise KeyboardInterrupt
                batches.append(args[0].tolist())

            trainer.model.register_forward_pre_hook(watch)
            while trainer.steps_done < 8:
                try:
                    trainer.run()
                except KeyboardInterrupt:
                    # The user looks at the model.
                    trainer.model.eval()
            return batches, weights(trainer.model).tolist()

        for settings in (dict(), dict(optimizer="muon"), dict(replacement=False)):
            self.assertEqual(train([2, 5], **settings), train([], **settings))

    def test_an_error_is_no_interruption(self):
        for error, expected in ((KeyboardInterrupt, [2, 3]), (ZeroDivisionError, [0, 1, 2, 3])):
            with self.assertLogs("mingpt", "INFO") as logged:
                trainer = self.left_by(error)
            self.assertEqual("run() goes on from there" in logged.output[-1],
                             error is KeyboardInterrupt)
            steps = record(trainer, lambda trainer: trainer.iter_num)
            trainer.run()
            self.assertEqual(steps, expected)

    def test_in_a_callback_at_the_start(self):
        trainer = self.left_by(KeyboardInterrupt)
        trainer.set_callback("on_train_start", mock.Mock(side_effect=[KeyboardInterrupt, None]))
        self.assertRaises(KeyboardInterrupt, trainer.run)
        steps = record(trainer, lambda trainer: trainer.iter_num)
        trainer.run()
        self.assertEqual(steps, [2, 3])

    def test_where_float16_scales_the_gradients_back(self):
        trainer = make_trainer(max_iters=2, dtype="float16")
        with mock.patch("torch.nn.utils.clip_grad_norm_", side_effect=KeyboardInterrupt):
            self.assertRaises(KeyboardInterrupt, trainer.run)
        trainer.run()
        self.assertEqual(trainer.iter_num, 2)

    def test_a_schedule_and_an_optimizer_changed_meanwhile_count(self):
        for optimizer in ("adamw", "muon"):
            trainer = self.left_by(KeyboardInterrupt, schedule="linear")
            trainer.config.merge_from_dict(dict(schedule="constant", optimizer=optimizer))
            trainer.run()
            self.assertEqual({group["lr"] for group in trainer.optimizer.param_groups}, {1e-2})

    def test_a_rate_and_a_head_changed_meanwhile_count(self):
        trainer = self.left_by(KeyboardInterrupt)
        trainer.config.learning_rate = 1e-3
        trainer.model.lm_head = torch.nn.Linear(16, 5)
        trainer.run()
        self.assertEqual(trainer.optimizer.param_groups[0]["lr"], 1e-3)
        # AdamW counts the steps of each parameter. Old ones keep their state.
        steps = {name: int(trainer.optimizer.state[p]["step"])
                 for name, p in trainer.model.named_parameters()}
        self.assertEqual((steps["lm_head.weight"], steps["transformer.wte.weight"]), (2, 4))
