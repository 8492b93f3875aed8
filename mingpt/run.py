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
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mingpt import checkpoint, processes
from mingpt.data import count_examples, load_batches
from mingpt.trainer import Trainer, is_scheduled
from mingpt.utils import CN, check_config, eval_mode, logger, naming_file, progress


class Run(Trainer):
    """Trains a module on a dataset, and looks after the run.

    val_loss is the last validation's, best_loss the lowest. elapsed counts the seconds of
    training, those before a resume included.
    """

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
        check_config(config, RULES)
        if not work_dir and (config.resume or config.keep_best):
            raise ValueError("got resume or keep_best without a folder, expected work_dir")
        if getattr(config, "work_dir", ""):
            raise ValueError("got work_dir in the settings, expected it as an argument of Run")
        if val_dataset is not None:
            count_examples(val_dataset)

        self.work_dir = Path(work_dir).expanduser()
        self.writes = bool(work_dir)
        self.val_dataset = val_dataset
        self.val_loss: float | None = None
        self.best_loss = math.inf
        self.elapsed = 0.0
        # A resumed run puts the random generators back.
        self._random_state: dict | None = None

        if config.resume:
            path = self.work_dir / "checkpoint.pt"
            if config.resume is True or path.exists():
                self.load_checkpoint(path)

    def run(self) -> None:
        """Trains for max_iters steps, or goes on from the checkpoint that was loaded."""
        with processes.Signals() as self.signals:
            super().run()
            # A signal may come too late for a step to see it.
            if processes.any_process(self.signals.received is not None):
                self._leave()

    def begin(self) -> None:
        is_new = not self.goes_on
        super().begin()
        if is_new:
            self.best_loss = math.inf
            self.elapsed = 0.0
        self._last_report = (self.steps_done, self.elapsed)

        if self.writes and self.rank == 0:
            # A value that cannot be read back is refused now, not after hours.
            checkpoint.make_plain(self._content([]))
            self.work_dir.mkdir(parents=True, exist_ok=True)
            if is_new:
                checkpoint.set_aside(self.work_dir)
            else:
                checkpoint.keep_rows(self.work_dir / "metrics.jsonl", self.steps_done)

    def draw_batches(self) -> Generator[list, None, None]:
        # Callbacks at the start may have drawn random numbers.
        if self._random_state is not None:
            checkpoint.set_random_state(self._random_state, self.device_type)
            self._random_state = None
        self.is_stopping = processes.any_process(self.is_stopping)
        return super().draw_batches()

    def step(self, network: Callable, micro_batches: list) -> None:
        super().step(network, micro_batches)
        self._targets_per_step = sum(y.numel() for x, y in micro_batches) * self.world_size
        # A GPU computes while Python goes ahead, so the clock waits for it.
        if self._is_due("log"):
            torch.get_device_module(self.device_type).synchronize()

    def after_step(self) -> None:
        """Reports, validates and saves where it is due, and stops if that is asked for."""
        self.elapsed += self.iter_dt
        # One process that gets a signal, or calls stop(), ends the run for all.
        is_told = processes.any_process(self.signals.received is not None)
        self.is_stopping = processes.any_process(self.is_stopping)

        if self._is_due("log"):
            self.report()
        if self.val_dataset is not None and self._is_due("eval"):
            self.validate()
        if self.writes and (is_told or self.is_done() or self._is_due("checkpoint")):
            self._check_finite()
            self.save_checkpoint(self.work_dir / "checkpoint.pt")

        if is_told and not self.is_done():
            hint = "; saved, --trainer.resume=True continues" if self.writes else ""
            logger.info(f"stopped after step {self.steps_done}{hint}")
            self._leave()

    def _is_due(self, what: str) -> bool:
        """Tells whether reports ("log"), validations or checkpoints are due after this step."""
        interval = getattr(self.config, f"{what}_interval")
        is_first_report = what == "log" and self.steps_done == 1
        return interval > 0 and (
            is_first_report or self.is_done() or self.steps_done % interval == 0)

    def _leave(self) -> None:
        """Ends the script, as the signal asks."""
        if self.signals.received == signal.SIGINT:
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
        self.is_stopping = processes.any_process(self.is_stopping)

    @torch.no_grad()
    def evaluate(self, dataset: Any, max_batches: int | None = None) -> float:
        """Computes the mean loss over a dataset, or over batches spread evenly through it.

        All processes call it and share the work. Raises ValueError for an empty dataset.
        """
        size = count_examples(dataset)
        limit = size if max_batches is None else max_batches * self.config.batch_size
        # Within the limit these are all examples.
        chosen = np.linspace(0, size - 1, min(size, limit)).astype(int)
        mine = chosen[self.rank::self.world_size].tolist()
        micro_size = self.config.batch_size // (self.world_size * self.config.grad_accum_steps)
        batches = [mine[i:i + micro_size] for i in range(0, len(mine), micro_size)]

        total = 0.0
        counted = 0
        with eval_mode(self.model):
            for x, y in progress(load_batches(dataset, batches), "evaluating", len(batches)):
                n = self.count_targets(y)
                if n > 0:
                    total += self.compute(self.model, x, y)[1].item() * n
                    counted += n
        total = processes.sum_over_processes(total)
        return total / max(1, processes.sum_over_processes(counted))

    def report(self) -> None:
        """Logs a line for people and a row for metrics.jsonl."""
        self._check_finite()
        loss = processes.sum_over_processes(float(self.loss)) / self.world_size
        lr = self.optimizer.param_groups[0]["lr"]

        steps, elapsed = self._last_report
        self._last_report = (self.steps_done, self.elapsed)
        # A coarse clock may not have moved.
        seconds = max(self.elapsed - elapsed, 1e-9) / max(1, self.steps_done - steps)
        rate = self._targets_per_step / seconds

        line = (f"step {self.steps_done:>6}  loss {loss:.4f}  lr {lr:.1e}  "
                f"{1000 * seconds:7.2f} ms  {rate:>9,.0f} tok/s")
        left = max(0, self.step_limit() - self.steps_done) * seconds
        # Beyond 100,000 minutes nobody waits for the end.
        if left < 6e6:
            minutes, rest = divmod(round(left), 60)
            line += f"  {minutes}:{rest:02} left"

        logger.info(line)
        self.write_metrics(split="train", loss=loss, lr=lr, grad_norm=self.grad_norm,
                           tokens_per_second=round(rate), seconds=round(self.elapsed, 3))

    def _check_finite(self) -> None:
        """Raises ValueError if the training has gone astray."""
        loss = float(self.loss)
        norm = float(self.grad_norm)
        # A gradient in float16 may overflow: the scaler skips that step.
        number = loss if self.dtype == torch.float16 else loss + norm
        if processes.any_process(not math.isfinite(number)):
            raise ValueError(f"the loss is {loss}, the gradient norm {norm} after step "
                             f"{self.steps_done}; try a lower learning_rate or more warmup_iters")

    def write_metrics(self, **row: Any) -> None:
        """Adds a row to metrics.jsonl in work_dir; callbacks may add rows of their own."""
        if self.writes and self.rank == 0:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            row = {name: checkpoint.finite_or_none(value) for name, value in row.items()}
            path = self.work_dir / "metrics.jsonl"
            with naming_file(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": self.steps_done, **row}) + "\n")

    def save_checkpoint(self, path: str | Path) -> None:
        """Writes all that the run needs to go on; all processes call it, the first writes."""
        if self.optimizer is None:
            self.optimizer = self.make_optimizer()
        states = processes.gather(checkpoint.random_state(self.device_type))
        if self.rank == 0:
            checkpoint.save_checkpoint(path, self._content(states))

    def _content(self, random_states: list) -> dict:
        # A resumed run carries the state over, or momentum would be lost.
        if not hasattr(self.optimizer, "state"):
            raise ValueError(f"got a {type(self.optimizer).__name__} as the optimizer, which a "
                             "checkpoint cannot hold; expected a torch.optim.Optimizer")
        return {
            "model": checkpoint.model_state(self.model),
            "model_config": checkpoint.plain_settings(getattr(self.model, "config", {})),
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
        config = self.config
        saved = checkpoint.read_checkpoint(path)
        optimizer = self.make_optimizer()
        checkpoint.check_fits(saved, self.model, optimizer, path)
        done = saved["iter_num"]
        if config.resume is True and done >= self.step_limit():
            raise ValueError(f"{path} has {done} steps already and max_iters={config.max_iters}; "
                             "raise it")

        checkpoint.load_model_state(self.model, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        self.optimizer = optimizer
        self.has_schedule = is_scheduled(saved["config"], done)
        # It is empty unless the precision was float16.
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.steps_done = done
        self.iter_num = done
        self.best_loss = saved["best_loss"]
        self.elapsed = saved["elapsed"]
        self.seed = saved["seed"]
        if config.seed not in (None, saved["config"]["seed"]):
            self.seed = int(config.seed)
        # There may be more processes now.
        if self.rank < len(saved["random_states"]):
            self._random_state = saved["random_states"][self.rank]
        self.goes_on = True
        logger.info(f"loaded {path}, saved after step {done}")
        for change in checkpoint.changed_settings(saved["config"], config):
            logger.info(change)


# Rules for settings: names, test of a value, what the error says is expected.
RULES = (
    ("log_interval eval_interval checkpoint_interval", lambda v: v >= 0 and v == int(v),
     "a whole number; 0 turns it off"),
    ("eval_batches", lambda v: v is None or isinstance(v, int) and v >= 1,
     "a whole number from 1 on, or None for all"),
    ("resume", lambda v: isinstance(v, bool) or v in (None, "auto"), "True, False or auto"),
)
