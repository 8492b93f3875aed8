"""
A training loop for any torch module whose forward(x, y) returns (output, loss). It knows nothing of GPT.

    config = Trainer.get_default_config()
    config.max_iters = 1000
    trainer = Trainer(config, model, train_dataset)         # a dataset of pairs (x, y)
    trainer.add_callback('on_batch_end', lambda trainer: print(trainer.iter_num, trainer.loss.item()))
    trainer.run()

    torchrun --nproc_per_node=2 SCRIPT.py                   # the same script on two GPUs, or in two CPU processes
"""

import atexit
import contextlib
import itertools
import json
import math
import os
import pickle
import random
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Generator, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from mingpt.utils import FIRST, CfgNode, check_config, eval_mode, logger, naming, progress, replacing

RULES = ( # fields of the configuration, a test of their values, what is expected
    ("batch_size grad_accum_steps", lambda v: v >= 1 and v == int(v), "a whole number from 1 on"),
    ("max_iters eval_batches", lambda v: v is None or v >= 1 and v == int(v), "a whole number from 1 on, or None"),
    ("num_workers", lambda v: 0 <= v <= 256 and v == int(v), "a whole number from 0 to 256"),
    ("warmup_iters log_interval eval_interval checkpoint_interval", lambda v: v >= 0 and v == int(v), "a whole number"),
    ("lr_decay_iters seed", lambda v: v is None or v >= 0 and v == int(v), "a whole number or None"),
    ("learning_rate min_lr weight_decay grad_norm_clip", lambda v: 0 <= v < math.inf, "0 or more"),
    ("betas", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v), "two numbers from 0 to below 1"),
    ("dtype", lambda v: v in ("auto", "float32", "bfloat16", "float16"), "auto, float32, bfloat16 or float16"),
    ("schedule", lambda v: v in ("cosine", "linear"), "cosine or linear"),
)

class Trainer:
    """Trains a model on a dataset; see run() for how."""

    events: tuple[str, ...] = ("on_train_start", "on_batch_end", "on_eval_end", "on_train_end") # subclasses add more

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
        # AdamW; the learning rate warms up to its value, stays there, or decays
        C.learning_rate = 3e-4
        C.warmup_iters = 0 # steps of linear warm-up
        C.lr_decay_iters = None # the step at which the decay ends; None keeps the rate constant
        C.schedule = "cosine" # the form of the decay: 'cosine' or 'linear'
        C.min_lr = 0.0 # at the end of the decay
        C.betas = (0.9, 0.95)
        C.weight_decay = 0.1 # only on what the model's configure_optimizers chooses
        C.grad_norm_clip = 1.0 # longer gradients are shortened to this; 0 turns it off
        # what to report and keep
        C.log_interval = 100 # steps between log lines; 0 turns them off
        C.eval_interval = 0 # steps between evaluations on the validation dataset; 0 turns them off
        C.eval_batches = None # batches per evaluation; None takes the whole dataset
        C.work_dir = "" # folder for metrics.jsonl and checkpoints; empty writes nothing
        C.checkpoint_interval = 0 # steps between checkpoints; 0 saves one at the end only
        C.keep_best = False # also keep best.pt, the checkpoint of the lowest validation loss
        C.resume = False # continue from the checkpoint in work_dir
        return C

    def __init__(self, config: CfgNode, model: torch.nn.Module, train_dataset, val_dataset=None):
        """Moves the model to its device and, with config.resume, loads the checkpoint. ValueError for bad settings."""
        for name, value in vars(self.get_default_config()).items():
            if not hasattr(config, name): # a configuration made by hand may lack some
                setattr(config, name, value)
        check_config(config, RULES)
        self.config, self.model = config, model
        self.train_dataset, self.val_dataset = train_dataset, val_dataset
        self.callbacks: dict[str, list[Callable]] = {event: [] for event in self.events}
        self._folder = Path(config.work_dir or ".")
        self._find_place()
        self.model.to(self.device)
        if configure := getattr(model, "configure_optimizers", None):
            self.optimizer = configure(config)
        else:
            self.optimizer = torch.optim.AdamW(
                model.parameters(), config.learning_rate, config.betas, weight_decay=config.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=self.dtype == torch.float16)
        self.seed = torch.initial_seed() if config.seed is None else config.seed
        if self.rank > 0:
            torch.manual_seed(self.seed + self.rank) # each process drops out other units

        self.iter_num = 0 # the number of this step, from 0; between steps, how many are done
        self.iter_time = 0.0 # when the last step ended, in seconds
        self.iter_dt = 0.0 # how long it took, in seconds
        self.loss = torch.zeros(()) # its mean loss
        self.grad_norm = torch.zeros(()) # the length of its gradient before clipping
        self.val_loss: float | None = None # of the last evaluation
        self.best_loss = math.inf # of all evaluations
        self.elapsed = 0.0 # seconds of training, those before a resume included
        self._in_step = False # is step iter_num under way?
        self._first_iter = 0 # where the next run() begins
        if config.resume:
            self.load_checkpoint(self._folder / "checkpoint.pt")

    def _find_place(self) -> None:
        """Settles the device, the precision and the part of the batch that this process takes."""
        config = self.config
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = config.device
        if config.device == "auto":
            self.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        if self.world_size > 1 and self.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) # each process has a GPU
        try:
            probe = torch.zeros(1, device=self.device)
            probe.item() # fails on 'meta', which holds no numbers
        except (RuntimeError, AssertionError, ImportError):
            raise ValueError(f"got device={self.device!r}, which is not here; 'auto' takes what there is") from None
        self.device_type = probe.device.type
        has_bfloat16 = self.device_type == "cuda" and torch.cuda.is_bf16_supported()
        self.dtype = getattr(torch, config.dtype.replace("auto", "bfloat16" if has_bfloat16 else "float32"))
        if config.batch_size % (parts := self.world_size * config.grad_accum_steps):
            raise ValueError(f"got batch_size={config.batch_size}, expected a multiple of {parts}: {self.world_size} "
                             f"process(es), grad_accum_steps={config.grad_accum_steps}")
        if len(self.train_dataset) == 0:
            raise ValueError("the training dataset is empty")
        if (config.resume or config.keep_best) and not config.work_dir:
            raise ValueError("resume and keep_best need a work_dir")
        if self.world_size > 1:
            if not dist.is_initialized():
                from torch import _dynamo # DistributedDataParallel loads it; later, it would keep the group alive
                dist.init_process_group() # gloo between processors, nccl between GPUs
                atexit.register(dist.destroy_process_group) # ends its threads, which must not outlive Python
        logger.info(f"running on {self.device} in {str(self.dtype).removeprefix('torch.')}")

    def _sum(self, number: float) -> float: # over all processes
        if self.world_size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def add_callback(self, onevent: str, callback: Callable) -> None:
        """Calls callback(trainer) at an event, after the callbacks added before."""
        self._callbacks_at(onevent).append(callback)

    def set_callback(self, onevent: str, callback: Callable) -> None:
        """Calls callback(trainer) at an event, instead of the callbacks added before."""
        self._callbacks_at(onevent)[:] = [callback]

    def trigger_callbacks(self, onevent: str) -> None:
        for callback in self._callbacks_at(onevent):
            callback(self)

    def _callbacks_at(self, onevent: str) -> list[Callable]:
        if onevent not in self.events:
            raise ValueError(f"there is no event {onevent!r}; the events are {', '.join(self.events)}")
        return self.callbacks[onevent]

    def run(self) -> None:
        """Trains for max_iters steps, or from the checkpoint on if one was loaded."""
        network = self._begin()
        self.trigger_callbacks("on_train_start")
        self._logged_iter, self._logged_time = self.iter_num, time.time() # of the last log line
        self.iter_time = time.time()
        with _noting_signals() as signals, contextlib.closing(self._draw_batches(self.iter_num)) as self._batches:
            while self.config.max_iters is None or self.iter_num < self.config.max_iters:
                self._in_step = True
                self._step(network)
                self.trigger_callbacks("on_batch_end")
                self._in_step = False
                self.iter_num += 1
                self.iter_dt, self.iter_time = time.time() - self.iter_time, time.time()

                done = self.iter_num == self.config.max_iters
                stop = self._sum(len(signals)) > 0 # all processes stop after the same step
                if self._due("log", done or self.iter_num == 1):
                    self._report()
                if self.val_dataset is not None and self._due("eval", done):
                    self._evaluate_and_keep_best()
                if self.config.work_dir and (done or stop or self._due("checkpoint", done)):
                    self._check_finite()
                    self.save_checkpoint(self._folder / "checkpoint.pt")
                self._logged_time += time.time() - self.iter_time # what came after the step is no part of its speed
                self.iter_time = time.time()
                if stop:
                    end = "; the checkpoint is saved, --trainer.resume=True continues" if self.config.work_dir else ""
                    logger.info(f"stopped after step {self.iter_num}{end}")
                    interrupted = signals and signals[0][0] == signal.SIGINT
                    raise KeyboardInterrupt if interrupted else SystemExit(128 + signal.SIGTERM)
        self._sum(0) # no process leaves while others still save
        self.trigger_callbacks("on_train_end")

    def _due(self, what: str, last: bool) -> bool:
        interval = getattr(self.config, f"{what}_interval")
        return interval > 0 and (last or self.iter_num % interval == 0)

    def _begin(self) -> Callable: # what computes a step; run alone holds it, since it holds the process group
        self.iter_num, self._first_iter = self._first_iter, 0
        if self.config.work_dir and FIRST and self.iter_num == 0:
            for name in ("checkpoint.pt", "best.pt", "metrics.jsonl"): # of an earlier run, which is not to be resumed
                if (self._folder / name).exists():
                    os.replace(self._folder / name, self._folder / f"{name}.old")
        self.model.train()
        network = self.model
        if self.world_size > 1:
            network = torch.nn.parallel.DistributedDataParallel(network)
        return torch.compile(network) if self.config.compile else network

    def _step(self, network: Callable) -> None:
        """A step along the gradient of the mean loss of a batch, computed micro-batch by micro-batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.iter_num)
        batches = [next(self._batches) for _ in range(self.config.grad_accum_steps)]
        counts = [_count_targets(y) for x, y in batches]
        self._targets = sum(y.numel() for x, y in batches) * self.world_size
        total = self._sum(sum(counts))
        self.loss, self.grad_norm = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        if total == 0:
            return # nothing to learn from
        no_sync = getattr(network, "no_sync", contextlib.nullcontext)
        for i, ((x, y), count) in enumerate(zip(batches, counts), start=1):
            with no_sync() if i < len(batches) else contextlib.nullcontext(): # the last one averages over processes
                loss = self._compute(network, x, y)[1] # the output is not kept: it may be large
                loss = loss * (self.world_size * count / total) # its share of the mean over all targets of the step
                self.scaler.scale(loss).backward()
            if count: # a module may call the mean of nothing NaN
                self.loss = self.loss + loss.detach()
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_norm_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _compute(self, network: Callable, x: torch.Tensor, y: torch.Tensor) -> tuple:
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        with contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device_type, self.dtype):
            return network(x, y)

    def learning_rate(self, iteration: int) -> float:
        """The rate of a step: linear warm-up, then constant or decaying (GPT-3, Brown et al. 2020, appendix B)."""
        config = self.config
        if iteration < config.warmup_iters:
            return config.learning_rate * (iteration + 1) / config.warmup_iters
        if config.lr_decay_iters is None:
            return config.learning_rate
        share = min(1.0, (iteration - config.warmup_iters) / max(1, config.lr_decay_iters - config.warmup_iters))
        height = 0.5 * (1 + math.cos(math.pi * share)) if config.schedule == "cosine" else 1 - share
        return config.min_lr + height * (config.learning_rate - config.min_lr)

    def _draw_batches(self, first_iter: int) -> Generator:
        """Endless (x, y), one micro-batch at a time: those of step i depend on the seed and i alone."""
        size, total, steps = len(self.train_dataset), self.config.batch_size, self.config.grad_accum_steps
        def draw() -> Iterator[list[int]]:
            for i in itertools.count(first_iter):
                drawn = np.random.default_rng((self.seed, i)).integers(size, size=total) # of all processes
                yield from drawn.reshape(steps, self.world_size, -1)[:, self.rank].tolist() # (steps, examples)
        yield from self._loader(self.train_dataset, draw(), self.config.num_workers)

    def _loader(self, dataset, batches, num_workers: int = 0) -> DataLoader:
        return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, worker_init_fn=_ignore_signals,
                          collate_fn=_collate, pin_memory=self.device_type == "cuda",
                          generator=torch.Generator()) # so that it draws nothing from the global one

    @torch.no_grad()
    def evaluate(self, dataset, max_batches: int | None = None) -> float:
        """The mean loss over a dataset, or over max_batches batches spread evenly through it; all processes call it."""
        if (size := len(dataset)) == 0:
            raise ValueError("there is no example to evaluate")
        count = size if max_batches is None else min(size, max_batches * self.config.batch_size)
        chosen = np.linspace(0, size - 1, count).astype(int)[self.rank::self.world_size] # all, if count is size
        micro_size = max(1, self.config.batch_size // self.config.grad_accum_steps // self.world_size)
        batches = [chosen[i:i + micro_size].tolist() for i in range(0, len(chosen), micro_size)]
        total, counted = 0.0, 0
        with eval_mode(self.model):
            for x, y in progress(self._loader(dataset, batches), "evaluating", len(batches)):
                if n := _count_targets(y):
                    total += self._compute(self.model, x, y)[1].item() * n
                    counted += n
        return self._sum(total) / max(1, self._sum(counted))

    def _evaluate_and_keep_best(self) -> None:
        self.val_loss = self.evaluate(self.val_dataset, self.config.eval_batches)
        logger.info(f"step {self.iter_num:>7}  validation loss {self.val_loss:.4f}")
        self.write_metrics(split="val", loss=self.val_loss)
        if self.val_loss < self.best_loss:
            self.best_loss = self.val_loss
            if self.config.keep_best:
                self.save_checkpoint(self._folder / "best.pt")
        self.trigger_callbacks("on_eval_end")

    def _check_finite(self) -> None:
        bad = not math.isfinite(self.loss) or (self.dtype != torch.float16 and not math.isfinite(self.grad_norm))
        if self._sum(bad): # a float16 gradient may overflow: the scaler skips that step
            raise ValueError(f"the loss is {float(self.loss)}, the gradient norm {float(self.grad_norm)} at step "
                             f"{self.iter_num}; try a lower learning_rate or grad_norm_clip, or more warmup_iters")

    def _report(self) -> None:
        """One line for people, one row for metrics.jsonl."""
        self._check_finite()
        seconds, steps = time.time() - self._logged_time, self.iter_num - self._logged_iter
        self._logged_iter, self._logged_time = self.iter_num, time.time()
        self.elapsed += seconds
        loss, rate = self._sum(float(self.loss)) / self.world_size, self._targets * steps / seconds
        lr, left = self.learning_rate(self.iter_num - 1), ""
        if self.config.max_iters:
            left = f"  {timedelta(seconds=round((self.config.max_iters - self.iter_num) * seconds / steps))} left"
        logger.info(f"step {self.iter_num:>7}  loss {loss:.4f}  lr {lr:.2e}  {1000 * seconds / steps:8.2f} ms  "
                    f"{rate:>9,.0f} tokens/s{left}")
        self.write_metrics(split="train", loss=loss, lr=lr, grad_norm=float(self.grad_norm),
                           tokens_per_second=round(rate), seconds=round(self.elapsed, 3))

    def write_metrics(self, **row) -> None:
        """Adds a row to metrics.jsonl in work_dir, if there is one; callbacks may add their own."""
        if self.config.work_dir and FIRST:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / "metrics.jsonl"
            with naming(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": self.iter_num + self._in_step, **row}) + "\n")

    def save_checkpoint(self, path: str | Path) -> None:
        """Writes all that the run needs to go on to one file; the first process writes, but all must call it."""
        states = [self._random_state()]
        if self.world_size > 1:
            states *= self.world_size
            dist.all_gather_object(states, self._random_state())
        if FIRST:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            checkpoint = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                              scaler=self.scaler.state_dict(), iter_num=self.iter_num, best_loss=self.best_loss,
                              elapsed=self.elapsed, random_states=states, **self._settings())
            with replacing(path) as part, open(part, "wb") as file:
                torch.save(checkpoint, file)

    def _settings(self) -> dict:
        """The settings of now, for comparison with those of a checkpoint."""
        config = {name: getattr(self.config, name) for name in vars(self.get_default_config())}
        own = vars(self.config).items() # a script may have settings of its own
        config |= {name: value for name, value in own if isinstance(value, str | int | float | None)}
        config["seed"] = self.seed
        groups = [[len(group["params"]), *sorted(group)] for group in self.optimizer.param_groups]
        return dict(config=json.loads(json.dumps(config, default=str)), groups=groups)

    def load_checkpoint(self, path: str | Path) -> None:
        """Goes back to where save_checkpoint was called; run() continues from there, with the settings of now.

        ValueError, with nothing changed, for a checkpoint of another model or optimizer.
        """
        checkpoint, now = read_checkpoint(path), self._settings()
        then, done = checkpoint["config"], checkpoint["iter_num"]
        _check_same_model(checkpoint["model"], self.model.state_dict(), path)
        if checkpoint["groups"] != now["groups"]:
            raise ValueError(f"{path} was written with another optimizer; resume with the one that it has")
        if bool(checkpoint["scaler"]) != self.scaler.is_enabled():
            raise ValueError(f"{path} has dtype={then['dtype']}, now it is {self.config.dtype}; take the same")
        if self.config.resume and done >= (self.config.max_iters or math.inf):
            raise ValueError(f"{path} has {done} steps already and max_iters={self.config.max_iters}; raise it")
        groups = [group.copy() for group in self.optimizer.param_groups]
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group, new in zip(self.optimizer.param_groups, groups):
            group.update({key: new[key] for key in ("betas", "momentum", "weight_decay") if key in new})
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.iter_num = self._first_iter = done
        self.best_loss, self.elapsed = checkpoint["best_loss"], checkpoint["elapsed"]
        if self.seed == then["seed"] and self.rank < len(checkpoint["random_states"]): # there may be more processes now
            self._set_random_state(checkpoint["random_states"][self.rank])
        logger.info(f"going on from {path} after step {done}")
        for name, value in now["config"].items():
            if name != "resume" and then.get(name, value) != value:
                logger.info(f"{name} was {then[name]}, is {value}")
        metrics = self._folder / "metrics.jsonl"
        if self.config.work_dir and FIRST and metrics.exists():
            rows = metrics.read_bytes().splitlines(keepends=True)
            with replacing(metrics) as part: # without the steps that will be taken again
                part.write_bytes(b"".join(row for row in rows if _is_row(row, done)))

    def _random_state(self) -> dict:
        """The state of every generator, in types that torch.load(weights_only=True) reads."""
        numpy = [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]
        state = dict(python=random.getstate(), numpy=numpy, cpu=torch.get_rng_state())
        if self.device_type != "cpu":
            state[self.device_type] = torch.get_device_module(self.device_type).get_rng_state()
        return state

    def _set_random_state(self, state: dict) -> None:
        random.setstate(state["python"])
        np.random.set_state(tuple(state["numpy"]))
        torch.set_rng_state(state["cpu"])
        if self.device_type != "cpu" and self.device_type in state:
            torch.get_device_module(self.device_type).set_rng_state(state[self.device_type])

def _count_targets(y: torch.Tensor) -> int:
    """How many targets count: all but the integers -1."""
    return y.numel() if y.is_floating_point() else int((y != -1).sum())

def _collate(batch):
    """Examples to a batch, unless the __getitems__ of the dataset has built it: a tuple of tensors."""
    return batch if isinstance(batch, tuple) else torch.utils.data.default_collate(batch)

def _ignore_signals(worker: int) -> None:
    """For processes that load data: the trainer needs them until it has finished its step, and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

@contextlib.contextmanager
def _noting_signals():
    """Yields a list that notes Ctrl-C and SIGTERM, for the loop to finish its step; a second one ends it at once."""
    received, before = [], {}

    def note(number, _frame):
        if received and time.monotonic() > received[0][1] + 1: # torchrun passes Ctrl-C on, so it comes twice
            raise KeyboardInterrupt
        received.append((number, time.monotonic()))

    if threading.current_thread() is threading.main_thread(): # the others get no signals
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def read_checkpoint(path: str | Path) -> dict:
    """What save_checkpoint wrote, with its tensors on the CPU; ValueError for a missing, damaged or other file."""
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint at {path}; start without resume, or check work_dir")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip(): # compares checksums, which torch.load does not
                raise ValueError(f"its part {damaged} has changed")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError: # torch's text advises to load the file without its guard
        raise ValueError(f"{path} is no checkpoint: it holds more than tensors and plain values") from None
    except Exception as error: # each library has errors of its own for a broken file
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from None
    if not isinstance(checkpoint, dict) or "groups" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of this trainer")
    return checkpoint

def _check_same_model(saved: dict, own: dict, path: str | Path) -> None:
    """Raises ValueError unless both have the same names, shapes, and values of what is no tensor."""
    saved, own = ({name: tuple(value.shape) if isinstance(value, torch.Tensor) else value
                   for name, value in state.items()} for state in (saved, own))
    if differing := sorted(name for name in {*saved, *own} if saved.get(name) != own.get(name)):
        name = differing[0]
        there, here = (str(state.get(name, "nothing"))[:80] for state in (saved, own))
        raise ValueError(f"{path} is a checkpoint of another model: {name}: {there} in the file, {here} in the model, "
                         f"and {len(differing) - 1} more")

def _is_row(line: bytes, iter_num: int) -> bool:
    """Whether a line of metrics.jsonl is whole, and of the first iter_num steps."""
    try:
        return line.endswith(b"\n") and json.loads(line)["iteration"] <= iter_num
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
