"""
How a model learns: steps, batches, targets, rates, callbacks, an interrupted run.

    python -m unittest tests.test_trainer
"""

import math
import sys
import threading
import unittest
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

from common import tiny_config
from mingpt import processes
from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.utils import set_seed
from train_script import Masked, Pairs


def no_dropout(**changes) -> GPT:
    """Returns a GPT for the datasets of train_script, without dropout."""
    set_seed(1)
    rates = dict(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    return GPT(tiny_config(vocab_size=5, **rates | changes))


def make_trainer(model=None, train_dataset=None, **settings) -> Trainer:
    config = Trainer.get_default_config()
    usual = dict(device="cpu", batch_size=8, max_iters=10, seed=5, learning_rate=1e-2)
    config.merge_from_dict(usual | settings)
    if model is None:
        model = no_dropout()
    return Trainer(config, model, Pairs() if train_dataset is None else train_dataset)


def weights(model) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


class Regression(torch.nn.Module):
    """A module that is no GPT: it has neither configure_optimizers nor count_targets."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x, y):
        output = self.layer(x)
        return output, ((output - y) ** 2).mean()


class Line(torch.utils.data.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        x = torch.tensor([index / 100, (index / 100) ** 2, 1.0])
        return x, x[:1] * 2 + 1


class VectorPairs(Pairs):
    """The same examples, fetched a whole batch at a time."""

    def __getitems__(self, indices):
        rows = [super(VectorPairs, self).__getitem__(index) for index in indices]
        return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


class Nothing(Pairs):
    """No target counts."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x, torch.full_like(y, -1)


class Numbered(torch.utils.data.Dataset):
    """Examples that are their numbers."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.full((3,), float(index)), torch.zeros(1)


EIGHT_ROWS = torch.utils.data.Subset(Pairs(), range(8))


class Loop(unittest.TestCase):
    def test_trains_any_module(self):
        trainer = make_trainer(Regression(), Line(), max_iters=200, learning_rate=5e-2,
                               weight_decay=0.0)
        trainer.run()
        self.assertLess(trainer.loss.item(), 0.01)
        self.assertEqual(trainer.iter_num, 200)

    def test_memorises_eight_rows(self):
        for optimizer in ("adamw", "muon"):
            trainer = make_trainer(train_dataset=EIGHT_ROWS, max_iters=60, optimizer=optimizer)
            losses = []
            trainer.add_callback("on_batch_end", lambda trainer: losses.append(trainer.loss.item()))
            trainer.run()
            # By chance a token is right in one of five cases.
            self.assertAlmostEqual(losses[0], math.log(5), delta=0.2)
            self.assertLess(losses[-1], 0.6 * math.log(5))

    def test_a_callback_sees_the_step_that_it_follows(self):
        trainer = make_trainer(max_iters=3)
        calls = []
        for event in ("on_train_start", "on_train_end"):
            trainer.add_callback(event, lambda _, event=event: calls.append(event))
        trainer.add_callback("on_batch_end", lambda trainer: calls.append(trainer.iter_num))
        trainer.run()
        self.assertEqual(calls, ["on_train_start", 0, 1, 2, "on_train_end"])
        self.assertEqual(trainer.iter_num, 3)
        self.assertGreater(trainer.iter_dt, 0)

    def test_stop_ends_the_run_after_this_step(self):
        trainer = make_trainer(max_iters=None)
        ended = []
        trainer.add_callback("on_train_end", ended.append)
        trainer.add_callback(
            "on_batch_end", lambda trainer: trainer.stop() if trainer.iter_num == 3 else None)
        trainer.run()
        self.assertEqual((trainer.iter_num, ended), (4, [trainer]))
        trainer.config.max_iters = 2
        trainer.run()
        self.assertEqual(trainer.iter_num, 2)

    def test_max_iters_lowered_in_a_callback(self):
        trainer = make_trainer(max_iters=100)

        def lower(trainer):
            trainer.config.max_iters = 3

        trainer.add_callback("on_batch_end", lower)
        trainer.run()
        self.assertEqual(trainer.iter_num, 3)

    def test_the_model_is_in_training_mode(self):
        model = no_dropout().eval()
        trainer = make_trainer(model, max_iters=1)
        trainer.add_callback("on_batch_end", lambda _: self.assertTrue(model.training))
        trainer.run()

    def test_bad_settings(self):
        bad = dict(
            grad_accum_steps=(0, -1, 1.5, "x"), batch_size=(-8, 0), max_iters=(-3, math.nan, "x"),
            num_workers=(-1, 10**9), warmup_iters=(-1,), grad_norm_clip=(-1.0,),
            weight_decay=(-0.1, math.nan), learning_rate=(-1e-3, math.inf, "fast"),
            min_lr=(-1.0,), seed=(-1, 0.5), schedule=("step",), dtype=("float8",),
            betas=(0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9), ("a", "b"), None), momentum=(1.0, -0.1),
            lr_decay_iters=(-1, "soon"), device=("cuda:99", "gpu", "", "meta", "hpu"),
        )
        for field, value in ((field, value) for field, values in bad.items() for value in values):
            with self.subTest(field=field, value=value):
                with self.assertRaisesRegex(ValueError, f"got {field}="):
                    make_trainer(**{field: value})
        for settings, message in (
            (dict(batch_size=6, grad_accum_steps=4), "batch_size=6, expected a multiple of 4"),
            (dict(train_dataset=Numbered(0)), "a Numbered that is empty or has no length"),
            (dict(train_dataset=iter([])), "a list_iterator that is empty or has no length"),
            (dict(schedule="cosine", warmup_iters=11), "schedule='cosine' that ends at step 10"),
            (dict(schedule="cosine", max_iters=None),
             "schedule='cosine'.*expected a max_iters"),
            (dict(model=Regression(), optimizer="muon"), "optimizer='muon'.*configure_optimizers"),
            (dict(optimizer="sgd"), "optimizer='sgd'"),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                make_trainer(**settings).run()

    def test_a_module_that_returns_something_else_is_named(self):
        class Alone(Regression):
            def forward(self, x, y):
                return super().forward(x, y)[1]

        with self.assertRaisesRegex(ValueError, r"a Tensor.*expected a pair \(output, loss\)"):
            make_trainer(Alone(), Line()).run()

    def test_numbers_of_numpy_become_pythons(self):
        trainer = make_trainer(learning_rate=np.float64(1e-3), max_iters=np.int64(2))
        self.assertIs(type(trainer.config.learning_rate), float)
        self.assertIs(type(trainer.config.max_iters), int)

    def test_a_compiled_model(self):
        model = no_dropout()
        trainer = make_trainer(torch.compile(model, backend="eager"), max_iters=3)
        trainer.run()
        other = make_trainer(max_iters=3)
        other.run()
        torch.testing.assert_close(weights(model), weights(other.model), atol=1e-5, rtol=1e-4)


class Precision(unittest.TestCase):
    def test_bfloat16_learns_and_keeps_its_weights_in_float32(self):
        types = []
        losses = {}
        for dtype in ("float32", "bfloat16"):
            trainer = make_trainer(train_dataset=EIGHT_ROWS, dtype=dtype, max_iters=60)
            trainer.model.lm_head.register_forward_hook(
                lambda module, args, output: types.append(output.dtype))
            losses[dtype] = []
            trainer.add_callback("on_batch_end", lambda trainer, losses=losses[dtype]:
                                 losses.append(trainer.loss.item()))
            trainer.run()
            self.assertEqual(trainer.model.lm_head.weight.dtype, torch.float32)
        self.assertEqual((types[0], types[-1]), (torch.float32, torch.bfloat16))
        # The first step has the same weights. bfloat16 has 8 bits, and logits are about 1.
        self.assertAlmostEqual(losses["bfloat16"][0], losses["float32"][0], delta=0.02)
        self.assertLess(losses["bfloat16"][-1], 0.6 * losses["bfloat16"][0])

    def test_float16_scales_its_loss(self):
        trainer = make_trainer(dtype="float16", max_iters=3)
        trainer.run()
        self.assertTrue(trainer.scaler.is_enabled())
        self.assertTrue(weights(trainer.model).isfinite().all())
        # The norm is that of the gradient, not of the scaled one.
        other = make_trainer(max_iters=3)
        other.run()
        torch.testing.assert_close(trainer.grad_norm, other.grad_norm, atol=0, rtol=0.1)


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
        self.assertEqual(self.seen(), everything)
        self.assertEqual(self.seen(first=4, count=2), everything[4:])
        self.assertEqual(self.seen(num_workers=2), everything)
        self.assertEqual(self.seen(train_dataset=VectorPairs()), everything)
        self.assertNotEqual(self.seen(seed=6), everything)
        self.assertNotEqual(everything[0], everything[1])

    def test_processes_and_micro_batches_share_them_out(self):
        for replacement in (True, False):
            whole = self.seen(count=2, replacement=replacement)
            for world_size, steps in ((2, 1), (1, 4), (2, 2), (4, 2)):
                parts = [self.seen(count=2, rank=rank, world_size=world_size,
                                   grad_accum_steps=steps, replacement=replacement)
                         for rank in range(world_size)]
                for step in range(2):
                    joined = [row for micro in range(steps) for rank in range(world_size)
                              for row in parts[rank][step][micro]]
                    self.assertEqual(joined, whole[step][0])

    def numbers(self, **settings) -> list[int]:
        rows = self.seen(model=Regression(), **settings)
        return [int(x[0]) for micro_batches in rows for batch in micro_batches for x in batch]

    def test_without_replacement_each_example_comes_once_before_any_again(self):
        settings = dict(train_dataset=Numbered(20), batch_size=8, replacement=False)
        drawn = self.numbers(count=10, **settings)
        epochs = [drawn[i:i + 20] for i in range(0, 80, 20)]
        for epoch in epochs:
            self.assertEqual(sorted(epoch), list(range(20)))
        self.assertEqual(len(set(map(tuple, epochs))), 4)
        self.assertEqual(self.numbers(first=7, count=3, **settings), drawn[56:])
        # A batch larger than the dataset has some examples twice.
        drawn = self.numbers(count=2, train_dataset=Numbered(3), batch_size=6, replacement=False)
        self.assertEqual(sorted(drawn), sorted([0, 1, 2] * 4))

    def test_with_replacement_all_examples_are_equally_likely(self):
        drawn = self.numbers(count=100, train_dataset=Numbered(4), batch_size=16)
        counts = np.bincount(drawn, minlength=4)
        # 1,600 draws: 400 each, with a standard deviation of 17.
        self.assertTrue((abs(counts - 400) < 100).all())

    def test_loading_draws_nothing_from_the_global_generators(self):
        trainer = make_trainer()
        trainer.begin()
        torch.manual_seed(1)
        state = torch.get_rng_state()
        next(trainer.draw_batches())
        self.assertTrue(torch.equal(torch.get_rng_state(), state))

    def test_large_seeds_and_many_steps(self):
        self.assertEqual(len(self.seen(first=10**9, count=1, seed=2**63)), 1)


class Targets(unittest.TestCase):
    """A loss is the mean over the targets that count, however the step is cut."""

    def gpt(self):
        return no_dropout().double()

    def test_accumulation_changes_nothing(self):
        for dataset in (Masked(), Pairs(), VectorPairs()):
            results = []
            for steps in (1, 2, 6, 24):
                trainer = make_trainer(self.gpt(), dataset, grad_accum_steps=steps, batch_size=24,
                                       max_iters=3)
                trainer.run()
                results.append((weights(trainer.model), trainer.loss, trainer.grad_norm))
            for result in results[1:]:
                torch.testing.assert_close(result, results[0], atol=1e-9, rtol=1e-9)

    def test_a_step_against_plain_torch(self):
        dataset = Masked()
        trainer = make_trainer(self.gpt(), dataset, grad_accum_steps=4, batch_size=12, max_iters=1,
                               grad_norm_clip=0.0)
        shown = []
        model = trainer.model
        hook = model.register_forward_pre_hook(lambda module, args: shown.append(args))
        before = [p.detach().clone() for p in model.parameters()]
        trainer.run()
        hook.remove()
        loss = trainer.loss
        gradients = [p.grad.clone() for p in model.parameters()]

        with torch.no_grad():
            for p, old in zip(model.parameters(), before):
                p.copy_(old)
        model.zero_grad()
        x, y = (torch.cat(parts) for parts in zip(*shown))
        logits = model(x)[0].flatten(0, 1)
        expected = F.cross_entropy(logits[y.flatten() >= 0], y[y >= 0])
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), atol=1e-12, rtol=0)
        for p, gradient in zip(model.parameters(), gradients):
            torch.testing.assert_close(gradient, p.grad, atol=1e-12, rtol=0)

    def test_gradients_are_clipped(self):
        for clip, shortened in ((1e-3, True), (1e3, False), (0.0, False)):
            trainer = make_trainer(self.gpt(), max_iters=1, grad_norm_clip=clip)
            trainer.run()
            norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
            # grad_norm is the length before. torch adds 1e-6 to it when it divides.
            expected = clip if shortened else trainer.grad_norm.item()
            self.assertAlmostEqual(norm.item(), expected, delta=1e-5 * expected)
            self.assertGreater(trainer.grad_norm.item(), 0.01)

    def test_nothing_to_count_is_no_step(self):
        trainer = make_trainer(self.gpt(), Nothing(), max_iters=3)
        before = weights(trainer.model)
        trainer.run()
        self.assertEqual((trainer.loss.item(), trainer.grad_norm.item()), (0, 0))
        self.assertTrue(torch.equal(weights(trainer.model), before))

    def test_a_module_whose_mean_of_nothing_is_nan(self):
        class Bigrams(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(5, 5)

            def forward(self, x, y):
                logits = self.table(x).flatten(0, 1)
                return logits, F.cross_entropy(logits, y.flatten(), ignore_index=-1)

            def count_targets(self, y):
                return (y != -1).sum()

        results = []
        # Micro-batches of one row, most of which count nothing.
        for steps in (1, 12):
            set_seed(1)
            trainer = make_trainer(Bigrams().double(), Masked(), max_iters=20, batch_size=12,
                                   grad_accum_steps=steps)
            trainer.run()
            results.append((trainer.loss, weights(trainer.model)))
        torch.testing.assert_close(results[0], results[1], atol=1e-9, rtol=1e-9)

    def test_a_compiled_model_counts_as_the_model_does(self):
        y = torch.tensor([[1, -1, -1, 2]])
        trainer = make_trainer(torch.compile(no_dropout(), backend="eager"))
        self.assertEqual(trainer.count_targets(y), 2)

    def test_without_count_targets_every_target_counts(self):
        class Labels(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(3, 1)

            def forward(self, x, y):
                output = self.layer(x)
                return output, ((output - y.float()) ** 2).mean()

        x = torch.ones(8, 3)
        for y in (torch.full((8, 1), -1.0), torch.full((8, 1), -1), torch.full((8, 1), -100),
                  torch.full((8, 1), 255, dtype=torch.uint8)):
            set_seed(1)
            trainer = make_trainer(Labels(), torch.utils.data.TensorDataset(x, y), max_iters=1,
                                   grad_accum_steps=2)
            expected = trainer.model(x, y)[1].item()
            trainer.run()
            self.assertAlmostEqual(trainer.loss.item(), expected, delta=1e-5 * expected)


class Rates(unittest.TestCase):
    def used(self, **settings) -> list[float]:
        trainer = make_trainer(**settings)
        rates = []
        trainer.add_callback("on_batch_end", lambda trainer: rates.append(
            {group["lr"] for group in trainer.optimizer.param_groups}))
        trainer.run()
        self.assertTrue(all(len(groups) == 1 for groups in rates))
        return [groups.pop() for groups in rates]

    def assert_close(self, rates, expected):
        torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))

    def test_constant(self):
        self.assertEqual(self.used(max_iters=4, learning_rate=0.5), [0.5] * 4)

    def test_warmup(self):
        self.assert_close(self.used(max_iters=6, learning_rate=1.0, warmup_iters=4),
                          [0.25, 0.5, 0.75, 1.0, 1.0, 1.0])

    def test_linear_decays_to_the_end_of_the_run(self):
        self.assert_close(self.used(max_iters=4, learning_rate=1.0, schedule="linear"),
                          [1.0, 0.75, 0.5, 0.25])

    def test_cosine_with_warmup_and_an_end_of_its_own(self):
        rates = self.used(max_iters=8, learning_rate=1.0, schedule="cosine", warmup_iters=2,
                          lr_decay_iters=6, min_lr=0.1)
        half = math.sqrt(0.5) / 2
        expected = [0.5, 1.0, 1.0, 0.1 + 0.9 * (0.5 + half), 0.55, 0.1 + 0.9 * (0.5 - half), 0.1,
                    0.1]
        self.assert_close(rates, expected)

    def test_muon_has_the_schedule_too(self):
        rates = self.used(max_iters=4, learning_rate=0.1, schedule="linear", optimizer="muon")
        self.assert_close(rates, [0.1, 0.075, 0.05, 0.025])


class Interruptions(unittest.TestCase):
    """A run that Ctrl-C interrupted goes on where it was when run() is called again."""

    def run_with(self, interrupt_at=(), place="step", **settings):
        """Trains with interruptions in the given steps; returns batches and weights."""
        trainer = make_trainer(no_dropout(), VectorPairs(), max_iters=8, **settings)
        batches = []
        pending = list(interrupt_at)

        def interrupt():
            if pending and trainer.steps_done == pending[0]:
                pending.pop(0)
                raise KeyboardInterrupt

        def watch(module, args):
            if place == "step":
                interrupt()
            batches.append(args[0].tolist())

        trainer.model.register_forward_pre_hook(watch)
        if place == "callback":
            trainer.add_callback("on_batch_end", lambda trainer: interrupt())
        while True:
            try:
                trainer.run()
                break
            except KeyboardInterrupt:
                # The user looks at the model.
                trainer.model.eval()
        return batches, weights(trainer.model), trainer

    def test_with_the_batch_that_was_under_way(self):
        for settings in (dict(), dict(optimizer="muon"), dict(replacement=False)):
            expected = self.run_with(**settings)
            for place in ("step", "callback"):
                with self.subTest(place=place, **settings):
                    result = self.run_with((2, 5), place, **settings)
                    self.assertEqual(result[0], expected[0])
                    self.assertTrue(torch.equal(result[1], expected[1]))

    def test_it_says_so(self):
        with self.assertLogs("mingpt", "INFO") as logged:
            self.run_with((3,))
        lines = [line.split(":", 2)[2] for line in logged.output]
        self.assertIn("interrupted after step 3; run() goes on from there", lines)
        self.assertIn("going on after step 3", lines)

    def test_only_such_a_run_goes_on(self):
        batches, _, trainer = self.run_with((3,))
        trainer.run()
        self.assertEqual(trainer.iter_num, 8)
        trainer.add_callback("on_batch_end", lambda trainer: 1 / 0)
        with self.assertRaises(ZeroDivisionError):
            trainer.run()
        trainer.callbacks.clear()
        steps = []
        trainer.add_callback("on_batch_end", lambda trainer: steps.append(trainer.iter_num))
        trainer.run()
        self.assertEqual(steps, list(range(8)))

    def test_a_changed_rate_applies_after_it(self):
        trainer = make_trainer(max_iters=4)

        def interrupt(trainer):
            if trainer.iter_num == 1 and trainer.config.learning_rate == 1e-2:
                raise KeyboardInterrupt

        trainer.add_callback("on_batch_end", interrupt)
        with self.assertRaises(KeyboardInterrupt):
            trainer.run()
        trainer.config.learning_rate = 1e-3
        trainer.run()
        self.assertEqual(trainer.optimizer.param_groups[0]["lr"], 1e-3)
        # The moments of AdamW have counted all steps.
        self.assertEqual({int(state["step"]) for state in trainer.optimizer.state.values()}, {4})

    def test_a_head_replaced_after_it(self):
        trainer = make_trainer(max_iters=4)

        def interrupt(trainer):
            trainer.callbacks.clear()
            raise KeyboardInterrupt

        trainer.add_callback("on_batch_end", interrupt)
        with self.assertRaises(KeyboardInterrupt):
            trainer.run()
        trainer.model.lm_head = torch.nn.Linear(16, 5)
        before = trainer.model.lm_head.weight.detach().clone()
        trainer.run()
        self.assertEqual(trainer.iter_num, 4)
        self.assertFalse(torch.equal(trainer.model.lm_head.weight, before))
        steps = {name: int(trainer.optimizer.state[p]["step"])
                 for name, p in trainer.model.named_parameters()}
        self.assertEqual((steps["lm_head.weight"], steps["transformer.wte.weight"]), (3, 4))

    def test_in_another_thread(self):
        trainer = make_trainer(max_iters=2)
        thread = threading.Thread(target=trainer.run)
        thread.start()
        thread.join()
        self.assertEqual(trainer.iter_num, 2)


class Extremes(unittest.TestCase):
    def test_no_end(self):
        for max_iters in (sys.maxsize, math.inf, None):
            trainer = make_trainer(max_iters=max_iters)
            trainer.add_callback("on_batch_end", lambda trainer: trainer.stop())
            trainer.run()
            self.assertEqual(trainer.iter_num, 1)

    def test_a_dataset_of_one_example(self):
        for replacement in (True, False):
            x, y = Pairs()[0]
            dataset = torch.utils.data.TensorDataset(x[None], y[None])
            trainer = make_trainer(train_dataset=dataset, replacement=replacement, max_iters=60)
            trainer.run()
            self.assertLess(trainer.loss.item(), 0.1)

    def test_two_trainers_in_turns(self):
        expected = make_trainer(max_iters=4)
        expected.run()
        trainers = [make_trainer(no_dropout(), max_iters=4) for _ in range(2)]

        def step_other(trainer):
            # In the middle of one run another one runs.
            if trainer.iter_num == 1:
                trainers[1].run()

        trainers[0].add_callback("on_batch_end", step_other)
        trainers[0].run()
        for trainer in trainers:
            self.assertTrue(torch.equal(weights(trainer.model), weights(expected.model)))


class Precision(unittest.TestCase):
    def test_bfloat16_only_where_a_gpu_has_it_by_itself(self):
        # Older GPUs only emulate it.
        def supported(including_emulation=True):
            return including_emulation

        with mock.patch("torch.cuda.is_bf16_supported", supported):
            self.assertEqual(processes.choose_dtype("auto", "cuda"), torch.float32)
            self.assertEqual(processes.choose_dtype("bfloat16", "cuda"), torch.bfloat16)
        with mock.patch("torch.cuda.is_bf16_supported", lambda including_emulation=True: True):
            self.assertEqual(processes.choose_dtype("auto", "cuda"), torch.bfloat16)
            self.assertEqual(processes.choose_dtype("auto", "cpu"), torch.float32)


if __name__ == "__main__":
    unittest.main()
