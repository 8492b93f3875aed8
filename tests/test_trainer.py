"""The training loop: what it promises of batches, schedules, checkpoints, interruptions and processes."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

from common import ROOT, Folder, run_python, tiny_config
from mingpt.model import GPT
from mingpt.trainer import Trainer, read_checkpoint
from mingpt.utils import CfgNode, set_seed
from train_script import Masked, Pairs

SCRIPT = Path(__file__).parent / "train_script.py"

def make_trainer(model=None, train_dataset=None, val_dataset=None, **settings) -> Trainer:
    config = Trainer.get_default_config()
    config.merge_from_dict(dict(device="cpu", batch_size=8, max_iters=10, seed=5, log_interval=0, learning_rate=1e-2) | settings)
    if model is None:
        set_seed(1)
        model = GPT(tiny_config(vocab_size=5, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0))
    return Trainer(config, model, Pairs() if train_dataset is None else train_dataset, val_dataset)

def weights(model) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])

def read_metrics(folder, *left_out) -> list[dict]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]

class Regression(torch.nn.Module):
    """A module that is no GPT and has no configure_optimizers."""

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


class Loop(unittest.TestCase):
    def test_trains_any_module(self):
        trainer = make_trainer(Regression(), Line(), max_iters=200, learning_rate=5e-2, weight_decay=0.0)
        before = trainer.evaluate(Line())
        trainer.run()
        self.assertLess(trainer.evaluate(Line()), before / 100)
        self.assertEqual(trainer.iter_num, 200)

    def test_a_script_for_minGPT_runs_unchanged(self):
        script = """
import torch
from torch.utils.data import Dataset
from mingpt.model import GPT
from mingpt.trainer import Trainer, read_checkpoint
from mingpt.utils import CfgNode, set_seed
set_seed(3407)
class Copy(Dataset):
    def __len__(self): return 50
    def __getitem__(self, i):
        row = torch.randint(3, (4,), dtype=torch.long)
        row = torch.cat((row, row))
        x, y = row[:-1].clone(), row[1:].clone()
        y[:3] = -1
        return x, y
sizes = GPT.get_default_config()
sizes.model_type = 'gpt-nano'
sizes.vocab_size = 3
sizes.block_size = 7
model = GPT(sizes)
settings = Trainer.get_default_config()
settings.num_workers = 0
settings.max_iters = 20
settings.learning_rate = 5e-4
trainer = Trainer(settings, model, Copy())
def report(trainer):
    if trainer.iter_num % 10 == 0:
        print("step", trainer.iter_num, "took", trainer.iter_dt, "loss", trainer.loss.item())
trainer.set_callback('on_batch_end', report)
trainer.run()
model.eval()
prompt = torch.tensor([[0, 1, 2, 1]]).to(trainer.device)
with torch.no_grad():
    print(model.generate(prompt, 4, do_sample=False).shape)
"""
        printed = run_python("-c", script).stdout.splitlines()
        self.assertEqual([line.split()[:3] for line in printed if "took" in line], [["step", "0", "took"], ["step", "10", "took"]])
        self.assertEqual(printed[-1], "torch.Size([1, 8])")

    def test_callbacks(self):
        trainer, calls = make_trainer(max_iters=2, eval_interval=1, val_dataset=Pairs()), []
        for event in ("on_train_start", "on_eval_end", "on_train_end"):
            trainer.add_callback(event, lambda _, event=event: calls.append(event))
        trainer.set_callback("on_batch_end", lambda _: calls.append("replaced"))
        trainer.set_callback("on_batch_end", lambda trainer: calls.append(trainer.iter_num))
        trainer.add_callback("on_batch_end", lambda trainer: calls.append(trainer.loss.item() > 0 and trainer.iter_dt >= 0))
        trainer.run()
        self.assertEqual(calls, ["on_train_start", 0, True, "on_eval_end", 1, True, "on_eval_end", "on_train_end"])
        for method in (trainer.add_callback, trainer.set_callback):
            with self.assertRaisesRegex(ValueError, "no event 'on_batch_ends'.*on_batch_end"):
                method("on_batch_ends", print)

    def test_a_configuration_without_the_newer_fields(self):
        config = CfgNode(device="cpu", num_workers=0, max_iters=2, batch_size=4, learning_rate=5e-4, betas=(0.9, 0.95), weight_decay=0.1,
                         grad_norm_clip=1.0) # what minGPT has
        Trainer(config, Regression(), Line()).run()

    def test_a_subclass_may_have_events_of_its_own(self):
        class Mine(Trainer):
            events = (*Trainer.events, "on_sample")
        trainer, calls = Mine(make_trainer(max_iters=1).config, Regression(), Line()), []
        trainer.add_callback("on_sample", calls.append)
        trainer.add_callback("on_train_end", lambda trainer: trainer.trigger_callbacks("on_sample"))
        trainer.run()
        self.assertEqual(calls, [trainer])

    def test_run_twice_starts_over(self):
        trainer = make_trainer(max_iters=3)
        trainer.run()
        first = weights(trainer.model)
        trainer.run()
        self.assertEqual(trainer.iter_num, 3)
        self.assertFalse(torch.equal(weights(trainer.model), first))

    def test_bad_settings(self):
        for settings, message in (
            (dict(batch_size=6, grad_accum_steps=4), "batch_size=6, expected a multiple of 4"), (dict(batch_size=0), "batch_size=0"),
            (dict(dtype="float8"), "dtype='float8'.*bfloat16"), (dict(schedule="step"), "schedule='step'"),
            (dict(resume=True), "work_dir"), (dict(keep_best=True), "work_dir"),
            (dict(resume=True, work_dir="/nonexistent/run"), "no checkpoint at .nonexistent.run"),
            *((dict({field: value}), f"got {field}=") for field, values in {
                "grad_accum_steps": (0, -1, 1.5, "x"), "batch_size": (-8,), "max_iters": (0, -3), "eval_batches": (0,), "log_interval": (-1,),
                "eval_interval": (-1, None), "checkpoint_interval": (-1,), "num_workers": (-1, 10 ** 9), "warmup_iters": (-1,), "grad_norm_clip": (-1.0,),
                "weight_decay": (-0.1, math.nan), "learning_rate": (-1e-3, math.inf, "fast"), "min_lr": (-1.0,), "seed": (-1,),
                "betas": (0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9), ("a", "b"), None), "device": ("cuda:99", "gpu", "", "meta", "hpu")}.items() for value in values),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                make_trainer(**settings)
        with self.assertRaisesRegex(ValueError, "dataset is empty"):
            make_trainer(train_dataset=torch.utils.data.TensorDataset(torch.zeros(0, 2), torch.zeros(0, 2)))

    def test_learning_rate(self):
        trainer = make_trainer(learning_rate=1.0, warmup_iters=10, lr_decay_iters=110, min_lr=0.1)
        expected = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 35: 0.1 + 0.9 * (0.5 + 0.5 * math.sqrt(0.5)), 60: 0.55, 110: 0.1, 1000: 0.1}
        for iteration, rate in expected.items():
            self.assertAlmostEqual(trainer.learning_rate(iteration), rate)
        trainer.config.schedule = "linear"
        self.assertAlmostEqual(trainer.learning_rate(35), 0.775)
        trainer.config.lr_decay_iters = None
        self.assertEqual(trainer.learning_rate(10 ** 6), 1.0)
        used = []
        trainer = make_trainer(learning_rate=1.0, warmup_iters=4, max_iters=6)
        trainer.add_callback("on_batch_end", lambda trainer: used.append([group["lr"] for group in trainer.optimizer.param_groups]))
        trainer.run()
        self.assertEqual(used, [[rate] * 2 for rate in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)])

    def test_bfloat16(self):
        types, losses = [], {}
        for dtype in ("float32", "bfloat16"):
            trainer = make_trainer(dtype=dtype, max_iters=60)
            trainer.model.lm_head.register_forward_hook(lambda _module, _input, output: types.append(output.dtype))
            before = trainer.evaluate(Pairs(), max_batches=5)
            trainer.run()
            losses[dtype] = trainer.evaluate(Pairs(), max_batches=5)
            self.assertLess(losses[dtype], before - 0.005)
            self.assertEqual(trainer.model.lm_head.weight.dtype, torch.float32)
        self.assertEqual((types[0], types[-1]), (torch.float32, torch.bfloat16))
        self.assertAlmostEqual(losses["bfloat16"], losses["float32"], delta=0.01)

    def test_log_lines(self):
        trainer = make_trainer(max_iters=20, log_interval=10)
        with self.assertLogs("mingpt", "INFO") as logged:
            trainer.run()
        self.assertEqual(len(logged.output), 3)
        self.assertRegex(logged.output[1], r"step +10  loss \d\.\d{4}  lr 1\.00e-02 +[\d.]+ ms +[\d,]+ tokens/s  0:00:00 left")


class VectorPairs(Pairs):
    """The same examples, fetched a whole batch at a time."""

    def __getitems__(self, indices):
        rows = [super(VectorPairs, self).__getitem__(index) for index in indices]
        return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


class Batches(unittest.TestCase):
    def seen(self, first_iter=0, count=6, **settings):
        trainer = make_trainer(**settings)
        batches = trainer._draw_batches(first_iter)
        return [next(batches)[0].tolist() for _ in range(count)]

    def test_depend_on_seed_and_step_alone(self):
        all_of_them = self.seen()
        torch.manual_seed(123)
        self.assertEqual(self.seen(), all_of_them)
        self.assertEqual(self.seen(first_iter=4, count=2), all_of_them[4:])
        self.assertEqual(self.seen(num_workers=2), all_of_them)
        self.assertEqual(self.seen(train_dataset=VectorPairs()), all_of_them)
        self.assertNotEqual(self.seen(seed=6), all_of_them)
        self.assertNotEqual(all_of_them[0], all_of_them[1])

    def test_processes_and_micro_batches_share_them_out(self):
        whole = self.seen(count=2)
        for world, steps in ((2, 1), (1, 4), (2, 2), (4, 2)):
            parts = {}
            for rank in range(world):
                trainer = make_trainer(grad_accum_steps=steps)
                trainer.rank, trainer.world_size = rank, world
                batches = trainer._draw_batches(0)
                parts[rank] = [[next(batches)[0].tolist() for _ in range(steps)] for _ in range(2)]
            for step in range(2):
                joined = [row for micro in range(steps) for rank in range(world) for row in parts[rank][step][micro]]
                self.assertEqual(joined, whole[step])

    def test_the_seed_of_torch_is_the_default(self):
        set_seed(11)
        first = make_trainer(model=Regression(), train_dataset=Line(), seed=None)
        self.assertEqual(first.seed, 11)

    def test_loading_draws_nothing_from_the_global_generator(self):
        trainer = make_trainer()
        torch.manual_seed(1)
        state = torch.get_rng_state()
        next(trainer._draw_batches(0))
        trainer.evaluate(Pairs(), 2)
        self.assertTrue(torch.equal(torch.get_rng_state(), state))


class Nothing(Pairs):
    """No target counts."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x, torch.full_like(y, -1)

class Counted(unittest.TestCase):
    """A loss is the mean over the targets that count, however the step is cut."""

    def gpt(self):
        set_seed(1)
        return GPT(tiny_config(vocab_size=5, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)).double()

    def test_accumulation_changes_nothing(self):
        for dataset in (Masked(), Pairs(), VectorPairs()):
            results = []
            for steps in (1, 2, 6, 24):
                trainer = make_trainer(self.gpt(), dataset, grad_accum_steps=steps, batch_size=24, max_iters=3)
                trainer.run()
                results.append((weights(trainer.model), trainer.loss, trainer.grad_norm))
            for result in results[1:]:
                torch.testing.assert_close(result, results[0], atol=1e-9, rtol=1e-9)

    def test_a_step_against_plain_torch(self):
        trainer, dataset = make_trainer(self.gpt(), Masked(), grad_accum_steps=4, batch_size=12, grad_norm_clip=0.0), Masked()
        chosen = np.random.default_rng((5, 0)).integers(1000, size=12)
        x, y = (torch.stack(part) for part in zip(*(dataset[i] for i in chosen)))
        logits = trainer.model(x)[0]
        picked = logits.log_softmax(-1).flatten(0, 1)[torch.arange(96), y.flatten().clamp(min=0)][y.flatten() >= 0]
        expected = -picked.sum() / len(picked)
        expected.backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters()]
        trainer.model.zero_grad()
        trainer.optimizer.zero_grad = lambda set_to_none: None
        trainer.config.max_iters = 1
        trainer.run()
        torch.testing.assert_close(trainer.loss, expected.detach(), atol=1e-12, rtol=0)
        for p, gradient in zip(trainer.model.parameters(), gradients):
            torch.testing.assert_close(p.grad, gradient, atol=1e-12, rtol=0)

    def test_evaluate(self):
        dataset = Masked()
        x, y = (torch.stack(part) for part in zip(*(dataset[i] for i in range(1000))))
        for steps in (1, 4):
            trainer = make_trainer(self.gpt(), batch_size=32, grad_accum_steps=steps)
            self.assertAlmostEqual(trainer.evaluate(dataset), trainer.model(x, y)[1].item(), places=9)
        self.assertEqual(trainer.evaluate(Nothing()), 0)

    def test_nothing_to_count_is_no_step(self):
        class Now_and_then(Pairs): # by example: 3 of 4 count nothing
            def __getitem__(self, index):
                return (Pairs() if index % 4 == 0 else Nothing())[index]
        trainer = make_trainer(self.gpt(), Nothing(), max_iters=3, log_interval=1)
        before = weights(trainer.model)
        trainer.run()
        self.assertEqual((trainer.loss.item(), trainer.grad_norm.item()), (0, 0))
        self.assertTrue(torch.equal(weights(trainer.model), before))
        trainer = make_trainer(self.gpt(), Now_and_then(), max_iters=20, log_interval=1, batch_size=2, grad_accum_steps=2)
        trainer.run() # some steps count nothing, some micro-batches: none is taken for a divergence
        self.assertTrue(weights(trainer.model).isfinite().all())
        self.assertFalse(torch.equal(weights(trainer.model), before))

    def test_a_module_whose_mean_of_nothing_is_nan(self):
        class Bigrams(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(5, 5)
            def forward(self, x, y):
                logits = self.table(x)
                return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
        results = []
        for steps in (1, 12): # micro-batches of one row, most of which count nothing
            set_seed(1)
            trainer = make_trainer(Bigrams().double(), Masked(), max_iters=20, log_interval=1, batch_size=12, grad_accum_steps=steps)
            trainer.run()
            results.append((trainer.loss, weights(trainer.model)))
        torch.testing.assert_close(results[0], results[1], atol=1e-9, rtol=1e-9)

    def test_every_float_target_counts(self):
        dataset = torch.utils.data.TensorDataset(torch.ones(8, 3), torch.full((8, 1), -1.0))
        trainer = make_trainer(Regression(), dataset, max_iters=1)
        expected = (trainer.model(torch.ones(1, 3), -torch.ones(1, 1))[1]).item()
        self.assertGreater(expected, 0)
        trainer.run()
        self.assertAlmostEqual(trainer.loss.item(), expected, places=6)


class Evaluate(unittest.TestCase):
    def test_is_the_mean_over_examples(self):
        trainer, dataset = make_trainer(batch_size=32), Pairs()
        rows = [dataset[i] for i in range(1000)] # no multiple of the batch size
        x, y = (torch.stack(part) for part in zip(*rows))
        trainer.model.train()
        with torch.no_grad():
            expected = trainer.model.eval()(x, y)[1].item()
        trainer.model.train()
        self.assertAlmostEqual(trainer.evaluate(dataset), expected, places=5)
        self.assertTrue(trainer.model.training)

    def test_max_batches_spread_evenly(self):
        trainer, asked = make_trainer(), []
        class Watched(Pairs):
            def __getitem__(self, index):
                asked.append(index)
                return super().__getitem__(index)
        trainer.evaluate(Watched(), max_batches=2)
        self.assertEqual(len(asked), 16)
        self.assertEqual((asked[0], asked[-1], len(set(np.diff(asked)))), (0, 999, 2))
        with self.assertRaisesRegex(ValueError, "no example"):
            trainer.evaluate(torch.utils.data.TensorDataset(torch.zeros(0, 2), torch.zeros(0, 2)))


class Checkpoints(Folder):
    def test_resume_is_exact(self):
        def run(**settings):
            set_seed(1)
            trainer = make_trainer(model=GPT(tiny_config(vocab_size=5)), warmup_iters=5, lr_decay_iters=20, **settings)
            draws = []
            trainer.add_callback("on_batch_end", lambda _: draws.append((random.random(), np.random.rand(), torch.rand(()).item())))
            trainer.run()
            return weights(trainer.model), draws
        expected, draws = run(max_iters=20)
        run(max_iters=7, work_dir=self.folder)
        resumed, rest = run(max_iters=20, work_dir=self.folder, resume=True)
        self.assertTrue(torch.equal(resumed, expected))
        self.assertEqual(rest, draws[7:])

    def test_save_and_load_by_hand(self):
        trainer = make_trainer(max_iters=4)
        trainer.run()
        trainer.save_checkpoint(self.folder / "sub" / "x.pt")
        other = make_trainer(max_iters=4)
        other.load_checkpoint(self.folder / "sub" / "x.pt")
        self.assertTrue(torch.equal(weights(other.model), weights(trainer.model)))
        self.assertEqual(other.iter_num, 4)
        other.run()
        self.assertTrue(torch.equal(weights(other.model), weights(trainer.model))) # there was nothing left to do
        self.assertIn("learning_rate", torch.load(self.folder / "sub" / "x.pt", weights_only=True)["config"])

    def test_another_model_is_refused_and_nothing_changed(self):
        make_trainer(max_iters=1, work_dir=self.folder).run()
        other = make_trainer(model=GPT(tiny_config(vocab_size=5, n_layer=3, n_embd=8)), work_dir=self.folder)
        before = weights(other.model)
        with self.assertRaisesRegex(ValueError, r"another model: lm_head.weight: \(5, 16\) in the file, \(5, 8\) in the model.*more"):
            other.load_checkpoint(self.folder / "checkpoint.pt")
        self.assertTrue(torch.equal(weights(other.model), before))

    def test_what_does_not_fit_is_refused_and_nothing_changed(self):
        make_trainer(max_iters=3, work_dir=self.folder, log_interval=1).run()
        files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        good = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        other = make_trainer(Regression(), Line(), max_iters=2, work_dir=self.folder / "regression")
        other.run()

        class TwoGroups(GPT):
            def configure_optimizers(self, train_config):
                return torch.optim.SGD(self.parameters(), lr=1.0)
        def sgd():
            set_seed(1)
            return TwoGroups(tiny_config(vocab_size=5))
        for settings, message in ((dict(dtype="float16"), "has dtype=auto, now it is float16"), (dict(model=sgd()), "another optimizer"),
                                  (dict(max_iters=3), "has 3 steps already and max_iters=3; raise it"), (dict(max_iters=1), "max_iters=1"),
                                  (dict(model=Regression(), train_dataset=Line()), "another model"),
                                  (dict(work_dir=self.folder / "regression"), "another model")):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                make_trainer(**dict(max_iters=5, work_dir=self.folder, resume=True) | settings)
        torch.save({"iter_num": 3, "model": good["model"]}, self.folder / "foreign.pt")
        trainer = make_trainer()
        before, state = weights(trainer.model), torch.get_rng_state()
        with self.assertRaisesRegex(ValueError, "foreign.pt is no checkpoint of this trainer"):
            trainer.load_checkpoint(self.folder / "foreign.pt")
        self.assertTrue(torch.equal(weights(trainer.model), before) and torch.equal(torch.get_rng_state(), state))
        self.assertEqual({path.name: path.read_bytes() for path in self.folder.glob("*[lt]") if path.name != "foreign.pt"}, files)

    def test_new_settings_apply_and_are_named(self):
        set_seed(1)
        of_a_script = dict(hook=print, table={(1, 2): object()}) # only plain ones are kept
        make_trainer(max_iters=2, work_dir=self.folder, note="a", **of_a_script).run()
        with self.assertLogs("mingpt", "INFO") as logged:
            trainer = make_trainer(max_iters=4, work_dir=self.folder, resume=True, weight_decay=0.3, betas=(0.8, 0.9), seed=9, note="b", **of_a_script)
        self.assertEqual([(group["weight_decay"], group["betas"]) for group in trainer.optimizer.param_groups], [(0.3, (0.8, 0.9)), (0.0, (0.8, 0.9))])
        self.assertEqual(trainer.seed, 9)
        self.assertEqual({line.split(":", 2)[2] for line in logged.output if ' was ' in line}, {
            "max_iters was 2, is 4", "weight_decay was 0.1, is 0.3", "betas was [0.9, 0.95], is [0.8, 0.9]", "seed was 5, is 9", "note was a, is b"})

    def test_a_configuration_may_be_a_class(self):
        class Settings(CfgNode):
            learning_rate, max_iters = 0.5, 2

        config = Settings(work_dir=str(self.folder), device="cpu", log_interval=0)
        Trainer(config, make_trainer().model, Pairs()).run()
        self.assertEqual(read_checkpoint(self.folder / "checkpoint.pt")["config"]["learning_rate"], 0.5)

    def test_every_damaged_file_is_refused_or_as_good_as_whole(self):
        make_trainer(max_iters=2, work_dir=self.folder).run()
        path, rng = self.folder / "checkpoint.pt", random.Random(3)
        whole, good = path.read_bytes(), torch.load(path, weights_only=True)["model"]
        refused = 0
        for _ in range(100):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                loaded = read_checkpoint(path)["model"]
                self.assertTrue(all(torch.equal(loaded[name], good[name]) for name in good))
            except ValueError as error:
                self.assertIn("checkpoint.pt is", str(error))
                refused += 1
        self.assertGreater(refused, 50)
        for content in (b"", whole[:1000], b"<html>"):
            path.write_bytes(content)
            with self.assertRaisesRegex(ValueError, "damaged or no checkpoint"):
                read_checkpoint(path)

    def test_a_checkpoint_is_read_without_advice_to_drop_the_guard(self):
        torch.save(Regression(), self.folder / "checkpoint.pt")
        with self.assertRaisesRegex(ValueError, "checkpoint.pt is no checkpoint: it holds more than tensors") as caught:
            read_checkpoint(self.folder / "checkpoint.pt")
        self.assertNotIn("weights_only", str(caught.exception))

    @unittest.skipUnless(os.path.exists("/proc/self/maps"), "this system does not list what is mapped")
    def test_a_checkpoint_is_not_mapped_into_memory(self):
        make_trainer(max_iters=1, work_dir=self.folder).run()
        trainer = make_trainer(max_iters=2, work_dir=self.folder, resume=True) # the old file's space is free when it is replaced
        self.assertEqual(trainer.iter_num, 1)
        self.assertNotIn("checkpoint.pt", Path("/proc/self/maps").read_text())

    def test_the_random_state_of_a_gpu_is_in_the_checkpoint(self):
        class Generator: # stands for torch.mps or torch.cuda
            state = torch.tensor([1, 2], dtype=torch.uint8)
            def get_rng_state(self):
                return self.state
            def set_rng_state(self, state):
                self.state = state
        generator, trainer, path = Generator(), make_trainer(), self.folder / "x.pt"
        trainer.device_type = "mps"
        with mock.patch("torch.get_device_module", return_value=generator) as get:
            trainer.save_checkpoint(path)
            generator.state = None
            trainer.load_checkpoint(path)
        get.assert_called_with("mps")
        self.assertEqual(generator.state.tolist(), [1, 2])

    def test_a_work_dir_may_look_like_a_number(self):
        config = CfgNode(trainer=Trainer.get_default_config())
        config.merge_from_args(["--trainer.work_dir=2024"])
        self.assertEqual(config.trainer.work_dir, "2024")

    @unittest.skipUnless(os.path.exists("/dev/full"), "this system has no disk that is always full")
    def test_a_full_disk_is_named_with_the_metrics_file(self):
        trainer = make_trainer(work_dir=self.folder)
        os.symlink("/dev/full", self.folder / "metrics.jsonl")
        with self.assertRaisesRegex(OSError, "No space left.*metrics.jsonl"):
            trainer.write_metrics(split="train")

    def test_a_fresh_run_is_never_taken_for_the_old_one(self):
        make_trainer(max_iters=3, work_dir=self.folder, log_interval=1).run()
        trainer = make_trainer(max_iters=9, work_dir=self.folder, log_interval=1)
        def crash(trainer):
            raise RuntimeError
        trainer.add_callback("on_batch_end", crash)
        with self.assertRaises(RuntimeError):
            trainer.run()
        with self.assertRaisesRegex(ValueError, "no checkpoint"):
            make_trainer(max_iters=9, work_dir=self.folder, resume=True)
        self.assertEqual(torch.load(self.folder / "checkpoint.pt.old", weights_only=True)["iter_num"], 3)

    def test_rows_of_callbacks_are_not_doubled_after_a_crash(self):
        def run(crash_at=None, **settings):
            trainer = make_trainer(max_iters=6, work_dir=self.folder, log_interval=1, checkpoint_interval=2, eval_interval=2, val_dataset=Pairs(), **settings)
            def write(trainer):
                trainer.write_metrics(split="mine")
                if trainer.iter_num == crash_at:
                    raise RuntimeError
            trainer.add_callback("on_batch_end", write)
            trainer.add_callback("on_eval_end", lambda trainer: trainer.write_metrics(split="eval"))
            trainer.run()
        run()
        expected = read_metrics(self.folder, "seconds", "tokens_per_second")
        with self.assertRaises(RuntimeError):
            run(crash_at=4)
        run(resume=True)
        self.assertEqual(read_metrics(self.folder, "seconds", "tokens_per_second"), expected)

    def test_what_a_kill_left_is_removed_by_the_next_save(self):
        for name in ("checkpoint.pt.123.tmp", "other.pt.123.tmp"):
            (self.folder / name).write_bytes(b"half")
        make_trainer(max_iters=1, work_dir=self.folder).run()
        self.assertEqual([path.name for path in self.folder.glob("*.tmp")], ["other.pt.123.tmp"])

    def test_the_best_is_kept(self):
        trainer = make_trainer(max_iters=6, eval_interval=1, val_dataset=Pairs(), work_dir=self.folder, keep_best=True)
        losses = iter([3.0, 2.0, 2.5, 1.5, 1.6, 1.7])
        with mock.patch.object(trainer, "evaluate", lambda *_: next(losses)):
            trainer.run()
        best = torch.load(self.folder / "best.pt", weights_only=True)
        self.assertEqual((best["iter_num"], best["best_loss"]), (4, 1.5))

    def test_float16_scaler_is_restored(self):
        trainer = make_trainer(dtype="float16", work_dir=self.folder, max_iters=3)
        trainer.run()
        trainer.scaler.update(new_scale=1024.0) # not the value that it starts with
        trainer.save_checkpoint(self.folder / "checkpoint.pt")
        self.assertEqual(trainer.scaler.state_dict()["scale"], 1024.0)
        other = make_trainer(dtype="float16", work_dir=self.folder, resume=True)
        self.assertEqual(other.scaler.state_dict(), trainer.scaler.state_dict())

    def test_metrics(self):
        trainer = make_trainer(max_iters=4, eval_interval=2, val_dataset=Pairs(), work_dir=self.folder, log_interval=2)
        trainer.run()
        rows = read_metrics(self.folder)
        self.assertEqual([(row["iteration"], row["split"]) for row in rows], [(1, "train"), (2, "train"), (2, "val"), (4, "train"), (4, "val")])
        self.assertEqual(set(rows[0]), {"iteration", "split", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"})
        self.assertEqual(rows[-1]["loss"], trainer.evaluate(Pairs()))
        trainer = make_trainer(max_iters=1, work_dir=self.folder, log_interval=1)
        trainer.run() # a new run in the same folder starts a new file
        self.assertEqual(len(read_metrics(self.folder)), 1)

    def test_torn_foreign_and_undecodable_rows_are_removed(self):
        make_trainer(max_iters=2, work_dir=self.folder, log_interval=1).run()
        with open(self.folder / "metrics.jsonl", "ab") as file:
            file.write(b'\xff\xfe\n[1]\n3\n{"iteration": "x"}\n{"split": 1}\nhello\n' + b"[" * 100_000 + b'\n{"iteration": 3, "spl')
        make_trainer(max_iters=3, work_dir=self.folder, log_interval=1, resume=True).run()
        self.assertEqual([row["iteration"] for row in read_metrics(self.folder)], [1, 2, 3])

    def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(self):
        result = run_python(SCRIPT, f"--trainer.work_dir={self.folder}", "--trainer.checkpoint_interval=4", "--fail_at=9",
                            "--trainer.log_interval=10", check=False)
        self.assertNotEqual(result.returncode, 0)
        self.assertRegex(result.stderr, r"the loss is nan.*at step 1[0-2].*lower learning_rate")
        checkpoint = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.assertEqual(checkpoint["iter_num"], 8)
        self.assertTrue(all(tensor.isfinite().all() for tensor in checkpoint["model"].values()))

    @unittest.skipIf(os.name == "nt", "needs resource")
    def test_a_full_disk_leaves_the_last_checkpoint_whole(self):
        make_trainer(max_iters=2, work_dir=self.folder).run()
        before = (self.folder / "checkpoint.pt").read_bytes()
        limit = f"import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.argv = [{str(SCRIPT)!r}, *sys.argv[1:]]; runpy.run_path(sys.argv[0], run_name='__main__')"
        result = run_python("-c", limit, f"--trainer.work_dir={self.folder}", "--trainer.max_iters=3", "--trainer.resume=True",
                            "--dropout=0.0", check=False)
        self.assertEqual(result.returncode, 2)
        self.assertRegex(result.stderr, "^error: .*too large: .*checkpoint.pt")
        self.assertEqual((self.folder / "checkpoint.pt").read_bytes(), before)
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["checkpoint.pt", "metrics.jsonl"])

    def test_a_place_that_cannot_be_written_to_is_an_error(self):
        (self.folder / "file").write_text("in the way")
        with self.assertRaises(OSError):
            make_trainer(max_iters=1, work_dir=self.folder / "file" / "run").run()


@unittest.skipIf(os.name == "nt", "needs POSIX signals")
class Interruptions(Folder):
    def start(self, *args, **options):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
        process = subprocess.Popen([sys.executable, str(SCRIPT), *args], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        self.addCleanup(process.kill) # if the test fails before it has ended
        return process

    def await_line(self, process, start):
        while not (line := process.stdout.readline()).startswith(start):
            self.assertTrue(line, "it ended before")

    def test_sigterm_to_the_whole_group_with_workers_saves(self):
        expected = run_python(SCRIPT, f"--trainer.work_dir={self.folder / 'whole'}").stdout.splitlines()[-1]
        work_dir = self.folder / "stopped"
        process = self.start(f"--trainer.work_dir={work_dir}", "--pause=0.05", "--trainer.num_workers=2", start_new_session=True)
        self.await_line(process, "step       3")
        os.killpg(process.pid, signal.SIGTERM) # as torchrun, SLURM and systemd do
        printed, _ = process.communicate(timeout=60)
        self.assertIn("the checkpoint is saved", printed)
        with self.assertRaises(ProcessLookupError): # nobody is left
            for _ in range(100):
                os.killpg(process.pid, 0)
                time.sleep(0.1)
        last = run_python(SCRIPT, f"--trainer.work_dir={work_dir}", "--trainer.resume=True").stdout.splitlines()[-1]
        self.assertEqual(last, expected)

    def test_workers_end_with_a_killed_parent(self):
        process = self.start(f"--trainer.work_dir={self.folder}", "--pause=0.05", "--trainer.num_workers=2", start_new_session=True)
        self.await_line(process, "step       3")
        process.kill()
        process.communicate(timeout=60)
        with self.assertRaises(ProcessLookupError):
            for _ in range(300):
                os.killpg(process.pid, 0)
                time.sleep(0.1)

    def test_ten_kills_at_random_moments_change_nothing(self):
        settings = ("--trainer.max_iters=130", "--trainer.checkpoint_interval=3", "--trainer.eval_interval=10", "--trainer.log_interval=2",
                    "--trainer.keep_best=True", "--trainer.eval_batches=2")
        expected = run_python(SCRIPT, *settings, f"--trainer.work_dir={self.folder / 'whole'}").stdout.splitlines()[-1]
        rng, kills, broken = random.Random(8), 0, self.folder / "broken"
        for kills in range(10):
            resume = (broken / "checkpoint.pt").exists()
            process = self.start(*settings, f"--trainer.work_dir={broken}", f"--trainer.resume={resume}", "--pause=0.005")
            self.await_line(process, "step")
            for _ in range(rng.randint(1, 6)):
                process.stdout.readline()
            time.sleep(rng.random() * 0.06)
            process.kill()
            process.communicate()
            self.assertEqual(process.returncode, -signal.SIGKILL)
        self.assertGreater(torch.load(broken / "checkpoint.pt", weights_only=True)["iter_num"], 10)
        last = run_python(SCRIPT, *settings, f"--trainer.work_dir={broken}", "--trainer.resume=True").stdout.splitlines()[-1]
        self.assertRegex(expected, "^digest ")
        self.assertEqual(last, expected)
        times = ("seconds", "tokens_per_second")
        self.assertEqual(read_metrics(broken, *times), read_metrics(self.folder / "whole", *times))

    def test_sigterm_and_ctrl_c_finish_the_step_save_and_say_how_to_go_on(self):
        expected = run_python(SCRIPT, f"--trainer.work_dir={self.folder / 'whole'}").stdout.splitlines()[-1]
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            work_dir = self.folder / number.name
            process = self.start(f"--trainer.work_dir={work_dir}", "--pause=0.05")
            self.await_line(process, "step       2")
            process.send_signal(number)
            printed, _ = process.communicate(timeout=60)
            self.assertIn(process.returncode, (code, -number))
            self.assertRegex(printed, r"stopped after step \d+; the checkpoint is saved, --trainer.resume=True continues")
            last = run_python(SCRIPT, f"--trainer.work_dir={work_dir}", "--trainer.resume=True").stdout.splitlines()[-1]
            self.assertEqual(last, expected)


@unittest.skipIf(os.name == "nt", "torchrun needs a torch with libuv")
class Processes(Folder):
    def torchrun(self, count, *args, check=True):
        return run_python("-m", "torch.distributed.run", f"--nproc_per_node={count}", "--standalone", SCRIPT, "--dropout=0.0",
                          *args, check=check, OMP_NUM_THREADS="1")

    def losses(self, name):
        return torch.tensor([row["loss"] for row in read_metrics(self.folder / name)])

    def test_two_processes_equal_one_and_may_take_over_from_it(self):
        evaluation = ("--trainer.eval_interval=15", "--trainer.eval_batches=4")
        run_python(SCRIPT, "--dropout=0.0", f"--trainer.work_dir={self.folder / 'one'}", *evaluation)
        self.torchrun(2, f"--trainer.work_dir={self.folder / 'two'}", "--trainer.grad_accum_steps=2", *evaluation)
        run_python(SCRIPT, "--dropout=0.0", f"--trainer.work_dir={self.folder / 'then'}", "--trainer.max_iters=15", *evaluation)
        printed = self.torchrun(2, f"--trainer.work_dir={self.folder / 'then'}", "--trainer.resume=True", *evaluation).stdout
        self.assertEqual(len(self.losses("one")), 32)
        torch.testing.assert_close(self.losses("two"), self.losses("one"), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(self.losses("then"), self.losses("one"), atol=1e-4, rtol=1e-4)
        self.assertEqual(printed.count("step      30  loss"), 1) # one process speaks

    def test_masked_targets_count_alike_in_one_to_three_processes(self):
        settings = ("--masked=True", "--trainer.batch_size=12", "--trainer.max_iters=12", "--trainer.eval_interval=6")
        run_python(SCRIPT, "--dropout=0.0", f"--trainer.work_dir={self.folder / 'p1'}", *settings, OMP_NUM_THREADS="1")
        self.torchrun(2, f"--trainer.work_dir={self.folder / 'p2'}", "--trainer.grad_accum_steps=3", *settings)
        self.torchrun(3, f"--trainer.work_dir={self.folder / 'p3'}", "--trainer.grad_accum_steps=2", *settings)
        models = [read_checkpoint(self.folder / name / "checkpoint.pt")["model"] for name in ("p1", "p2", "p3")]
        self.assertEqual(len(self.losses("p1")), 14) # of training, and of two evaluations
        for name, model in zip(("p2", "p3"), models[1:]):
            torch.testing.assert_close(self.losses(name), self.losses("p1"), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(model, models[0], atol=1e-4, rtol=1e-4)

    @unittest.skipUnless(os.path.isdir("/proc/self/task"), "counts threads as Linux shows them")
    def test_no_thread_of_the_processes_outlives_python(self): # one that does may abort the process
        for args in ([], [f"--trainer.work_dir={self.folder}", "--trainer.eval_interval=1"]):
            result = self.torchrun(2, "--threads=True", "--trainer.max_iters=2", *args)
            self.assertEqual(result.stdout.count("threads of gloo at the end: 0\n"), 2, result.stdout)

    def test_ctrl_c_stops_all_after_the_same_step(self):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        args = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT), f"--trainer.work_dir={self.folder}"]
        process = subprocess.Popen([*args, "--pause=0.05", "--trainer.max_iters=200"], env=environment, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, start_new_session=True)
        while "step       3" not in process.stdout.readline():
            self.assertIsNone(process.poll())
        os.killpg(process.pid, signal.SIGINT) # what a terminal does
        printed, _ = process.communicate(timeout=60)
        self.assertIn("--trainer.resume=True continues", printed)
        stopped = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.assertEqual((len(stopped["random_states"]), stopped["iter_num"]), (2, read_metrics(self.folder)[-1]["iteration"]))
        self.torchrun(2, f"--trainer.work_dir={self.folder}", "--trainer.resume=True", f"--trainer.max_iters={stopped['iter_num'] + 2}")
        self.assertEqual(len(read_metrics(self.folder)), stopped["iter_num"] + 2)

    def test_a_batch_that_does_not_divide_is_an_error_at_once(self):
        result = self.torchrun(2, "--trainer.batch_size=7", check=False)
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("batch_size=7, expected a multiple of 2: 2 process", result.stderr)
        self.assertNotIn("loss", result.stdout)


if __name__ == "__main__":
    unittest.main()
