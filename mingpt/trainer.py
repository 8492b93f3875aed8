"""
A training loop for any torch module whose forward(x, y) returns (output, loss). It knows nothing of GPT.

    from mingpt.trainer import Trainer
    config = Trainer.get_default_config()
    config.max_iters = 1000
    trainer = Trainer(config, model, train_dataset)         # a dataset of pairs (x, y)
    trainer.add_callback('on_batch_end', lambda trainer: print(trainer.iter_num, trainer.loss.item()))
    trainer.run()

    torchrun --nproc_per_node=2 SCRIPT.py                   # the same script on two GPUs, or two CPU processes
"""

import atexit
import contextlib
import json
import logging
import math
import os
import random
import signal
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from mingpt.utils import CfgNode, Progress, eval_mode, format_time, replacing

logger = logging.getLogger(__name__)

EVENTS = ("on_train_start", "on_batch_end", "on_eval_end", "on_train_end")

class Trainer:
    """Trains a model on a dataset; see run() for how."""

    @staticmethod
    def get_default_config() -> CfgNode:
        C = CfgNode()
        # where and how to compute
        C.device = "auto" # 'auto' takes cuda, else mps, else cpu
        C.dtype = "auto" # 'auto' is bfloat16 on a GPU that has it, else float32; or float32, bfloat16, float16
        C.compile = False # torch.compile: a minute at the start, faster from there
        C.num_workers = 0 # processes that prepare batches; 0 prepares them in this one
        # what to learn from
        C.max_iters = None # optimizer steps; None goes on until stopped
        C.batch_size = 64 # examples per optimizer step, over all processes and micro-batches
        C.grad_accum_steps = 1 # micro-batches that a process cuts its share of a batch into, to save memory
        C.seed = None # draws the batches; None takes the seed that torch was given
        # AdamW; the learning rate rises to its value, stays, or falls to min_lr
        C.learning_rate = 3e-4
        C.warmup_iters = 0 # steps of linear rise from 0
        C.lr_decay_iters = None # the step at which the fall ends; None keeps the rate constant
        C.schedule = "cosine" # the form of the fall: 'cosine' or 'linear'
        C.min_lr = 0.0
        C.betas = (0.9, 0.95)
        C.weight_decay = 0.1 # only on what the model's configure_optimizers chooses
        C.grad_norm_clip = 1.0 # longest gradient that is not shortened; 0 is off
        # what to report and keep
        C.log_interval = 100 # steps between log lines; 0 is off
        C.eval_interval = 0 # steps between evaluations on the validation dataset; 0 is off
        C.eval_batches = None # batches per evaluation; None takes the whole dataset
        C.work_dir = None # folder for metrics.jsonl and checkpoints; None writes nothing
        C.checkpoint_interval = 0 # steps between checkpoints; 0 saves one at the end only
        C.keep_best = False # also keep best.pt, the checkpoint of the lowest validation loss
        C.resume = False # go on from the checkpoint in work_dir
        return C

    def __init__(self, config: CfgNode, model: torch.nn.Module, train_dataset, val_dataset=None):
        """Moves the model to its device. Raises ValueError for settings that do not fit together."""
        self.config, self.model = config, model
        self.train_dataset, self.val_dataset = train_dataset, val_dataset
        self.callbacks = defaultdict(list)
        self._find_place()
        self.model.to(self.device)
        if hasattr(model, "configure_optimizers"):
            self.optimizer = model.configure_optimizers(config)
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=config.betas,
                                               weight_decay=config.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=self.dtype == torch.float16)
        self.seed = torch.initial_seed() if config.seed is None else config.seed
        if self.rank > 0:
            torch.manual_seed(self.seed + self.rank) # processes drop out different units

        self.iter_num = 0 # the step under way
        self.iter_time = 0.0 # when the last step ended, in seconds
        self.iter_dt = 0.0 # how long it took, in seconds
        self.loss = None # its mean loss, a tensor
        self.grad_norm = None # the length of its gradient before clipping, a tensor
        self.val_loss = None # of the last evaluation
        self.best_loss = math.inf # of all evaluations
        self.elapsed = 0.0 # seconds of training, those before a resume included
        self._first_iter = 0 # where the next run() begins
        if config.resume:
            self.load_checkpoint(self._path("checkpoint.pt"))

    def _find_place(self) -> None:
        """Settles the device, the precision and the part of the batch that this process takes."""
        config = self.config
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if self.world_size > 1 and device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device, self.device_type = device, torch.device(device).type
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
                  "auto": torch.bfloat16 if self.device_type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32}
        for field, choices in (("dtype", dtypes), ("schedule", ("cosine", "linear"))):
            if getattr(config, field) not in choices:
                raise ValueError(f"got {field}={getattr(config, field)!r}, expected one of {', '.join(choices)}")
        self.dtype = dtypes[config.dtype]
        parts = self.world_size * config.grad_accum_steps
        if config.batch_size % parts or config.batch_size < 1:
            raise ValueError(f"batch_size={config.batch_size} does not divide by {self.world_size} processes x grad_accum_steps="
                             f"{config.grad_accum_steps}; choose a multiple of {parts}")
        if len(self.train_dataset) == 0:
            raise ValueError("the training dataset is empty")
        if (config.resume or config.keep_best) and config.work_dir is None:
            raise ValueError("resume and keep_best need a work_dir")
        if self.world_size > 1:
            if self.device_type == "cuda":
                torch.cuda.set_device(self.device)
            if not dist.is_initialized():
                dist.init_process_group("nccl" if self.device_type == "cuda" else "gloo")
                atexit.register(dist.destroy_process_group)
            self.host_group = dist.new_group(backend="gloo") # for words between processes that need no GPU

    # -----------------------------------------------------------------------------
    # callbacks

    def add_callback(self, onevent: str, callback) -> None:
        """Has callback(trainer) called at an event, after those added before."""
        self._check_event(onevent)
        self.callbacks[onevent].append(callback)

    def set_callback(self, onevent: str, callback) -> None:
        """Has callback(trainer) called at an event, instead of those added before."""
        self._check_event(onevent)
        self.callbacks[onevent] = [callback]

    def trigger_callbacks(self, onevent: str) -> None:
        """Calls the callbacks of an event."""
        self._check_event(onevent)
        for callback in self.callbacks[onevent]:
            callback(self)

    def _check_event(self, onevent: str) -> None:
        if onevent not in EVENTS:
            raise ValueError(f"there is no event {onevent!r}; the events are {', '.join(EVENTS)}")

    # -----------------------------------------------------------------------------
    # the loop

    def run(self) -> None:
        """Trains for max_iters steps, from the checkpoint's on if one was loaded."""
        config, model, optimizer, scaler = self.config, self.model, self.optimizer, self.scaler
        parameters = [p for p in model.parameters() if p.requires_grad]
        network = model
        if self.world_size > 1:
            network = ddp = torch.nn.parallel.DistributedDataParallel(model)
        if config.compile:
            network = torch.compile(network)
        self.iter_num, self._first_iter = self._first_iter, 0
        if config.work_dir and self.rank == 0 and self.iter_num == 0:
            self._path("metrics.jsonl").unlink(missing_ok=True) # of an earlier run
        batches = self._batches(self.iter_num)
        logged_iter, logged_time = self.iter_num, time.monotonic() # of the last log line
        self.iter_time = time.time()
        model.train()
        self.trigger_callbacks("on_train_start")

        with _Interrupts() as interrupts:
            while config.max_iters is None or self.iter_num < config.max_iters:
                # how large this step is to be
                lr = self.learning_rate(self.iter_num)
                for group in optimizer.param_groups:
                    group["lr"] = lr

                # the gradient of the mean loss over the batch, micro-batch by micro-batch
                self.loss = 0.0
                targets = 0
                for micro_step in range(config.grad_accum_steps):
                    last = micro_step == config.grad_accum_steps - 1
                    x, y = next(batches)
                    with contextlib.nullcontext() if last or self.world_size == 1 else ddp.no_sync():
                        with self._autocast():
                            _, loss = network(x, y)
                        scaler.scale(loss / config.grad_accum_steps).backward()
                    self.loss = self.loss + loss.detach() / config.grad_accum_steps
                    targets += y.numel() * self.world_size

                # the step itself
                scaler.unscale_(optimizer)
                self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_norm_clip or math.inf)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)

                # what others want to do with it
                self.trigger_callbacks("on_batch_end")
                self.iter_num += 1
                now = time.time()
                self.iter_dt, self.iter_time = now - self.iter_time, now

                # what to report and keep; nothing above waits for a GPU
                done = self.iter_num == config.max_iters
                stop = self._agree(interrupts.received)
                if _due(config.log_interval, self.iter_num, done or self.iter_num == 1):
                    self._check_finite()
                    seconds = time.monotonic() - logged_time
                    self.elapsed += seconds
                    self._log(lr, seconds / (self.iter_num - logged_iter), targets)
                    logged_iter, logged_time = self.iter_num, time.monotonic()
                paused = time.monotonic()
                if self.val_dataset is not None and _due(config.eval_interval, self.iter_num, done):
                    self._evaluate_and_keep_best()
                if config.work_dir and (_due(config.checkpoint_interval, self.iter_num, done) or done or stop):
                    self._check_finite()
                    self.save_checkpoint(self._path("checkpoint.pt"))
                logged_time += time.monotonic() - paused # neither is a part of the speed
                self.iter_time = time.time()
                if stop:
                    interrupts.leave(f"stopped after step {self.iter_num}" + (
                        f"; {self._path('checkpoint.pt')} is saved, go on with --trainer.resume=True" if config.work_dir else ""))
        self.trigger_callbacks("on_train_end")

    def learning_rate(self, iteration: int) -> float:
        """The rate of a step: linear rise over warmup_iters, then constant, or a fall until lr_decay_iters to min_lr.

        GPT-3 (Brown et al. 2020, appendix B) falls in cosine form to a tenth of learning_rate.
        """
        config = self.config
        if iteration < config.warmup_iters:
            return config.learning_rate * (iteration + 1) / config.warmup_iters
        if config.lr_decay_iters is None:
            return config.learning_rate
        share = min(1.0, (iteration - config.warmup_iters) / max(1, config.lr_decay_iters - config.warmup_iters))
        height = 0.5 * (1 + math.cos(math.pi * share)) if config.schedule == "cosine" else 1 - share
        return config.min_lr + height * (config.learning_rate - config.min_lr)

    def _batches(self, first_iter: int):
        """Endless (x, y) on the device, one micro-batch at a time: those of step i depend on the seed and i alone."""
        config, pin = self.config, self.device_type == "cuda"
        micro_size = config.batch_size // self.world_size // config.grad_accum_steps
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=_Draws(len(self.train_dataset), config, self.seed, first_iter, self.rank, micro_size),
            num_workers=config.num_workers, collate_fn=_collate, pin_memory=pin,
            generator=torch.Generator(), # so that the loader draws nothing from the global one
        )
        for batch in loader:
            yield [part.to(self.device, non_blocking=pin) for part in batch]

    def _autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.dtype)

    @torch.no_grad()
    def evaluate(self, dataset, max_batches: int | None = None) -> float:
        """The mean loss over the examples of a dataset, or over max_batches batches spread evenly through it.

        All processes must call it; each takes a share.
        """
        size = len(dataset)
        if size == 0:
            raise ValueError("there is no example to evaluate")
        count = size if max_batches is None else min(size, max_batches * self.config.batch_size)
        chosen = np.linspace(0, size - 1, count).astype(int)[self.rank::self.world_size] # all, if count is size
        micro_size = max(1, self.config.batch_size // self.config.grad_accum_steps // self.world_size)
        batches = [chosen[i:i + micro_size].tolist() for i in range(0, len(chosen), micro_size)]
        total = torch.zeros(2, dtype=torch.float64) # sum of losses, number of examples
        progress = Progress("evaluating", len(chosen), unit="examples")
        with eval_mode(self.model):
            for batch in DataLoader(dataset, batch_sampler=batches, collate_fn=_collate, generator=torch.Generator()):
                x, y = (part.to(self.device) for part in batch)
                with self._autocast():
                    _, loss = self.model(x, y)
                total += torch.tensor([loss.item() * len(x), len(x)], dtype=torch.float64)
                if self.rank == 0:
                    progress.update(int(total[1]))
        if self.world_size > 1:
            dist.all_reduce(total, group=self.host_group)
        return (total[0] / total[1]).item()

    def _evaluate_and_keep_best(self) -> None:
        self.val_loss = self.evaluate(self.val_dataset, self.config.eval_batches)
        self._say(f"step {self.iter_num:>7}  validation loss {self.val_loss:.4f}")
        self.write_metrics(split="val", loss=self.val_loss)
        if self.val_loss < self.best_loss:
            self.best_loss = self.val_loss
            if self.config.keep_best:
                self.save_checkpoint(self._path("best.pt"))
        self.trigger_callbacks("on_eval_end")

    def _agree(self, stop: bool) -> bool:
        """Whether any process was told to stop: all must do so after the same step."""
        if self.world_size == 1:
            return stop
        flag = torch.tensor(int(stop))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.host_group)
        return bool(flag)

    def _check_finite(self) -> None:
        bad = not math.isfinite(self.loss) or (self.dtype != torch.float16 and not math.isfinite(self.grad_norm))
        if self._agree(bad): # a float16 gradient may overflow: the scaler skips that step
            raise ValueError(f"the loss is {float(self.loss)}, the gradient norm {float(self.grad_norm)} at step {self.iter_num}: "
                             "training has diverged. Try a lower learning_rate, more warmup_iters or a smaller grad_norm_clip. "
                             "The last checkpoint is from before, if there is one")

    # -----------------------------------------------------------------------------
    # reports and checkpoints

    def _path(self, name: str) -> Path:
        return Path(self.config.work_dir) / name

    def _say(self, message: str) -> None:
        if self.rank == 0:
            logger.info(message)

    def _log(self, lr: float, seconds_per_step: float, targets: int) -> None:
        """One line for people, one row for metrics.jsonl."""
        loss = self.loss
        if self.world_size > 1:
            loss = self.loss.float().clone()
            dist.all_reduce(loss)
            loss /= self.world_size
        loss, rate = float(loss), targets / seconds_per_step
        left = ""
        if self.config.max_iters:
            left = f"  {format_time((self.config.max_iters - self.iter_num) * seconds_per_step)} left"
        self._say(f"step {self.iter_num:>7}  loss {loss:.4f}  lr {lr:.2e}  {1000 * seconds_per_step:8.2f} ms  "
                  f"{rate:>9,.0f} tokens/s{left}")
        self.write_metrics(split="train", loss=loss, lr=lr, grad_norm=float(self.grad_norm), tokens_per_second=round(rate),
                            seconds=round(self.elapsed, 3))

    def write_metrics(self, **row) -> None:
        """Adds a row to metrics.jsonl in work_dir, if there is one; callbacks may add their own."""
        if self.config.work_dir and self.rank == 0:
            self._path("").mkdir(parents=True, exist_ok=True)
            line = json.dumps({"iteration": self.iter_num, **row}) + "\n"
            with open(self._path("metrics.jsonl"), "ab", buffering=0) as file:
                file.write(line.encode("utf-8")) # in one system call, so that a crash leaves all of it or nothing

    def save_checkpoint(self, path: str | Path) -> None:
        """Writes all that the run needs to go on to one file, which replaces an older one only when it is whole.

        All processes must call it; the first writes.
        """
        states = [_get_random_state()]
        if self.world_size > 1:
            states *= self.world_size
            dist.all_gather_object(states, _get_random_state(), group=self.host_group)
        if self.rank == 0:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            checkpoint = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                              iter_num=self.iter_num, best_loss=self.best_loss, elapsed=self.elapsed, seed=self.seed,
                              random_states=states, config=json.loads(json.dumps(self.config.to_dict(), default=str)))
            with replacing(path) as part:
                torch.save(checkpoint, part)

    def load_checkpoint(self, path: str | Path) -> None:
        """Takes up a run where save_checkpoint left it; run() goes on from there.

        Raises ValueError for a checkpoint of another model, naming what differs, with nothing changed.
        """
        if not Path(path).is_file():
            raise ValueError(f"there is no checkpoint at {path}; start without resume, or check work_dir")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_same_tensors(checkpoint["model"], self.model.state_dict(), path)
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.iter_num = self._first_iter = checkpoint["iter_num"]
        self.best_loss, self.elapsed, self.seed = checkpoint["best_loss"], checkpoint["elapsed"], checkpoint["seed"]
        if self.rank < len(checkpoint["random_states"]): # there may be more processes now
            _set_random_state(checkpoint["random_states"][self.rank])
        if self.config.work_dir and self.rank == 0 and self._path("metrics.jsonl").exists():
            rows = self._path("metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            rows = [row for row in rows if row.endswith("}\n") and json.loads(row)["iteration"] <= self.iter_num]
            with replacing(self._path("metrics.jsonl")) as part: # without the steps that will be taken again
                part.write_text("".join(rows), encoding="utf-8")
        self._say(f"going on from {path} after step {self.iter_num}")

# -----------------------------------------------------------------------------

class _Draws:
    """The examples of every micro-batch of this process: step i draws batch_size of them, with replacement, from (seed, i)."""

    def __init__(self, dataset_size, config, seed, first_iter, rank, micro_size):
        self.dataset_size, self.config, self.seed, self.first_iter = dataset_size, config, seed, first_iter
        self.rank, self.micro_size = rank, micro_size

    def __iter__(self):
        i = self.first_iter
        while True:
            drawn = np.random.default_rng((self.seed, i)).integers(self.dataset_size, size=self.config.batch_size)
            shares = drawn.reshape(self.config.grad_accum_steps, -1, self.micro_size) # (accumulation, processes, micro-batch)
            yield from shares[:, self.rank].tolist()
            i += 1

def _collate(batch):
    """Examples to a batch; the __getitems__ of a dataset may have built the batch, a tuple of tensors, already."""
    return batch if isinstance(batch, tuple) else torch.utils.data.default_collate(batch)

def _due(interval: int, iteration: int, last: bool) -> bool:
    return interval > 0 and (last or iteration % interval == 0)

class _Interrupts:
    """While it is open, Ctrl-C and SIGTERM are noted for the loop to act on; one more, a second later, is obeyed at once."""

    def __enter__(self):
        self.received, self.time, self.before = 0, math.inf, {}
        with contextlib.suppress(ValueError): # signals belong to the main thread; in another one there are none to note
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        if time.monotonic() > self.time + 1: # under torchrun the same Ctrl-C comes twice, from the terminal and from torchrun
            self.leave("stopped within a step")
        if not self.received:
            self.received, self.time = number, time.monotonic()

    def leave(self, message: str) -> None:
        logger.info(message)
        raise KeyboardInterrupt(message) if self.received == signal.SIGINT else SystemExit(128 + signal.SIGTERM)

def _get_random_state() -> dict:
    """The state of every generator, in types that torch.load(weights_only=True) reads."""
    name, keys, *rest = np.random.get_state()
    return dict(python=random.getstate(), numpy=(name, keys.tolist(), *rest), torch=torch.get_rng_state(),
                cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None)

def _set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

def _check_same_tensors(saved: dict, own: dict, path) -> None:
    differing = [name for name in sorted(saved.keys() | own.keys())
                 if name not in saved or name not in own or saved[name].shape != own[name].shape]
    if differing:
        shape = lambda state, name: tuple(state[name].shape) if name in state else "nothing"
        lines = [f"{name}: {shape(saved, name)} in the file, {shape(own, name)} in the model" for name in differing[:5]]
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(f"{path} is a checkpoint of another model: {'; '.join(lines)}{more}")
