"""
A run that is looked after: validation, metrics, checkpoints, resume, signals, kills, processes.

    python -m unittest tests.test_run
"""

import concurrent.futures
import contextlib
import functools
import json
import math
import os
import random
import re
import signal
import sys
import time
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset

import train_script
from common import Folder, Script, WorkingFolder, run_forked, run_python, tiny_config
from mingpt import checkpoint, processes
from mingpt.checkpoint import read_checkpoint
from mingpt.model import GPT
from mingpt.run import Run
from mingpt.utils import CfgNode, set_seed
from test_trainer import (
    LINE, Bigrams, Regression, at_step, make_trainer, no_dropout, record, weights)
from train_script import Masked, Pairs

TIMES = ("seconds", "tokens_per_second")


def make_run(model=None, train_dataset=None, val_dataset=None, work_dir="", **settings) -> Run:
    kind = functools.partial(Run, val_dataset=val_dataset, work_dir=work_dir)
    settings = dict(log_interval=0, eval_batches=1) | settings
    return make_trainer(model, train_dataset, kind, **settings)


def with_dropout() -> GPT:
    set_seed(1)
    return GPT(tiny_config(vocab_size=5))


def untied_by_hand() -> GPT:
    model = no_dropout(tie_weights=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def read_metrics(folder, *left_out) -> list[dict]:
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def train(*args, count=1) -> str:
    """Runs train_script; returns its last line, a digest of weights and random numbers."""
    return run_forked(train_script.main, *args, count=count).splitlines()[-1]


class Evaluate(unittest.TestCase):
    def test_is_the_mean_over_the_targets_that_count_without_dropout(self):
        for dataset in (Pairs(), Masked()):
            # The number of examples is no multiple of the batch size.
            x, y = (torch.stack(part) for part in zip(*(dataset[i] for i in range(1000))))
            for steps in (1, 4):
                run = make_run(with_dropout().double(), batch_size=32, grad_accum_steps=steps)
                loss = run.evaluate(dataset)
                self.assertTrue(run.model.training)
                self.assertAlmostEqual(loss, run.model.eval()(x, y)[1].item(), places=9)

    def test_batches_are_spread_evenly(self):
        dataset = Pairs()
        make_run().evaluate(dataset, max_batches=14)
        # They are 112 of 1000.
        self.assertEqual(dataset.drawn, list(range(0, 1000, 9)))


class Reports(WorkingFolder):
    def test_lines_for_people_and_rows_for_a_plot(self):
        run = make_run(max_iters=4, eval_interval=2, val_dataset=Pairs(), work_dir=self.folder,
                       log_interval=2)
        at_step(run, 0, lambda run: run.write_metrics(
            mine=math.inf, tensor=torch.tensor(2), number=np.float32(0.5)))
        with self.assertLogs("mingpt", "INFO") as logged:
            run.run()
        lines = [line.split(":", 2)[2] for line in logged.output]
        self.assertRegex(lines[0], r"^step +1  loss \d\.\d{4}  lr 1\.0e-02 +[\d.]+ ms +[\d,]+ tok/s"
                                   r"  \d+:\d\d left$")
        self.assertRegex(lines[-1], r"^step +4  validation loss \d\.\d{4}$")
        self.assertLessEqual(max(map(len, lines)), 80)

        mine, *rows = read_metrics(self.folder)
        # JSON has no infinite numbers.
        self.assertEqual(mine, dict(iteration=1, mine=None, tensor=2, number=0.5))
        self.assertEqual([(row["iteration"], row["split"]) for row in rows],
                         [(1, "train"), (2, "train"), (2, "val"), (4, "train"), (4, "val")])
        self.assertEqual(set(rows[0]), {"iteration", "split", "loss", "lr", "grad_norm",
                                        "tokens_per_second", "seconds"})
        self.assertEqual(rows[-1]["loss"], run.evaluate(Pairs(), 1))

    def test_a_step_is_reported_then_validated_then_saved(self):
        run = make_run(max_iters=1, log_interval=1, eval_interval=1, val_dataset=Pairs(),
                       work_dir=self.folder)
        seen = []

        def look(run):
            splits = [row["split"] for row in read_metrics(self.folder)]
            seen.append((splits, (self.folder / "checkpoint.pt").exists()))

        # minGPT's set_callback replaces callbacks, not the order of these.
        run.set_callback("on_batch_end", lambda run: run.write_metrics(split="mine"))
        run.set_callback("on_eval_end", look)
        run.set_callback("on_train_end", look)
        run.run()
        splits = ["mine", "train", "val"]
        self.assertEqual(seen, [(splits, False), (splits, True)])

    def test_without_a_folder_nothing_is_written(self):
        run = make_run(max_iters=2, log_interval=1, eval_interval=1, val_dataset=Pairs(),
                       checkpoint_interval=1)
        at_step(run, 0, Run.write_metrics)
        run.run()
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_any_clock_and_any_end(self):
        now = time.perf_counter
        for clock in (now, lambda: 5.0, lambda: math.floor(now() * 64) / 64):
            for max_iters in (3, sys.maxsize, math.inf, None):
                run = make_run(max_iters=max_iters, log_interval=1)
                at_step(run, 1, Run.stop)
                # The clock of the day may be set back.
                with mock.patch("time.perf_counter", clock), mock.patch("time.time", lambda: 0.0):
                    with self.assertLogs("mingpt", "INFO") as logged:
                        run.run()
                self.assertEqual((run.iter_num, len(logged.output)), (2, 2))

    def test_a_run_that_is_shortened_has_no_time_left(self):
        def shorten(run):
            run.config.max_iters = 0
            run.elapsed = 60.0

        run = make_run(max_iters=9, log_interval=9)
        at_step(run, 3, shorten)
        with self.assertLogs("mingpt", "INFO") as logged:
            run.run()
        self.assertRegex(logged.output[-1], "step +4 .* 0:00 left$")

    def test_the_wait_for_a_gpu_belongs_to_the_step_that_waits(self):
        times = [0.0]
        # A torch that is built for GPUs asks it, too.
        gpu = mock.Mock(**{"is_available.return_value": False})
        gpu.get_rng_state.return_value = torch.zeros(1)
        gpu.synchronize.side_effect = lambda: times.append(times[-1] + 5.0)
        run = make_run(max_iters=2, log_interval=1, work_dir=self.folder)
        run.device_type = "xpu"
        with (mock.patch("time.perf_counter", lambda: times[-1]),
              mock.patch("torch.get_device_module", return_value=gpu)):
            run.run()
        self.assertEqual([row["seconds"] for row in read_metrics(self.folder)], [5.0, 10.0])

    def test_a_wrong_setting_is_named(self):
        for settings in (dict(log_interval=-1), dict(checkpoint_interval=0.5), dict(eval_batches=0),
                         dict(eval_batches=2.0), dict(resume="perhaps"), dict(resume=1)):
            name = next(iter(settings))
            with self.subTest(**settings), self.assertRaisesRegex(ValueError, f"got {name}="):
                make_run(work_dir=self.folder, **settings)
        for settings in (dict(resume=True), dict(keep_best=True)):
            with self.assertRaisesRegex(ValueError, "expected work_dir"):
                make_run(**settings)
        # Not after hours, at the first validation.
        with self.assertRaisesRegex(ValueError, "a list that is empty"):
            make_run(val_dataset=[])
        with self.assertRaisesRegex(ValueError, "expected it as an argument"):
            Run(CfgNode(work_dir="x"), no_dropout(), Pairs())
        with mock.patch.dict(os.environ, RANK="1"):
            with self.assertRaisesRegex(ValueError, "RANK without WORLD_SIZE"):
                make_run()


class Stops(Folder):
    """Ends runs in all ways: the last good step is saved."""

    def test_a_model_is_validated_before_the_first_step(self):
        run = make_run(work_dir=self.folder / "new", val_dataset=Pairs(), keep_best=True)
        run.validate()
        saved = read_checkpoint(run.work_dir / "best.pt")
        self.assertEqual((saved["iter_num"], saved["seed"]), (0, 5))
        self.assertEqual(read_metrics(self.folder / "new"),
                         [{"iteration": 0, "split": "val", "loss": run.val_loss}])

    def test_stopped_or_shortened_in_a_callback(self):
        def shorten(run):
            run.config.max_iters = 3

        def jump(run):
            run.iter_num = 999

        for callback in (Run.stop, shorten, jump):
            run = make_run(max_iters=50, work_dir=self.folder, log_interval=100)
            at_step(run, 2, callback)
            ended = []
            run.add_callback("on_train_end", ended.append)
            run.run()
            self.assertEqual(read_checkpoint(self.folder / "checkpoint.pt")["iter_num"], 3)
            self.assertEqual([row["iteration"] for row in read_metrics(self.folder)], [1, 3])
            self.assertEqual(ended, [run])

    def test_a_loss_that_is_not_finite_is_refused(self):
        run = make_run(max_iters=20, work_dir=self.folder, checkpoint_interval=4)
        at_step(run, 8, lambda run: run.model.lm_head.weight.data.fill_(math.nan))
        with self.assertRaisesRegex(ValueError, "the loss is nan.*after step 12"):
            run.run()
        saved = read_checkpoint(self.folder / "checkpoint.pt")
        self.assertEqual(saved["iter_num"], 8)
        self.assertTrue(all(tensor.isfinite().all() for tensor in saved["model"].values()))

    def test_ctrl_c_in_the_last_step_or_later_is_not_lost(self):
        for event in ("on_batch_end", "on_eval_end", "on_train_end"):
            run = make_run(max_iters=1, work_dir=self.folder, val_dataset=Pairs(), eval_interval=1)
            run.add_callback(event, lambda run: signal.raise_signal(signal.SIGINT))
            with self.subTest(event), self.assertRaises(KeyboardInterrupt):
                run.run()
            self.assertTrue((self.folder / "checkpoint.pt").exists())

    def test_a_signal_that_nohup_ignores_stays_ignored(self):
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGTERM, before)
        with processes.Signals():
            self.assertIs(signal.getsignal(signal.SIGTERM), signal.SIG_IGN)

    def test_a_handler_in_c_is_left_alone(self):
        # Python runs in another program and cannot put that handler back.
        with (mock.patch("signal.getsignal", return_value=None),
              mock.patch("signal.signal") as install, processes.Signals()):
            install.assert_not_called()

    def test_another_thread_gets_no_signals(self):
        run = make_run()
        with concurrent.futures.ThreadPoolExecutor() as threads:
            threads.submit(run.run).result()
        self.assertEqual(run.iter_num, 4)

    def test_interrupted_in_a_notebook_it_goes_on(self):
        expected = make_run(with_dropout(), max_iters=6)
        expected.run()
        run = make_run(with_dropout(), max_iters=6, work_dir=self.folder, log_interval=1)
        at_step(run, 2, lambda run: signal.raise_signal(signal.SIGINT))
        with self.assertRaises(KeyboardInterrupt):
            run.run()
        self.assertEqual(read_checkpoint(self.folder / "checkpoint.pt")["iter_num"], 3)
        run.run()
        self.assertTrue(torch.equal(weights(run.model), weights(expected.model)))
        self.assertEqual([row["iteration"] for row in read_metrics(self.folder)], list(range(1, 7)))
        self.assertIs(signal.getsignal(signal.SIGINT), signal.default_int_handler)


class Resume(Folder):
    def test_is_exact(self):
        for make, settings in (
            (with_dropout, dict()), (with_dropout, dict(optimizer="muon")),
            (with_dropout, dict(replacement=False)), (with_dropout, dict(dtype="float16")),
            (untied_by_hand, dict()),
        ):
            def run(**more):
                run = make_run(make(), warmup_iters=5, schedule="cosine", lr_decay_iters=12,
                               **settings, **more)
                # Callbacks at the start may draw, too.
                run.add_callback("on_train_start", lambda run: torch.rand(3))
                draws = record(run, lambda run: (
                    random.random(), np.random.rand(), torch.rand(()).item()))
                run.run()
                return weights(run.model), draws

            with self.subTest(make.__name__, **settings):
                expected, draws = run(max_iters=12)
                run(max_iters=7, work_dir=self.folder)
                resumed, rest = run(max_iters=12, work_dir=self.folder, resume=True)
                self.assertTrue(torch.equal(resumed, expected))
                self.assertEqual(rest, draws[7:])

    def test_goes_on_from_a_checkpoint_of_a_callback(self):
        run = make_run(max_iters=6)
        path = self.folder / "sub" / "mine.pt"
        at_step(run, 2, lambda run: run.save_checkpoint(path))
        run.run()
        # The step that the callback follows is done.
        self.assertEqual(read_checkpoint(path)["iter_num"], 3)
        other = make_run(max_iters=6)
        other.load_checkpoint(path)
        other.run()
        self.assertTrue(torch.equal(weights(other.model), weights(run.model)))

    def test_keeps_the_seed_the_scale_and_the_best(self):
        def resume(losses, **settings):
            run = make_run(seed=None, dtype="float16", eval_interval=1, val_dataset=Pairs(),
                           work_dir=self.folder, keep_best=True, **settings)
            losses = iter(losses)
            with mock.patch.object(run, "evaluate", lambda *args: next(losses)):
                run.run()
            return run

        run = resume([3.0, 2.0, 2.5, 1.5, 1.6, 1.7], max_iters=6)
        best = read_checkpoint(self.folder / "best.pt")
        self.assertEqual((best["iter_num"], best["best_loss"]), (4, 1.5))
        self.assertEqual((run.val_loss, run.best_loss), (1.7, 1.5))
        # It does not begin with this scale.
        run.scaler.update(new_scale=1024.0)
        run.save_checkpoint(self.folder / "checkpoint.pt")

        resumed = resume([1.55], max_iters=7, resume=True)
        self.assertEqual(read_checkpoint(self.folder / "best.pt")["iter_num"], 4)
        self.assertEqual((resumed.seed, resumed.scaler.get_scale()), (run.seed, 1024.0))
        self.assertGreater(resumed.elapsed, run.elapsed)

    def test_auto_begins_goes_on_and_ends(self):
        for done, expected in ((3, [0, 1, 2]), (5, [3, 4]), (5, [])):
            run = make_run(max_iters=done, work_dir=self.folder, resume="auto")
            steps = record(run, lambda run: run.iter_num)
            run.run()
            self.assertEqual((steps, run.iter_num), (expected, done))

    def test_new_settings_apply_and_are_named(self):
        make_run(max_iters=2, work_dir=self.folder).run()
        with self.assertLogs("mingpt", "INFO") as logged:
            run = make_run(max_iters=4, work_dir=self.folder, resume=True, weight_decay=0.3,
                           betas=(0.8, 0.9), seed=9, learning_rate=0.5, dtype="float16")
        self.assertEqual(run.seed, 9)
        changes = {line.split(":", 2)[2] for line in logged.output if " was " in line}
        self.assertEqual(changes, {
            "max_iters was 2, is 4", "weight_decay was 0.1, is 0.3", "seed was 5, is 9",
            "betas was [0.9, 0.95], is [0.8, 0.9]", "learning_rate was 0.01, is 0.5",
            "dtype was auto, is float16"})
        run.run()
        groups = [(group["lr"], group["weight_decay"], group["betas"])
                  for group in run.optimizer.param_groups]
        self.assertEqual(groups, [(0.5, 0.3, (0.8, 0.9)), (0.5, 0.0, (0.8, 0.9))])

    def test_a_rate_ends_with_its_schedule(self):
        for schedule in (dict(schedule="cosine"), dict(warmup_iters=9)):
            make_run(max_iters=3, work_dir=self.folder, **schedule).run()
            run = make_run(work_dir=self.folder, resume=True)
            run.run()
            self.assertEqual([group["lr"] for group in run.optimizer.param_groups], [1e-2, 1e-2])

    def test_settings_that_a_scheduler_added_to_its_groups_come_back(self):
        run = make_run(max_iters=2, work_dir=self.folder)
        run.add_callback("on_train_start", lambda run: OneCycleLR(run.optimizer, 0.1, 9))
        run.run()
        run = make_run(max_iters=4, work_dir=self.folder, resume=True)
        run.run()
        self.assertEqual([group["max_lr"] for group in run.optimizer.param_groups], [0.1, 0.1])

    def test_a_layer_that_was_frozen_may_learn(self):
        for optimizer in ("adamw", "muon"):
            settings = dict(optimizer=optimizer, work_dir=self.folder)
            model = no_dropout()
            model.transformer.h[0].requires_grad_(False)
            make_run(model, max_iters=1, **settings).run()
            before = weights(model.transformer.h[0])
            run = make_run(max_iters=2, resume=True, seed=6.0, **settings)
            run.run()
            self.assertFalse(torch.equal(weights(run.model.transformer.h[0]), before))

    def test_a_process_that_is_new_draws_its_own_numbers(self):
        make_run(max_iters=1, work_dir=self.folder).run()
        run = make_run(max_iters=2, work_dir=self.folder, resume=True)
        run.rank = 2
        run.load_checkpoint(self.folder / "checkpoint.pt")
        run.begin()
        self.assertEqual(torch.initial_seed(), run.seed + 2)

    def test_a_refused_one_changes_nothing(self):
        make_run(max_iters=3, work_dir=self.folder, log_interval=1).run()
        saved = self.folder / "checkpoint.pt"
        foreign = self.folder / "foreign.pt"
        torch.save({"iter_num": 3, "model": read_checkpoint(saved)["model"]}, foreign)
        files = contents(self.folder)

        smaller = no_dropout(n_embd=8)
        for run, path, message in (
            (make_run(optimizer="muon"), saved, "another optimizer"),
            (make_run(smaller), saved, r"lm_head.weight is \(5, 16\) in the file and .*8"),
            (make_run(Regression(), LINE), saved, "another model"),
            (make_run(), foreign, "foreign.pt is no checkpoint"),
            (make_run(), self.folder / "none.pt", "no checkpoint at .*none"),
        ):
            before = weights(run.model)
            state = torch.get_rng_state()
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                run.load_checkpoint(path)
            self.assertTrue(torch.equal(weights(run.model), before))
            self.assertTrue(torch.equal(torch.get_rng_state(), state))
        with self.assertRaisesRegex(ValueError, "has 3 steps already and max_iters=3"):
            make_run(max_iters=3, work_dir=self.folder, resume=True)
        self.assertEqual(contents(self.folder), files)

    def test_a_fresh_run_sets_the_old_one_aside_once_it_starts(self):
        make_run(max_iters=3, work_dir=self.folder, log_interval=1).run()
        files = contents(self.folder)

        model = no_dropout()
        odd = torch.optim.SGD([dict(params=model.parameters(), lr=0.1, note=object())])
        for made, message in ((ValueError("no optimizer"), "no optimizer"),
                              ([odd], r"got a object as .*\['note'\]")):
            model.configure_optimizers = mock.Mock(side_effect=made)
            with self.assertRaisesRegex(ValueError, message):
                make_run(model, work_dir=self.folder).run()
            self.assertEqual(contents(self.folder), files)

        run = make_run(work_dir=self.folder)
        run.add_callback("on_batch_end", lambda run: 1 / 0)
        with self.assertRaises(ZeroDivisionError):
            run.run()
        self.assertEqual(contents(self.folder),
                         {f"{name}.old": content for name, content in files.items()})

    def test_rows_are_not_doubled_after_a_crash(self):
        def prepare(**settings) -> Run:
            run = make_run(max_iters=6, work_dir=self.folder, log_interval=1, eval_interval=2,
                           checkpoint_interval=2, val_dataset=Pairs(), **settings)
            run.add_callback("on_batch_end", lambda run: run.write_metrics(split="mine"))
            return run

        prepare().run()
        expected = read_metrics(self.folder, *TIMES)
        run = prepare()
        at_step(run, 4, lambda run: 1 / 0)
        with self.assertRaises(ZeroDivisionError):
            run.run()
        # A disk was full for a moment, and the kill came within a row.
        with open(self.folder / "metrics.jsonl", "ab") as file:
            file.write(b'{"iteration": 3, "sp{"iteration": 3}\n{"iteration": 3, "spl')
        prepare(resume=True).run()
        self.assertEqual(read_metrics(self.folder, *TIMES), expected)


class Checkpoints(Folder):
    def test_the_model_can_be_built_from_it(self):
        for trained in (no_dropout(), torch.compile(no_dropout(), backend="eager")):
            make_run(trained, max_iters=1, work_dir=self.folder).run()
            saved = read_checkpoint(self.folder / "checkpoint.pt")
            model = GPT(CfgNode(**saved["model_config"]))
            model.load_state_dict(saved["model"])
            self.assertTrue(torch.equal(weights(model), weights(trained)))
            compiled = torch.compile(no_dropout(), backend="eager")
            make_run(compiled, work_dir=self.folder, resume=True)
            self.assertTrue(torch.equal(weights(compiled), weights(trained)))

    def test_settings_may_be_any_objects(self):
        make_run(max_iters=np.int64(1), learning_rate=np.float64(1e-3),
                 betas=(np.float64(0.9), 0.95), hook=print, table={(1, 2): object()},
                 path=Path("x"), part=CfgNode(c=2), work_dir=self.folder).run()
        saved = read_checkpoint(self.folder / "checkpoint.pt")["config"]
        self.assertEqual([saved[name] for name in ("max_iters", "learning_rate", "path", "part")],
                         [1, 1e-3, "x", {"c": 2}])
        # A module of the user's may call anything its config.
        for config in (None, "gpt2", {"a": 1}):
            self.assertEqual(checkpoint.plain_settings(config), config)

        class Settings:
            max_iters = 2

        self.assertEqual(checkpoint.plain_settings(Settings)["max_iters"], 2)

    def test_an_optimizer_whose_state_would_be_lost_is_refused(self):
        class Around:
            def __init__(self, optimizer):
                self.step = optimizer.step
                self.param_groups = optimizer.param_groups
                self.state_dict = optimizer.state_dict

        class Mine(GPT):
            def configure_optimizers(self, train_config):
                return Around(super().configure_optimizers(train_config))

        make_run(Mine(tiny_config(vocab_size=5)), log_interval=1).run()
        with self.assertRaisesRegex(ValueError, "got a Around as the optimizer"):
            make_run(Mine(tiny_config(vocab_size=5)), work_dir=self.folder).run()
        self.assertEqual(contents(self.folder), {})

    def test_damaged_files_are_refused_or_as_good_as_whole(self):
        make_run(max_iters=2, work_dir=self.folder).run()
        path = self.folder / "checkpoint.pt"
        whole = path.read_bytes()
        good = read_checkpoint(path)["model"]
        rng = random.Random(3)
        for _ in range(100):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with contextlib.suppress(ValueError):
                loaded = read_checkpoint(path)["model"]
                self.assertTrue(all(torch.equal(loaded[name], good[name]) for name in good))
        torch.save(Regression(), path)
        for content in (b"", whole[:1000], b"<html>", path.read_bytes()):
            path.write_bytes(content)
            with self.assertRaisesRegex(ValueError, "damaged or no checkpoint") as caught:
                read_checkpoint(path)
            # torch would tell how to run the code in a file.
            self.assertNotIn("weights_only", str(caught.exception))

    def test_the_random_state_of_a_gpu(self):
        device = mock.Mock()
        device.get_rng_state.return_value = torch.tensor([1, 2])
        with mock.patch("torch.get_device_module", return_value=device) as get:
            state = checkpoint.random_state("mps")
            checkpoint.set_random_state(state, "mps")
            # Where the device is another one now, its generator stays as it is.
            checkpoint.set_random_state(state, "cuda")
        get.assert_called_with("mps")
        device.set_rng_state.assert_called_once_with(state["mps"])

    @unittest.skipIf(os.name == "nt", "needs resource")
    def test_a_full_disk_leaves_the_last_one_whole(self):
        train(f"--work_dir={self.folder}", "--trainer.max_iters=2")
        before = contents(self.folder)["checkpoint.pt"]
        printed = run_forked(with_small_files, f"--work_dir={self.folder}", "--trainer.max_iters=3",
                             "--trainer.resume=True", check=False)
        self.assertRegex(printed, "error: .*too large: .*checkpoint.pt")
        files = contents(self.folder)
        self.assertEqual(files["checkpoint.pt"], before)
        self.assertEqual(sorted(files), ["checkpoint.pt", "metrics.jsonl"])


def with_small_files(args: list[str]) -> None:
    """Runs train_script where no file may be larger than 20 kB."""
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    train_script.main(args)


@unittest.skipIf(os.name == "nt", "needs POSIX signals")
class Signals(Folder):
    def test_a_signal_to_one_process_finishes_the_step_saves_and_the_resume_is_exact(self):
        expected = {1: train(), 2: train(count=2)}
        for count, number, code in (
            (1, signal.SIGTERM, 143), (1, signal.SIGINT, 130), (1, signal.SIGHUP, 129),
            (2, signal.SIGTERM, 143), (2, signal.SIGINT, 130),
        ):
            workers = 1 if count == 1 else 0
            args = (f"--work_dir={self.folder}/{count}{number.name}",
                    f"--trainer.num_workers={workers}")
            # Its 30 steps last long enough for the signal on any machine.
            with Script(train_script.main, *args, "--pause=0.3", count=count) as script:
                group = script.children[-1].pid
                script.wait_for("step      2")
                # torchrun, SLURM and systemd send it to the whole group, with
                # the workers.
                os.killpg(group, number)
                codes = script.wait()
                self.assertEqual(codes[-1], code)
                self.assertNotIn(0, codes)
                self.assertRegex(script.printed(), r"stopped after step \d+; saved, "
                                                   r"--trainer.resume=True continues")
                # Data workers end with their parent.
                with self.assertRaises(ProcessLookupError):
                    for _ in range(300):
                        os.killpg(group, 0)
                        time.sleep(0.05)
            resumed = train(*args, "--trainer.resume=True", count=count)
            self.assertEqual(resumed, expected[count])

    def test_a_second_signal_ends_it_at_once(self):
        with Script(train_script.main, f"--work_dir={self.folder}", "--pause=3600") as script:
            # Its first callback takes an hour, so only a signal ends it.
            script.wait_for("running on device")
            time.sleep(0.5)
            # A busy machine may deliver two signals as one, so more follow.
            for _ in range(30):
                if script.children[0].is_alive():
                    script.send(signal.SIGINT)
                    time.sleep(1.2)
            self.assertEqual(script.wait(), [130])

    def test_ten_kills_change_nothing(self):
        settings = ("--trainer.max_iters=60", "--trainer.checkpoint_interval=3",
                    "--trainer.eval_interval=8", "--trainer.log_interval=2",
                    "--trainer.keep_best=True", "--trainer.eval_batches=2")
        whole = self.folder / "whole"
        broken = self.folder / "broken"
        expected = train(*settings, f"--work_dir={whole}")
        rng = random.Random(8)
        for _ in range(10):
            # A step makes 5,000 calls, a save 60,000. So most kills fall into a
            # save, and the run comes on between them.
            calls = rng.randrange(80_000, 140_000)
            with Script(train_script.main, *settings, f"--work_dir={broken}",
                        "--trainer.resume=auto", f"--die_after={calls}") as script:
                self.assertEqual(script.wait(), [-signal.SIGKILL])
        self.assertGreater(read_checkpoint(broken / "checkpoint.pt")["iter_num"], 5)
        resumed = train(*settings, f"--work_dir={broken}", "--trainer.resume=True")
        self.assertEqual(resumed, expected)
        self.assertEqual(read_metrics(broken, *TIMES), read_metrics(whole, *TIMES))


@unittest.skipIf(os.name == "nt", "torchrun needs a torch with libuv")
class Processes(Folder):
    """Holds two or three processes against one."""

    def run_in(self, count, name, *args) -> str:
        return run_forked(train_script.main, "--dropout=0.0", f"--work_dir={self.folder / name}",
                          *args, count=count)

    def losses(self, name):
        return torch.tensor([row["loss"] for row in read_metrics(self.folder / name)])

    def assert_equal_runs(self, name, other):
        """Compares up to rounding: float32 adds up in another order, in 30 steps."""
        torch.testing.assert_close(self.losses(name), self.losses(other), atol=1e-4, rtol=1e-4)
        models = [read_checkpoint(self.folder / folder / "checkpoint.pt")["model"]
                  for folder in (name, other)]
        torch.testing.assert_close(*models, atol=1e-3, rtol=1e-3)

    def test_they_equal_one_and_may_take_over_from_it(self):
        evaluation = ("--trainer.eval_interval=15", "--trainer.eval_batches=4")
        self.run_in(1, "one", *evaluation)
        self.run_in(2, "two", "--trainer.grad_accum_steps=2", *evaluation)
        self.run_in(1, "then", "--trainer.max_iters=15", *evaluation)
        printed = self.run_in(2, "then", "--trainer.resume=True", *evaluation)
        self.assertEqual(len(self.losses("one")), 32)
        self.assert_equal_runs("two", "one")
        self.assert_equal_runs("then", "one")
        # One process speaks.
        self.assertEqual(printed.count("step     30  loss"), 1)

    def test_targets_that_do_not_count_and_muon(self):
        settings = ("--masked=True", "--trainer.batch_size=12", "--trainer.max_iters=6",
                    "--trainer.eval_interval=6", "--trainer.grad_accum_steps=2")
        for optimizer, counts in (("adamw", (1, 2, 3)), ("muon", (1, 2))):
            for count in counts:
                self.run_in(count, f"{optimizer}{count}", f"--trainer.optimizer={optimizer}",
                            *settings)
                self.assert_equal_runs(f"{optimizer}{count}", f"{optimizer}1")

    def test_a_process_without_a_target_takes_part_and_adds_no_loss(self):
        run_forked(train_on_one_row_in_four, self.folder, count=2)
        self.assertEqual(len(self.losses("")), 6)

    def test_they_agree_on_a_seed_and_on_the_end(self):
        printed = run_forked(stop_in_last, self.folder, count=3)
        ends = re.findall(r"seed \d+, ended after 3", printed)
        self.assertEqual((len(ends), len(set(ends))), (3, 1))
        self.assertEqual(read_checkpoint(self.folder / "checkpoint.pt")["iter_num"], 3)

    def test_torchrun_itself_and_no_thread_outlives_python(self):
        result = run_python(
            "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
            train_script.__file__, "--dropout=0.0", f"--work_dir={self.folder / 'torchrun'}",
            "--trainer.max_iters=3", "--trainer.eval_interval=1", "--threads=True")
        if os.path.isdir("/proc/self/task"):
            # A thread that does may abort the process.
            self.assertEqual(result.stdout.count("threads of gloo at the end: 0\n"), 2)
        self.run_in(1, "one", "--trainer.max_iters=3", "--trainer.eval_interval=1")
        self.assert_equal_runs("torchrun", "one")


def train_on_one_row_in_four(args: list[str]) -> None:
    """Trains a module whose loss is NaN without targets; a process gets one row in a step."""
    x = torch.zeros(4, 8, dtype=torch.long)
    y = torch.tensor([[2], [-1], [-1], [-1]]).expand(4, 8)
    make_run(Bigrams(), TensorDataset(x, y), batch_size=2, max_iters=6, log_interval=1,
             work_dir=args[0]).run()


def stop_in_last(args: list[str]) -> None:
    """Trains in three processes without a seed; the last one stops the run."""
    run = make_run(seed=None, max_iters=50, batch_size=6, work_dir=args[0])
    torch.manual_seed(run.rank)
    if run.rank == 2:
        at_step(run, 2, Run.stop)
    run.run()
    print(f"seed {run.seed}, ended after {run.iter_num}\n", end="")
