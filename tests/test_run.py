"""
A run that is looked after: validation, metrics, checkpoints, resume, signals, kills, processes.

    python -m unittest tests.test_run
"""

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

import train_script
from common import Folder, Script, run_forked, run_python, tiny_config
from mingpt.checkpoint import read_checkpoint
from mingpt.model import GPT
from mingpt.run import Run
from mingpt.utils import CfgNode, set_seed
from test_trainer import Line, Nothing, Regression, no_dropout, weights
from train_script import Masked, Pairs

TIMES = ("seconds", "tokens_per_second")


def make_run(model=None, train_dataset=None, val_dataset=None, work_dir="", **settings) -> Run:
    config = Run.get_default_config()
    usual = dict(device="cpu", batch_size=8, max_iters=10, seed=5, log_interval=0,
                 learning_rate=1e-2)
    config.merge_from_dict(usual | settings)
    if model is None:
        model = no_dropout()
    dataset = Pairs() if train_dataset is None else train_dataset
    return Run(config, model, dataset, val_dataset, work_dir=work_dir)


def read_metrics(folder, *left_out) -> list[dict]:
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def last_line(printed: str) -> str:
    """Returns the digest of the weights that train_script prints at its end."""
    line = printed.splitlines()[-1]
    if not line.startswith("digest "):
        raise AssertionError(printed[-3000:])
    return line


class Evaluate(unittest.TestCase):
    def test_is_the_mean_over_the_targets_that_count(self):
        for dataset in (Pairs(), Masked()):
            # The number of examples is no multiple of the batch size.
            x, y = (torch.stack(part) for part in zip(*(dataset[i] for i in range(1000))))
            for steps in (1, 4):
                run = make_run(no_dropout().double(), batch_size=32, grad_accum_steps=steps)
                expected = run.model.eval()(x, y)[1].item()
                self.assertAlmostEqual(run.evaluate(dataset), expected, places=9)
        self.assertEqual(run.evaluate(Nothing()), 0)

    def test_dropout_is_off_and_the_mode_is_put_back(self):
        set_seed(1)
        run = make_run(GPT(tiny_config(vocab_size=5)))
        run.model.train()
        self.assertEqual(run.evaluate(Pairs(), 2), run.evaluate(Pairs(), 2))
        self.assertTrue(run.model.training)

    def test_max_batches_spread_evenly(self):
        asked = []

        class Watched(Pairs):
            def __getitem__(self, index):
                asked.append(index)
                return super().__getitem__(index)

        make_run().evaluate(Watched(), max_batches=2)
        self.assertEqual((len(asked), asked[0], asked[-1]), (16, 0, 999))
        self.assertLessEqual(max(np.diff(asked)) - min(np.diff(asked)), 1)

    def test_nothing_to_evaluate(self):
        empty = torch.utils.data.TensorDataset(torch.zeros(0, 2), torch.zeros(0, 2))
        with self.assertRaisesRegex(ValueError, "empty"):
            make_run().evaluate(empty)

    def test_draws_nothing_from_the_global_generator(self):
        run = make_run()
        state = torch.get_rng_state()
        run.evaluate(Pairs(), 2)
        self.assertTrue(torch.equal(torch.get_rng_state(), state))


class Reports(Folder):
    def test_log_lines(self):
        run = make_run(max_iters=20, log_interval=10, val_dataset=Pairs(), eval_interval=20,
                       eval_batches=2)
        with self.assertLogs("mingpt", "INFO") as logged:
            run.run()
        lines = [line.split(":", 2)[2] for line in logged.output]
        self.assertEqual(len(lines), 4)
        numbers = (r"step +\d+  loss \d\.\d{4}  lr 1\.0e-02 +[\d.]+ ms +[\d,]+ tok/s"
                   r"  \d+\.\d min left")
        for line in lines[:3]:
            self.assertRegex(line, f"^{numbers}$")
            self.assertLessEqual(len(line), 80)
        self.assertRegex(lines[3], r"^step +20  validation loss \d\.\d{4}$")

    def test_metrics(self):
        run = make_run(max_iters=4, eval_interval=2, val_dataset=Pairs(), work_dir=self.folder,
                       log_interval=2)
        run.run()
        rows = read_metrics(self.folder)
        self.assertEqual([(row["iteration"], row["split"]) for row in rows],
                         [(1, "train"), (2, "train"), (2, "val"), (4, "train"), (4, "val")])
        self.assertEqual(set(rows[0]), {"iteration", "split", "loss", "lr", "grad_norm",
                                        "tokens_per_second", "seconds"})
        self.assertEqual(rows[-1]["loss"], run.evaluate(Pairs()))
        # A new run in the same folder starts a new file, and the old one is set aside.
        make_run(max_iters=1, work_dir=self.folder, log_interval=1).run()
        self.assertEqual(len(read_metrics(self.folder)), 1)
        self.assertTrue((self.folder / "metrics.jsonl.old").exists())

    def test_rows_of_a_callback_have_the_step_that_it_follows(self):
        run = make_run(max_iters=3, work_dir=self.folder)
        run.add_callback("on_batch_end", lambda run: run.write_metrics(mine=run.iter_num))
        run.run()
        self.assertEqual(read_metrics(self.folder),
                         [dict(iteration=n + 1, mine=n) for n in range(3)])

    def test_an_infinite_number_is_no_json(self):
        run = make_run(work_dir=self.folder)
        run.write_metrics(a=math.inf, b=math.nan, c=1.5)
        self.assertEqual(read_metrics(self.folder), [dict(iteration=0, a=None, b=None, c=1.5)])

    def test_order_is_report_validate_save(self):
        calls = []
        run = make_run(max_iters=1, log_interval=1, eval_interval=1, val_dataset=Pairs(),
                       eval_batches=1, work_dir=self.folder)
        for name in ("report", "evaluate", "save_checkpoint"):
            method = getattr(run, name)

            def watch(*args, name=name, method=method):
                calls.append(name)
                return method(*args)

            setattr(run, name, watch)
        # minGPT's set_callback replaces callbacks, not this.
        run.set_callback("on_batch_end", lambda run: calls.append("on_batch_end"))
        run.add_callback("on_eval_end", lambda run: calls.append("on_eval_end"))
        run.run()
        self.assertEqual(calls, ["on_batch_end", "report", "evaluate", "on_eval_end",
                                 "save_checkpoint"])

    def test_without_a_folder_nothing_is_written(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        run = make_run(max_iters=2, log_interval=1, eval_interval=1, val_dataset=Pairs(),
                       eval_batches=1, checkpoint_interval=1)
        run.add_callback("on_batch_end", lambda run: run.write_metrics(a=1))
        run.run()
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_elapsed_counts_without_reports(self):
        run = make_run(max_iters=3, log_interval=0)
        run.run()
        self.assertGreater(run.elapsed, 0)

    def test_a_coarse_clock_or_one_that_stands_still(self):
        now = time.perf_counter
        for clock in (lambda: 5.0, lambda: math.floor(now() * 64) / 64):
            run = make_run(max_iters=3, log_interval=1)
            with mock.patch("time.perf_counter", clock), mock.patch("time.time", clock):
                with self.assertLogs("mingpt", "INFO") as logged:
                    run.run()
            self.assertEqual(len(logged.output), 3)

    def test_a_clock_set_back(self):
        times = iter(range(10**6, 0, -3600))
        run = make_run(max_iters=3, log_interval=1)
        with mock.patch("time.time", lambda: float(next(times))):
            with self.assertLogs("mingpt", "INFO") as logged:
                run.run()
        self.assertNotIn("-", "".join(re.findall(r"ms.*", "\n".join(logged.output))))

    def test_the_wait_for_a_gpu_belongs_to_the_step_that_waits(self):
        now = [0.0]

        class Device:
            """Stands for torch.cuda, which computes on while Python goes ahead."""

            def synchronize(self):
                now[0] += 5.0

            def get_rng_state(self):
                return torch.zeros(1)

        run = make_run(max_iters=2, log_interval=1, work_dir=self.folder)

        def turn_into_gpu(module):
            # The gradient of the first weights is the last thing that a step computes.
            run.device_type = "cuda"

        def turn_back(module, args):
            run.device_type = "cpu"

        run.model.register_forward_pre_hook(turn_back)
        run.model.transformer.wpe.weight.register_post_accumulate_grad_hook(turn_into_gpu)
        with (mock.patch("time.perf_counter", lambda: now[0]),
              mock.patch("torch.get_device_module", return_value=Device())):
            run.run()
        self.assertEqual([row["seconds"] for row in read_metrics(self.folder)], [5.0, 10.0])
        self.assertEqual(run.iter_dt, 5.0)

    def test_a_run_that_never_ends(self):
        for max_iters in (sys.maxsize, math.inf, None):
            run = make_run(max_iters=max_iters, log_interval=1)
            run.add_callback("on_batch_end", lambda run: run.stop() if run.iter_num else None)
            with self.assertLogs("mingpt", "INFO") as logged:
                run.run()
            self.assertIn("tok/s", logged.output[0])


class Stops(Folder):
    """However a run ends, its last step is saved."""

    def test_stop(self):
        run = make_run(max_iters=None, work_dir=self.folder, log_interval=100)
        ended = []
        run.add_callback("on_train_end", ended.append)
        run.add_callback("on_batch_end", lambda run: run.stop() if run.iter_num == 2 else None)
        run.run()
        self.assertEqual(read_checkpoint(self.folder / "checkpoint.pt")["iter_num"], 3)
        self.assertEqual([row["iteration"] for row in read_metrics(self.folder)], [1, 3])
        self.assertEqual(ended, [run])

    def test_max_iters_lowered_in_a_callback(self):
        run = make_run(max_iters=50, work_dir=self.folder, checkpoint_interval=20)

        def lower(run):
            run.config.max_iters = 3

        run.add_callback("on_batch_end", lower)
        run.run()
        self.assertEqual(read_checkpoint(self.folder / "checkpoint.pt")["iter_num"], 3)

    def test_a_loss_that_is_not_finite(self):
        printed = run_forked(train_script.main, f"--work_dir={self.folder}", "--nan_at=9",
                             "--trainer.checkpoint_interval=4", "--trainer.log_interval=10",
                             check=False)
        self.assertRegex(printed, r"error: the loss is nan.*after step 1[0-2]; try a lower")
        checkpoint = read_checkpoint(self.folder / "checkpoint.pt")
        self.assertEqual(checkpoint["iter_num"], 8)
        self.assertTrue(all(tensor.isfinite().all() for tensor in checkpoint["model"].values()))

    def test_interrupted_in_a_notebook(self):
        def train(interrupted, name):
            run = make_run(GPT(tiny_config(vocab_size=5)), work_dir=self.folder / name, max_iters=6,
                           log_interval=1)

            def interrupt(run):
                if interrupted and run.iter_num == 2:
                    run.callbacks.clear()
                    os.kill(os.getpid(), signal.SIGINT)
                    # Windows delivers it a moment later.
                    time.sleep(0.01)

            run.add_callback("on_batch_end", interrupt)
            set_seed(3)
            if interrupted:
                with self.assertRaises(KeyboardInterrupt):
                    run.run()
                self.assertEqual(read_checkpoint(run.work_dir / "checkpoint.pt")["iter_num"], 3)
            run.run()
            return weights(run.model), read_metrics(run.work_dir, *TIMES)

        set_seed(1)
        expected = train(False, "whole")
        set_seed(1)
        result = train(True, "parts")
        self.assertTrue(torch.equal(result[0], expected[0]))
        self.assertEqual(result[1], expected[1])
        self.assertIs(signal.getsignal(signal.SIGINT), signal.default_int_handler)


class Checkpoints(Folder):
    def test_resume_is_exact(self):
        for settings in (dict(), dict(optimizer="muon"), dict(replacement=False),
                         dict(dtype="float16")):
            def run(work_dir="", **more):
                set_seed(1)
                run = make_run(GPT(tiny_config(vocab_size=5)), warmup_iters=5, schedule="cosine",
                               lr_decay_iters=12, work_dir=work_dir, **settings, **more)
                draws = []
                run.add_callback("on_batch_end", lambda run: draws.append(
                    (random.random(), np.random.rand(), torch.rand(()).item())))
                run.run()
                return weights(run.model), draws

            with self.subTest(**settings):
                folder = self.folder / str(settings.values())
                expected, draws = run(max_iters=12)
                run(max_iters=7, work_dir=folder)
                resumed, rest = run(max_iters=12, work_dir=folder, resume=True)
                self.assertTrue(torch.equal(resumed, expected))
                self.assertEqual(rest, draws[7:])

    def test_the_seed_of_the_run_goes_on(self):
        set_seed(3)
        make_run(seed=None, max_iters=2, work_dir=self.folder).run()
        saved = read_checkpoint(self.folder / "checkpoint.pt")["seed"]
        set_seed(4)
        run = make_run(seed=None, max_iters=4, work_dir=self.folder, resume=True)
        run.run()
        self.assertEqual(run.seed, saved)

    def test_saved_in_a_callback(self):
        expected = make_run(max_iters=6)
        expected.run()
        run = make_run(max_iters=6)

        def save(run):
            if run.iter_num == 2:
                run.save_checkpoint(self.folder / "mine.pt")

        run.add_callback("on_batch_end", save)
        run.run()
        # The step that the callback follows is done.
        self.assertEqual(read_checkpoint(self.folder / "mine.pt")["iter_num"], 3)
        other = make_run(max_iters=6)
        other.load_checkpoint(self.folder / "mine.pt")
        other.run()
        self.assertTrue(torch.equal(weights(other.model), weights(expected.model)))

    def test_saved_and_loaded_by_hand(self):
        run = make_run(max_iters=4)
        run.run()
        run.save_checkpoint(self.folder / "sub" / "x.pt")
        other = make_run(max_iters=4)
        other.load_checkpoint(self.folder / "sub" / "x.pt")
        self.assertTrue(torch.equal(weights(other.model), weights(run.model)))
        self.assertEqual(other.iter_num, 4)
        # There is nothing left to do.
        other.run()
        self.assertTrue(torch.equal(weights(other.model), weights(run.model)))
        saved = torch.load(self.folder / "sub" / "x.pt", weights_only=True)
        self.assertEqual(saved["config"]["learning_rate"], 1e-2)
        self.assertEqual(saved["model_config"]["n_embd"], 16)

    def test_the_model_can_be_built_from_it(self):
        run = make_run(max_iters=1, work_dir=self.folder)
        run.run()
        saved = read_checkpoint(self.folder / "checkpoint.pt")
        config = GPT.get_default_config()
        config.merge_from_dict(saved["model_config"])
        model = GPT(config)
        model.load_state_dict(saved["model"])
        self.assertTrue(torch.equal(weights(model), weights(run.model)))

    def test_a_head_untied_by_hand_is_resumed_as_untied(self):
        def make(**settings):
            model = no_dropout(tie_weights=True)
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            return make_run(model, work_dir=self.folder, **settings)

        expected = make(max_iters=4)
        expected.run()
        make(max_iters=2).run()
        run = make(max_iters=4, resume=True)
        run.run()
        self.assertTrue(torch.equal(weights(run.model), weights(expected.model)))

    def test_another_model_is_refused_and_nothing_changed(self):
        make_run(max_iters=1, work_dir=self.folder).run()
        other = make_run(no_dropout(n_layer=3, n_embd=8))
        before = weights(other.model)
        message = r"another model: lm_head.weight is \(5, 16\) in the file and \(5, 8\)"
        with self.assertRaisesRegex(ValueError, message):
            other.load_checkpoint(self.folder / "checkpoint.pt")
        self.assertTrue(torch.equal(weights(other.model), before))

    def test_a_refused_resume_changes_nothing(self):
        make_run(max_iters=3, work_dir=self.folder, log_interval=1).run()
        make_run(Regression(), Line(), max_iters=2, work_dir=self.folder / "regression").run()
        good = read_checkpoint(self.folder / "checkpoint.pt")
        torch.save({"iter_num": 3, "model": good["model"]}, self.folder / "foreign.pt")
        files = contents(self.folder)

        class Plain(GPT):
            def configure_optimizers(self, train_config):
                return torch.optim.SGD(self.parameters(), lr=1.0)

        frozen = no_dropout()
        frozen.transformer.wpe = torch.nn.Embedding(9, 16)
        regression = self.folder / "regression"
        for settings, message in (
            (dict(model=Plain(tiny_config(vocab_size=5))), "another optimizer"),
            (dict(optimizer="muon"), "another optimizer"),
            (dict(max_iters=3), "has 3 steps already and max_iters=3; raise it"),
            (dict(max_iters=1), "max_iters=1"),
            (dict(model=frozen), "another model: transformer.wpe.weight"),
            (dict(model=Regression(), train_dataset=Line()), "another model"),
            (dict(work_dir=regression), "another model"),
            (dict(work_dir=self.folder / "none"), "no checkpoint at .*none"),
        ):
            given = dict(max_iters=5, work_dir=self.folder, resume=True) | settings
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                make_run(**given)
        run = make_run()
        before = weights(run.model)
        state = torch.get_rng_state()
        with self.assertRaisesRegex(ValueError, "foreign.pt is no checkpoint"):
            run.load_checkpoint(self.folder / "foreign.pt")
        self.assertTrue(torch.equal(weights(run.model), before))
        self.assertTrue(torch.equal(torch.get_rng_state(), state))
        self.assertEqual(contents(self.folder), files)

    def test_a_start_that_fails_sets_no_file_aside(self):
        make_run(max_iters=3, work_dir=self.folder, log_interval=1).run()
        files = contents(self.folder)

        class Broken(GPT):
            def configure_optimizers(self, train_config):
                raise ValueError("no optimizer")

        with self.assertRaisesRegex(ValueError, "no optimizer"):
            make_run(Broken(tiny_config(vocab_size=5)), work_dir=self.folder).run()
        self.assertEqual(contents(self.folder), files)

    def test_resume_auto(self):
        for done in (3, 5):
            run = make_run(max_iters=done, work_dir=self.folder, resume="auto")
            first = []
            run.add_callback("on_batch_end", lambda run: first.append(run.iter_num))
            run.run()
        self.assertEqual(first, [3, 4])
        # What has come to its end is not begun again.
        run = make_run(max_iters=5, work_dir=self.folder, resume="auto")
        run.run()
        self.assertEqual(run.iter_num, 5)

    def test_new_settings_apply_and_are_named(self):
        make_run(max_iters=2, work_dir=self.folder, note="a").run()
        with self.assertLogs("mingpt", "INFO") as logged:
            run = make_run(max_iters=4, work_dir=self.folder, resume=True, weight_decay=0.3,
                           betas=(0.8, 0.9), seed=9, learning_rate=0.5, note="b")
        self.assertEqual(run.seed, 9)
        changes = {line.split(":", 2)[2] for line in logged.output if " was " in line}
        self.assertEqual(changes, {
            "max_iters was 2, is 4", "weight_decay was 0.1, is 0.3", "seed was 5, is 9",
            "betas was [0.9, 0.95], is [0.8, 0.9]", "learning_rate was 0.01, is 0.5",
            "note was a, is b"})
        run.run()
        groups = [(group["lr"], group["weight_decay"], group["betas"])
                  for group in run.optimizer.param_groups]
        self.assertEqual(groups, [(0.5, 0.3, (0.8, 0.9)), (0.5, 0.0, (0.8, 0.9))])

    def test_settings_of_a_script_that_are_no_plain_values(self):
        make_run(max_iters=1, work_dir=self.folder, hook=print, table={(1, 2): object()},
                 teacher=Regression(), path=Path("x")).run()
        self.assertEqual(read_checkpoint(self.folder / "checkpoint.pt")["config"]["max_iters"], 1)

    def test_numbers_of_numpy(self):
        run = make_run(max_iters=np.int64(2), learning_rate=np.float64(1e-3), work_dir=self.folder,
                       weight_decay=np.float32(0.5), betas=(np.float64(0.9), 0.95))
        run.run()
        saved = read_checkpoint(self.folder / "checkpoint.pt")
        self.assertEqual(saved["config"]["learning_rate"], 1e-3)
        make_run(max_iters=3, work_dir=self.folder, resume=True).run()

    def test_a_state_that_could_not_be_read_back_is_refused_by_name(self):
        class Odd(torch.optim.SGD):
            def __init__(self, params):
                super().__init__(params, lr=0.1)
                self.param_groups[0]["note"] = object()

        class WithOdd(GPT):
            def configure_optimizers(self, train_config):
                return Odd(self.parameters())

        make_run(max_iters=1, work_dir=self.folder).run()
        files = contents(self.folder)
        run = make_run(WithOdd(tiny_config(vocab_size=5)), work_dir=self.folder, max_iters=1)
        with self.assertRaisesRegex(ValueError, r"got a object as .*param_groups.*\['note'\]"):
            run.run()
        self.assertEqual(contents(self.folder), files)

    def test_a_compiled_model_is_saved_by_its_own_names(self):
        model = no_dropout()
        run = make_run(torch.compile(model, backend="eager"), max_iters=2, work_dir=self.folder)
        run.run()
        saved = read_checkpoint(self.folder / "checkpoint.pt")
        self.assertEqual(set(saved["model"]), set(model.state_dict()))
        self.assertEqual(saved["model_config"]["n_embd"], 16)
        for other in (no_dropout(), torch.compile(no_dropout(), backend="eager")):
            resumed = make_run(other, max_iters=3, work_dir=self.folder, resume=True)
            self.assertTrue(torch.equal(weights(resumed.model), weights(model)))

    def test_damaged_files_are_refused_or_as_good_as_whole(self):
        make_run(max_iters=2, work_dir=self.folder).run()
        path = self.folder / "checkpoint.pt"
        whole = path.read_bytes()
        good = read_checkpoint(path)["model"]
        rng = random.Random(3)
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

    def test_no_advice_to_drop_the_guard(self):
        torch.save(Regression(), self.folder / "checkpoint.pt")
        with self.assertRaisesRegex(ValueError, "no checkpoint") as caught:
            read_checkpoint(self.folder / "checkpoint.pt")
        self.assertNotIn("weights_only", str(caught.exception))

    @unittest.skipUnless(os.path.exists("/proc/self/maps"), "this system does not list mappings")
    def test_a_checkpoint_is_not_mapped_into_memory(self):
        make_run(max_iters=1, work_dir=self.folder).run()
        # The space of the old file is free when a new one replaces it.
        run = make_run(max_iters=2, work_dir=self.folder, resume=True)
        self.assertEqual(run.iter_num, 1)
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        self.assertNotIn("checkpoint.pt", maps)

    def test_the_random_state_of_a_gpu(self):
        class Generator:
            """Stands for torch.mps or torch.cuda."""

            state = torch.tensor([1, 2], dtype=torch.uint8)

            def get_rng_state(self):
                return self.state

            def set_rng_state(self, state):
                self.state = state

        generator = Generator()
        run = make_run(max_iters=1)
        run.run()
        run.device_type = "mps"
        with mock.patch("torch.get_device_module", return_value=generator) as get:
            run.save_checkpoint(self.folder / "x.pt")
            generator.state = None
            run.make_scaler = lambda: torch.amp.GradScaler("cpu", enabled=False)
            run.load_checkpoint(self.folder / "x.pt")
            run.config.max_iters = 1
            run.draw_batches().close()
        get.assert_called_with("mps")
        self.assertEqual(generator.state.tolist(), [1, 2])

    def test_the_best_is_kept(self):
        run = make_run(max_iters=6, eval_interval=1, val_dataset=Pairs(), work_dir=self.folder,
                       keep_best=True)
        losses = iter([3.0, 2.0, 2.5, 1.5, 1.6, 1.7])
        with mock.patch.object(run, "evaluate", lambda *args: next(losses)):
            run.run()
        best = read_checkpoint(self.folder / "best.pt")
        self.assertEqual((best["iter_num"], best["best_loss"]), (4, 1.5))
        self.assertEqual((run.val_loss, run.best_loss), (1.7, 1.5))
        # A resumed run knows what was best.
        run = make_run(max_iters=7, eval_interval=1, val_dataset=Pairs(), work_dir=self.folder,
                       keep_best=True, resume=True)
        with mock.patch.object(run, "evaluate", lambda *args: 1.55):
            run.run()
        self.assertEqual(read_checkpoint(self.folder / "best.pt")["iter_num"], 4)

    def test_the_scaler_of_float16_is_restored(self):
        run = make_run(dtype="float16", work_dir=self.folder, max_iters=3)
        run.run()
        # Not the value that it starts with.
        run.scaler.update(new_scale=1024.0)
        run.save_checkpoint(self.folder / "checkpoint.pt")
        other = make_run(dtype="float16", work_dir=self.folder, resume=True)
        other.add_callback("on_train_start", lambda run: self.assertEqual(
            run.scaler.state_dict()["scale"], 1024.0))
        other.run()

    def test_a_fresh_run_is_never_taken_for_the_old_one(self):
        make_run(max_iters=3, work_dir=self.folder, log_interval=1).run()
        run = make_run(max_iters=9, work_dir=self.folder, log_interval=1)
        run.add_callback("on_batch_end", lambda run: 1 / 0)
        with self.assertRaises(ZeroDivisionError):
            run.run()
        with self.assertRaisesRegex(ValueError, "no checkpoint"):
            make_run(max_iters=9, work_dir=self.folder, resume=True)
        self.assertEqual(read_checkpoint(self.folder / "checkpoint.pt.old")["iter_num"], 3)

    def test_rows_of_callbacks_are_not_doubled_after_a_crash(self):
        def run(crash_at=None, **settings):
            run = make_run(max_iters=6, work_dir=self.folder, log_interval=1, eval_interval=2,
                           checkpoint_interval=2, val_dataset=Pairs(), eval_batches=1, **settings)

            def write(run):
                run.write_metrics(split="mine")
                if run.iter_num == crash_at:
                    raise ZeroDivisionError

            run.add_callback("on_batch_end", write)
            run.add_callback("on_eval_end", lambda run: run.write_metrics(split="eval"))
            run.run()

        run()
        expected = read_metrics(self.folder, *TIMES)
        with self.assertRaises(ZeroDivisionError):
            run(crash_at=4)
        run(resume=True)
        self.assertEqual(read_metrics(self.folder, *TIMES), expected)

    def test_torn_and_later_rows_are_removed(self):
        make_run(max_iters=2, work_dir=self.folder, log_interval=1).run()
        with open(self.folder / "metrics.jsonl", "ab") as file:
            file.write(b'{"iteration": 3, "split": 1}\n{"iteration": 2, "spl')
        make_run(max_iters=3, work_dir=self.folder, log_interval=1, resume=True).run()
        rows = read_metrics(self.folder)
        self.assertEqual([row["iteration"] for row in rows], [1, 2, 3])
        # The time before the resume counts.
        self.assertGreater(rows[2]["seconds"], rows[1]["seconds"])

    def test_leftovers_of_a_killed_writer_are_removed_by_the_next_save(self):
        for name in ("checkpoint.pt.123.tmp", "other.pt.123.tmp"):
            (self.folder / name).write_bytes(b"half")
        make_run(max_iters=1, work_dir=self.folder).run()
        left = [path.name for path in self.folder.glob("*.tmp")]
        self.assertEqual(left, ["other.pt.123.tmp"])


class Places(Folder):
    """Folders that cannot be written to."""

    def test_a_file_in_the_way(self):
        (self.folder / "file").write_text("in the way", encoding="utf-8")
        with self.assertRaises(OSError):
            make_run(max_iters=1, work_dir=self.folder / "file" / "run").run()

    def test_no_folder_for_resume_and_keep_best(self):
        for settings in (dict(resume=True), dict(keep_best=True)):
            with self.assertRaisesRegex(ValueError, "work_dir"):
                make_run(**settings)
        for field, values in dict(log_interval=(-1,), eval_interval=(-1, None), eval_batches=(0,),
                                  checkpoint_interval=(-1,), resume=("perhaps",)).items():
            for value in values:
                with self.assertRaisesRegex(ValueError, f"got {field}="):
                    make_run(**{field: value})

    @unittest.skipUnless(os.path.exists("/dev/full"), "this system has no disk that is always full")
    def test_a_full_disk_is_named_with_the_metrics_file(self):
        run = make_run(work_dir=self.folder)
        os.symlink("/dev/full", self.folder / "metrics.jsonl")
        with self.assertRaisesRegex(OSError, "No space left.*metrics.jsonl"):
            run.write_metrics(split="train")

    @unittest.skipIf(os.name == "nt", "needs resource")
    def test_a_full_disk_leaves_the_last_checkpoint_whole(self):
        run_forked(train_script.main, f"--work_dir={self.folder}", "--trainer.max_iters=2")
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
    def assert_group_ends(self, group: int) -> None:
        """Waits until no process of a group is left: data workers end with their parent."""
        with self.assertRaises(ProcessLookupError):
            for _ in range(300):
                os.killpg(group, 0)
                time.sleep(0.05)

    def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(self):
        expected = last_line(run_forked(train_script.main))
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)):
            args = (f"--work_dir={self.folder / number.name}",)
            with Script(train_script.main, *args, "--pause=0.05") as script:
                script.wait_for("step      2")
                script.send(number)
                self.assertEqual(script.wait(), [code])
                self.assertRegex(script.printed(), r"stopped after step \d+; saved, "
                                                   r"--trainer.resume=True continues")
            printed = run_forked(train_script.main, *args, "--trainer.resume=True")
            self.assertEqual(last_line(printed), expected)

    def test_a_second_signal_ends_it_at_once(self):
        with Script(train_script.main, f"--work_dir={self.folder}", "--pause=30") as script:
            # It is in the callback of its first step.
            script.wait_for("running on device")
            time.sleep(0.5)
            script.send(signal.SIGINT)
            time.sleep(1.2)
            script.send(signal.SIGINT)
            self.assertEqual(script.wait(20), [130])

    def test_sigterm_to_the_whole_group_with_workers(self):
        expected = last_line(run_forked(train_script.main))
        args = (f"--work_dir={self.folder}", "--trainer.num_workers=2")
        with Script(train_script.main, *args, "--pause=0.05") as script:
            group = script.children[0].pid
            script.wait_for("step      3")
            # torchrun, SLURM and systemd do this.
            os.killpg(group, signal.SIGTERM)
            self.assertEqual(script.wait(), [143])
            self.assert_group_ends(group)
        printed = run_forked(train_script.main, *args, "--trainer.resume=True")
        self.assertEqual(last_line(printed), expected)

    def test_workers_end_with_a_killed_parent(self):
        with Script(train_script.main, "--trainer.num_workers=2", "--pause=0.05") as script:
            group = script.children[0].pid
            script.wait_for("step      3")
            script.send(signal.SIGKILL)
            script.wait()
            self.assert_group_ends(group)

    def test_ten_kills_change_nothing(self):
        settings = ("--trainer.max_iters=60", "--trainer.checkpoint_interval=3",
                    "--trainer.eval_interval=8", "--trainer.log_interval=2",
                    "--trainer.keep_best=True", "--trainer.eval_batches=2")
        whole = self.folder / "whole"
        broken = self.folder / "broken"
        expected = last_line(run_forked(train_script.main, *settings, f"--work_dir={whole}"))
        rng = random.Random(8)
        for _ in range(10):
            # A step makes 5,000 calls, a save 60,000. So most kills fall into a save, and the
            # run comes on between them.
            calls = rng.randrange(80_000, 140_000)
            with Script(train_script.main, *settings, f"--work_dir={broken}",
                        "--trainer.resume=auto", f"--die_after={calls}") as script:
                self.assertEqual(script.wait(), [-signal.SIGKILL])
        self.assertGreater(read_checkpoint(broken / "checkpoint.pt")["iter_num"], 5)
        printed = run_forked(train_script.main, *settings, f"--work_dir={broken}",
                             "--trainer.resume=True")
        self.assertEqual(last_line(printed), expected)
        self.assertEqual(read_metrics(broken, *TIMES), read_metrics(whole, *TIMES))

    def test_a_kill_from_outside(self):
        expected = last_line(run_forked(train_script.main))
        args = (f"--work_dir={self.folder}", "--trainer.checkpoint_interval=1")
        with Script(train_script.main, *args, "--pause=0.01") as script:
            script.wait_for("step      9")
            script.send(signal.SIGKILL)
            self.assertEqual(script.wait(), [-signal.SIGKILL])
        printed = run_forked(train_script.main, *args, "--trainer.resume=True")
        self.assertEqual(last_line(printed), expected)


@unittest.skipIf(os.name == "nt", "torchrun needs a torch with libuv")
class Processes(Folder):
    """Two or three processes do what one does."""

    def run_in(self, count, name, *args, check=True) -> str:
        return run_forked(train_script.main, "--dropout=0.0", f"--work_dir={self.folder / name}",
                          *args, count=count, check=check)

    def losses(self, name):
        return torch.tensor([row["loss"] for row in read_metrics(self.folder / name)])

    def assert_equal_runs(self, name, other):
        """Sums of float32 in another order differ by rounding, which 30 steps carry on."""
        torch.testing.assert_close(self.losses(name), self.losses(other), atol=1e-4, rtol=1e-4)
        models = [read_checkpoint(self.folder / folder / "checkpoint.pt")["model"]
                  for folder in (name, other)]
        torch.testing.assert_close(*models, atol=1e-3, rtol=1e-3)

    def test_two_equal_one_and_may_take_over_from_it(self):
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
        self.assertEqual(printed.count("number of parameters"), 1)

    def test_masked_targets_count_alike_in_one_to_three(self):
        settings = ("--masked=True", "--trainer.batch_size=12", "--trainer.max_iters=12",
                    "--trainer.eval_interval=6")
        self.run_in(1, "1", *settings)
        self.run_in(2, "2", "--trainer.grad_accum_steps=3", *settings)
        self.run_in(3, "3", "--trainer.grad_accum_steps=2", *settings)
        self.assertEqual(len(self.losses("1")), 14)
        self.assert_equal_runs("2", "1")
        self.assert_equal_runs("3", "1")

    def test_muon(self):
        settings = ("--trainer.optimizer=muon", "--trainer.max_iters=6")
        self.run_in(1, "one", *settings)
        self.run_in(2, "two", *settings)
        self.assert_equal_runs("two", "one")

    def test_resume_with_dropout_is_exact(self):
        digests = []
        for parts in ((12,), (5, 12)):
            args = ("--dropout=0.1", f"--work_dir={self.folder / str(len(parts))}",
                    "--trainer.resume=auto")
            for end in parts:
                printed = run_forked(train_script.main, *args, f"--trainer.max_iters={end}",
                                     count=2)
            digests.append(last_line(printed))
        self.assertEqual(digests[0], digests[1])

    def test_without_a_seed_all_draw_the_first_ones_examples(self):
        printed = run_forked(seeds, count=3)
        self.assertEqual(len(set(re.findall(r"seed \d+", printed))), 1)
        self.assertEqual(printed.count("seed "), 3)

    def test_one_that_is_told_to_stop_is_enough(self):
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            folder = self.folder / number.name
            with Script(train_script.main, f"--work_dir={folder}", "--pause=0.02",
                        "--trainer.max_iters=500", count=2) as script:
                script.wait_for("step      3")
                os.kill(script.children[1].pid, number)
                codes = script.wait()
                printed = script.printed()
            self.assertEqual(codes[1], code)
            self.assertNotEqual(codes[0], 0)
            self.assertIn("--trainer.resume=True continues", printed)
            stopped = read_checkpoint(folder / "checkpoint.pt")
            last = read_metrics(folder)[-1]["iteration"]
            self.assertEqual((len(stopped["random_states"]), stopped["iter_num"]), (2, last))
            self.assertLess(last, 500)

    def test_stop_in_one(self):
        printed = run_forked(stop_in_last, f"--work_dir={self.folder}", count=2)
        self.assertEqual(printed.count("ended after 3"), 2)
        self.assertEqual(read_checkpoint(self.folder / "checkpoint.pt")["iter_num"], 3)

    def test_a_batch_that_does_not_divide_is_an_error_at_once(self):
        printed = self.run_in(2, "x", "--trainer.batch_size=7", check=False)
        self.assertIn("error: got batch_size=7, expected a multiple of 2", printed)
        self.assertNotIn("loss", printed)
        self.assertFalse((self.folder / "x").exists())

    def test_half_of_torchruns_environment(self):
        printed = run_forked(train_script.main, check=False, RANK="1")
        self.assertRegex(printed, "^error: got RANK without WORLD_SIZE")

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


def seeds(args: list[str]) -> None:
    """Prints the seed that each process has for the examples of a run."""
    torch.manual_seed(int(os.environ["RANK"]))
    run = make_run(seed=None, max_iters=1, batch_size=6)
    run.run()
    print(f"seed {run.seed}\n", end="")


def stop_in_last(args: list[str]) -> None:
    """Trains in two processes; the last one stops the run."""
    config = CfgNode(work_dir="")
    config.merge_from_args(args)
    run = make_run(max_iters=50, work_dir=config.work_dir)

    def stop(run):
        if run.rank == 1 and run.iter_num == 2:
            run.stop()

    run.add_callback("on_batch_end", stop)
    run.run()
    print(f"ended after {run.iter_num}\n", end="")


if __name__ == "__main__":
    unittest.main()
