"""
Looks after a training run: validates, reports, keeps the best model, saves, resumes.

    config = Run.get_default_config()
    config.max_iters = 1000
    config.eval_interval = 100
    run = Run(config, model, train_dataset, val_dataset, work_dir="out/mine")
    run.run()

work_dir gets metrics.jsonl, a row for each report, and checkpoint.pt. Ctrl-C,
SIGTERM and a closed terminal finish the step and save. With config.resume = True
the run goes on from checkpoint.pt, with the same examples and random numbers as if
it had never stopped. torchrun starts a run on several GPUs: see processes.py.
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mingpt import checkpoint, processes
from mingpt.data import count_examples, load_batches
from mingpt.trainer import Trainer
from mingpt.utils import CN, check_config, eval_mode, logger, naming_file, progress

RULES = (  # names of settings, test of a value, what is expected
    ("log_interval eval_interval checkpoint_interval", lambda v: v >= 0 and v == int(v),
     "a whole number; 0 turns it off"),
    ("eval_batches", lambda v: v is None or v >= 1 and v == int(v),
     "a whole number from 1 on, or None for all"),
    ("resume", lambda v: v in (None, False, True, "auto"), "True, False or auto"),
)
# Files of an earlier run, which are set aside when a new one starts.
RUN_FILES = ("checkpoint.pt", "best.pt", "metrics.jsonl")


class Run(Trainer):
    """Trains a module on a dataset, and looks after the run."""

    @staticmethod
    def get_default_config() -> CN:
        C = Trainer.get_default_config()
        C.log_interval = 100  # steps between reports; 0 turns them off
        C.eval_interval = 0  # steps between validations; 0 turns them off
        C.checkpoint_interval = 0  # steps between checkpoints; the last step is saved anyway
        C.eval_batches = None  # batches of a validation; None takes the whole dataset
        C.keep_best = False  # also keep best.pt, the checkpoint of the lowest validation loss
        C.resume = None  # True goes on from checkpoint.pt; 'auto' also starts if there is none
        return C

    def __init__(self, config: CN, model: nn.Module, train_dataset: Any,
                 val_dataset: Any = None, work_dir: str | Path = ""):
        """Moves the model to its device and, with config.resume, loads the checkpoint.

        An empty work_dir writes nothing. Raises ValueError for a bad setting.
        """
        super().__init__(config, model, train_dataset)
        work_dir = work_dir or getattr(config, "work_dir", "")
        if not work_dir and (config.resume or config.keep_best):
            raise ValueError("got resume or keep_best without a folder, expected work_dir")
        self.writes = bool(work_dir)
        self.work_dir = Path(work_dir or ".").expanduser()
        self.val_dataset = val_dataset
        self.val_loss: float | None = None  # of the last validation
        self.best_loss = math.inf  # of all validations
        self.elapsed = 0.0  # seconds of training, those before a resume included
        self.signals = processes.Signals()
        self._random_state: dict | None = None  # to be restored
        self._is_asked = False  # whether this process was asked to stop
        self._forget_report()
        if config.resume:
            path = self.work_dir / "checkpoint.pt"
            if config.resume is True or path.exists():
                self.load_checkpoint(path)

    def check_settings(self) -> None:
        check_config(self.config, RULES)
        super().check_settings()

    def run(self) -> None:
        """Trains for max_iters steps, or goes on from the checkpoint that was loaded."""
        with processes.Signals() as self.signals:
            super().run()

    def begin(self) -> Callable:
        is_new = not self.goes_on
        self._is_asked = False
        network = super().begin()
        if is_new:
            self.best_loss = math.inf
            self.elapsed = 0.0
        self._forget_report()
        if self.writes:
            # What could not be read back is refused now, not after hours.
            checkpoint.make_plain(self._content([]))
            if processes.rank() == 0:
                self._prepare_folder(is_new)
        return network

    def _prepare_folder(self, is_new: bool) -> None:
        self.work_dir.mkdir(parents=True, exist_ok=True)
        if is_new:
            for name in RUN_FILES:
                path = self.work_dir / name
                if path.exists():
                    os.replace(path, f"{path}.old")
        else:
            checkpoint.keep_rows(self.work_dir / "metrics.jsonl", self.steps_done)

    def draw_batches(self) -> Generator[list, None, None]:
        # Callbacks at the start may have drawn random numbers.
        if self._random_state is not None:
            checkpoint.set_random_state(self._random_state, self.device_type)
            self._random_state = None
        return super().draw_batches()

    def step(self, network: Callable, batches: list) -> None:
        super().step(network, batches)
        self._targets += sum(y.numel() for x, y in batches) * self.world_size

    def take_time(self, start: float) -> None:
        # A GPU computes on while Python goes ahead, so wait before the time is read.
        if self._is_due("log") and self.device_type != "cpu":
            torch.get_device_module(self.device_type).synchronize()
        super().take_time(start)
        self.elapsed += self.iter_dt
        self._seconds += self.iter_dt
        self._steps += 1

    def after_step(self) -> None:
        """Reports, validates and saves where it is due, and stops if that is asked for."""
        # One process that was asked to stop is enough.
        is_told = processes.sum_over_processes(self.signals.received is not None) > 0
        self._agree_to_stop()
        if self._is_due("log"):
            self.report()
        if self.val_dataset is not None and self._is_due("eval"):
            self.validate()
            self._agree_to_stop()
        if self.writes and (is_told or self.is_done() or self._is_due("checkpoint")):
            self._check_finite()
            self.save_checkpoint(self.work_dir / "checkpoint.pt")
        if is_told and not self.is_done():
            self._leave()

    def stop(self) -> None:
        """Ends the run after this step, as if it were the last one; one process is enough."""
        self._is_asked = True

    def _agree_to_stop(self) -> None:
        self.is_stopping = processes.sum_over_processes(self._is_asked) > 0

    def _is_due(self, what: str) -> bool:
        """Tells whether reports ("log"), validations or checkpoints are due after this step."""
        interval = getattr(self.config, f"{what}_interval")
        if interval == 0:
            return False
        is_first_report = what == "log" and self.steps_done == 1
        return is_first_report or self.is_done() or self.steps_done % interval == 0

    def _leave(self) -> None:
        """Ends a run that a signal has stopped."""
        text = f"stopped after step {self.steps_done}"
        if self.writes:
            text += "; saved, --trainer.resume=True continues"
        logger.info(text)
        if self.signals.is_interrupt:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.signals.received or signal.SIGTERM))

    def validate(self) -> None:
        """Computes the validation loss and keeps the checkpoint if it is the best."""
        self.val_loss = self.evaluate(self.val_dataset, self.config.eval_batches)
        logger.info(f"step {self.steps_done:>6}  validation loss {self.val_loss:.4f}")
        self.write_metrics(split="val", loss=self.val_loss)
        if self.val_loss < self.best_loss:
            self.best_loss = self.val_loss
            if self.config.keep_best:
                self.save_checkpoint(self.work_dir / "best.pt")
        self.trigger_callbacks("on_eval_end")

    @torch.no_grad()
    def evaluate(self, dataset: Any, max_batches: int | None = None) -> float:
        """Computes the mean loss over a dataset, or over batches spread evenly through it.

        All processes call it and share the work. Raises ValueError for an empty dataset.
        """
        size = count_examples(dataset)
        count = size
        if max_batches is not None:
            count = min(size, max_batches * self.config.batch_size)
        chosen = np.linspace(0, size - 1, count).astype(int)  # all, if count is size
        mine = chosen[self.rank::self.world_size].tolist()
        parts = self.world_size * self.config.grad_accum_steps
        micro_size = max(1, self.config.batch_size // parts)
        batches = [mine[i:i + micro_size] for i in range(0, len(mine), micro_size)]

        total = 0.0
        counted = 0
        with eval_mode(self.model):
            for x, y in progress(load_batches(dataset, batches), "evaluating", len(batches)):
                n = self.count_targets(y)
                if n > 0:
                    total += self.compute(self.model, x, y)[1].item() * n
                    counted += n
        all_counted = processes.sum_over_processes(counted)
        return processes.sum_over_processes(total) / max(1, all_counted)

    def report(self) -> None:
        """Logs a line for people and a row for metrics.jsonl."""
        self._check_finite()
        loss = processes.sum_over_processes(float(self.loss)) / self.world_size
        lr = self.optimizer.param_groups[0]["lr"]
        # A coarse clock may not have moved.
        seconds = max(self._seconds, 1e-9)
        rate = self._targets / seconds
        line = (f"step {self.steps_done:>6}  loss {loss:.4f}  lr {lr:.1e}  "
                f"{1000 * seconds / self._steps:7.2f} ms  {rate:>9,.0f} tok/s")
        if self.config.max_iters is not None:
            left = (self.config.max_iters - self.steps_done) * seconds / self._steps
            line += format_left(left)
        logger.info(line)
        self.write_metrics(split="train", loss=loss, lr=float(lr),
                           grad_norm=float(self.grad_norm), tokens_per_second=round(rate),
                           seconds=round(self.elapsed, 3))
        self._forget_report()

    def _forget_report(self) -> None:
        """Begins to count for the next report."""
        self._seconds = 0.0
        self._steps = 0
        self._targets = 0

    def _check_finite(self) -> None:
        """Raises ValueError if the training has gone astray."""
        is_bad = not math.isfinite(self.loss)
        # A gradient in float16 may overflow: the scaler skips that step.
        if self.dtype != torch.float16 and not math.isfinite(self.grad_norm):
            is_bad = True
        if processes.sum_over_processes(is_bad):
            raise ValueError(
                f"the loss is {float(self.loss)}, the gradient norm {float(self.grad_norm)} after "
                f"step {self.steps_done}; try a lower learning_rate or more warmup_iters")

    def write_metrics(self, **row: Any) -> None:
        """Adds a row to metrics.jsonl in work_dir; callbacks may add rows of their own."""
        if self.writes and processes.rank() == 0:
            row = {name: checkpoint.finite_or_none(value) for name, value in row.items()}
            self.work_dir.mkdir(parents=True, exist_ok=True)
            path = self.work_dir / "metrics.jsonl"
            with naming_file(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": self.steps_done, **row}) + "\n")

    def save_checkpoint(self, path: str | Path) -> None:
        """Writes all that the run needs to go on; all processes call it, the first writes."""
        states = processes.gather(checkpoint.random_state(self.device_type))
        if processes.rank() == 0:
            checkpoint.save_checkpoint(path, self._content(states))

    def _content(self, random_states: list) -> dict:
        return {
            "model": checkpoint.model_state(self.model),
            "model_config": checkpoint.plain_settings(getattr(self.model, "config", None)),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iter_num": self.steps_done,
            "seed": self.seed,
            "best_loss": self.best_loss,
            "elapsed": self.elapsed,
            "random_states": random_states,
            "config": checkpoint.plain_settings(self.config),
        }

    def load_checkpoint(self, path: str | Path) -> None:
        """Goes back to where save_checkpoint was called: run() continues from there.

        Settings of now apply. Raises ValueError, with nothing changed, for a checkpoint
        of another model or optimizer.
        """
        saved = checkpoint.read_checkpoint(path)
        optimizer = self.make_optimizer()
        scaler = self.make_scaler()
        self._check_fits(saved, optimizer, scaler, path)

        checkpoint.load_model_state(self.model, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        self.optimizer = optimizer
        self.scaler = scaler
        self.steps_done = self.iter_num = saved["iter_num"]
        self.best_loss = saved["best_loss"]
        self.elapsed = saved["elapsed"]
        self.goes_on = True
        self.seed = saved["seed"]
        if self.config.seed not in (None, saved["config"]["seed"]):
            self.seed = self.config.seed
        # There may be more processes now.
        if self.rank < len(saved["random_states"]):
            self._random_state = saved["random_states"][self.rank]
        self._tell_changes(saved["config"], path)

    def _check_fits(self, saved: dict, optimizer: Any, scaler: Any, path: str | Path) -> None:
        checkpoint.check_same_model(saved["model"], checkpoint.model_state(self.model), path)
        checkpoint.check_same_optimizer(saved["optimizer"], optimizer.state_dict(), path)
        if bool(saved["scaler"]) != scaler.is_enabled():
            raise ValueError(f"{path} has dtype={saved['config']['dtype']}, "
                             f"now it is {self.config.dtype}; take the same")
        max_iters = self.config.max_iters
        if self.config.resume is True and max_iters is not None and saved["iter_num"] >= max_iters:
            raise ValueError(f"{path} has {saved['iter_num']} steps already and "
                             f"max_iters={max_iters}; raise it")

    def _tell_changes(self, then: dict, path: str | Path) -> None:
        logger.info(f"loaded {path}, saved after step {self.steps_done}")
        for name, value in checkpoint.plain_settings(self.config).items():
            if name != "resume" and name in then and then[name] != value:
                logger.info(f"{name} was {then[name]}, is {value}")


def format_left(seconds: float) -> str:
    """Formats the time left: 75.2 -> "  0:01:15 left"; nothing beyond 1,000 hours."""
    if seconds > 3_600_000:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"  {hours}:{minutes:02}:{rest:02} left"
