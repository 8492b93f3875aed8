"""
A training loop for any torch module whose forward(x, y) returns (output, loss).

    config = Trainer.get_default_config()
    config.max_iters = 1000
    trainer = Trainer(config, model, train_dataset)         # a dataset of pairs (x, y)
    trainer.set_callback("on_batch_end", lambda trainer: print(trainer.loss.item()))
    trainer.run()

It knows nothing of GPT and writes no file. Run in run.py is a Trainer that also
validates, reports, saves and resumes.
"""

import contextlib
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mingpt import processes
from mingpt.data import count_examples, draw_examples, load_batches
from mingpt.utils import CN, check_config, fill_in, logger


class Trainer:
    """Trains a module on a dataset.

    A callback of on_batch_end finds iter_num, the number of the step, from 0; loss, its mean
    loss; grad_norm, the length of its gradient before clipping; iter_dt, the seconds that
    the step before took. Between two steps iter_num is steps_done.
    """

    @staticmethod
    def get_default_config() -> CN:
        C = CN()
        # How to compute.
        C.device = "auto"  # takes cuda, else mps, else cpu; or any device of torch
        C.dtype = "auto"  # takes bfloat16 on a GPU that has it, else float32; or float16
        C.compile = False  # torch.compile: a minute at the start, faster from there
        C.num_workers = 0  # processes that prepare batches; 0 prepares them in this one
        # What to learn from.
        C.max_iters = None  # steps; None goes on until stopped
        C.batch_size = 64  # examples in a step, over all processes and micro-batches
        C.grad_accum_steps = 1  # micro-batches that a batch is cut into, to save memory
        C.seed = None  # of the examples drawn; None takes a new one for each run
        C.replacement = True  # False shows every example once before any comes again
        # The optimizer.
        C.optimizer = "adamw"  # 'adamw', or 'muon' for the matrices of a GPT's blocks
        C.momentum = 0.95  # of Muon
        C.learning_rate = 3e-4  # the highest of the run
        C.schedule = "constant"  # of the learning rate: 'constant', 'cosine' or 'linear'
        C.warmup_iters = 0  # steps in which the learning rate rises to its value
        C.lr_decay_iters = None  # step at which the decay ends; None is max_iters
        C.min_lr = 0.0  # learning rate at the end of the decay
        C.betas = (0.9, 0.95)  # of AdamW
        C.weight_decay = 0.1  # only on what configure_optimizers chooses
        C.grad_norm_clip = 1.0  # longer gradients are shortened to this; 0 turns it off
        return C

    def __init__(self, config: CN, model: nn.Module, train_dataset: Any):
        """Moves the model to its device. Settings that `config` lacks get their default.

        Raises ValueError for a setting that does not fit.
        """
        # A subclass may have defaults of its own, but not all of these.
        defaults = vars(Trainer.get_default_config()) | vars(self.get_default_config())
        owner = "Trainer (see Run)" if type(self) is Trainer else type(self).__name__
        fill_in(config, defaults, owner)
        self.config = config
        check_config(config, RULES)

        if config.min_lr > config.learning_rate:
            raise ValueError(f"got min_lr={config.min_lr}, expected at most "
                             f"learning_rate={config.learning_rate}")
        end = self.decay_end()
        if config.schedule != "constant" and not config.warmup_iters <= end < math.inf:
            raise ValueError(f"got schedule={config.schedule!r} that ends at step {end}, expected "
                             "a max_iters or lr_decay_iters from warmup_iters on")

        self.device = processes.choose_device(config.device)
        self.device_type = torch.device(self.device).type
        self.dtype = processes.choose_dtype(config.dtype, self.device_type)
        processes.connect()
        self.rank = processes.rank()
        self.world_size = processes.world_size()

        parts = self.world_size * config.grad_accum_steps
        if config.batch_size % parts:
            raise ValueError(f"got batch_size={config.batch_size}, expected a multiple of {parts}, "
                             "the number of processes times grad_accum_steps")

        self.train_dataset = train_dataset
        self.model: Any = model.to(self.device)
        logger.info(f"running on device {self.device}")

        self.callbacks: dict[str, list[Callable]] = defaultdict(list)
        # run() makes it.
        self.optimizer: Any = None
        # In float16 the loss is scaled, so that small gradients do not vanish.
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=self.dtype == torch.float16)
        self.steps_done = 0
        self.iter_num = 0
        self.iter_time = 0.0
        self.iter_dt = 0.0
        self.loss = torch.zeros(())
        self.grad_norm = torch.zeros(())
        self.seed = 0 if config.seed is None else int(config.seed)
        self.runs_done = 0
        self.is_stopping = False
        # Tells whether the next run() continues an earlier run.
        self.goes_on = False
        # Tells whether the earlier run was under a schedule or in its warm-up.
        self.has_schedule = False

    def add_callback(self, onevent: str, callback: Callable) -> None:
        """Calls callback(trainer) at an event, after the callbacks added before."""
        self.callbacks[onevent].append(callback)

    def set_callback(self, onevent: str, callback: Callable) -> None:
        """Calls callback(trainer) at an event, instead of the callbacks added before."""
        self.callbacks[onevent] = [callback]

    def trigger_callbacks(self, onevent: str) -> None:
        for callback in self.callbacks.get(onevent, []):
            callback(self)

    def run(self) -> None:
        """Trains for max_iters steps. A run that Ctrl-C interrupted goes on where it was.

        Raises ValueError for a dataset without examples.
        """
        self.begin()
        network = self.make_network()
        try:
            self.trigger_callbacks("on_train_start")
            # However the run ends, workers that prepare batches end with it.
            with contextlib.closing(self.draw_batches()) as batches:
                while not self.is_done():
                    start = time.perf_counter()
                    self.step(network, next(batches))
                    self.trigger_callbacks("on_batch_end")
                    # A callback may end the run by a high iter_num.
                    if self.iter_num >= self.step_limit():
                        self.stop()
                    self.iter_num = self.steps_done
                    self.iter_dt = time.perf_counter() - start
                    self.iter_time = time.time()
                    self.after_step()
        except KeyboardInterrupt:
            self.goes_on = True
            self.has_schedule = is_scheduled(vars(self.config), self.steps_done)
            logger.info(f"interrupted after step {self.steps_done}; run() goes on from there")
            raise

        processes.barrier()
        self.runs_done += 1
        self.trigger_callbacks("on_train_end")

    def begin(self) -> None:
        """Makes the optimizer, and goes on with an earlier run or chooses a seed for a new one."""
        count_examples(self.train_dataset)
        before = self.optimizer
        self.optimizer = self.make_optimizer()

        if self.goes_on:
            carry_over(before, self.optimizer, keeps_rates=not self.has_schedule)
            logger.info(f"going on after step {self.steps_done}")
        else:
            self.steps_done = 0
            if self.config.seed is None:
                # All processes take the first one's.
                self.seed = processes.gather(int(torch.randint(2**31, ())))[0]
            else:
                self.seed = int(self.config.seed) + self.runs_done
        if self.rank > 0:
            # Dropout differs between processes.
            torch.manual_seed(self.seed + self.rank)

        self.iter_num = self.steps_done
        self.iter_time = time.time()
        self.goes_on = False
        self.is_stopping = False
        self.model.train()

    def make_network(self) -> Callable:
        """Returns the model to call in a step, wrapped for several processes or compiled."""
        network: Any = self.model
        if self.world_size > 1:
            network = nn.parallel.DistributedDataParallel(network)
        if self.config.compile:
            network = torch.compile(network)
        return network

    def make_optimizer(self) -> Any:
        """Makes the optimizer by the model's configure_optimizers, or else AdamW."""
        config = self.config
        if hasattr(self.model, "configure_optimizers"):
            optimizer = self.model.configure_optimizers(config)
        elif config.optimizer == "adamw":
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate,
                                          betas=config.betas, weight_decay=config.weight_decay)
        else:
            raise ValueError(f"got optimizer={config.optimizer!r} for a model without "
                             "configure_optimizers, expected 'adamw'")

        # A schedule multiplies the rate that each group starts with. An object
        # around an optimizer has no groups.
        for group in getattr(optimizer, "param_groups", []):
            group.setdefault("initial_lr", group["lr"])
        return optimizer

    def draw_batches(self) -> Generator[list, None, None]:
        """Yields the batch of each step, as a list of micro-batches (x, y).

        The batch of step i depends on the seed and i alone.
        """
        config = self.config
        # A callback may give the next run another one.
        dataset = self.train_dataset

        def draw() -> Iterator[list[int]]:
            for step in itertools.count(self.steps_done):
                examples = draw_examples(step, self.seed, len(dataset),
                                         config.batch_size, config.replacement)
                # (batch_size,) -> (micro-batches, processes, examples)
                parts = examples.reshape(config.grad_accum_steps, self.world_size, -1)
                yield from parts[:, self.rank].tolist()

        batches = load_batches(dataset, draw(), config.num_workers,
                               pin_memory=self.device_type == "cuda", seed=self.seed)
        while True:
            yield [next(batches) for _ in range(config.grad_accum_steps)]

    def is_done(self) -> bool:
        """Tells whether the run has come to its end."""
        return self.is_stopping or self.steps_done >= self.step_limit()

    def step_limit(self) -> float:
        """Returns how many steps max_iters allows: without a limit if it is None."""
        return math.inf if self.config.max_iters is None else self.config.max_iters

    def stop(self) -> None:
        """Ends the run after this step, as if it were the last one."""
        self.is_stopping = True

    def step(self, network: Callable, micro_batches: list) -> None:
        """Learns from a batch: moves the weights against the gradient of its mean loss."""
        self.set_rates()
        self.model.zero_grad(set_to_none=True)
        self.loss = torch.zeros((), device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)

        # A micro-batch counts by its share of all targets.
        counts = [self.count_targets(y) for _, y in micro_batches]
        total = processes.sum_over_processes(sum(counts))
        if total > 0:
            self.backward(network, micro_batches, [count / total for count in counts])
            # The scaler matters in float16 alone.
            self.scaler.unscale_(self.optimizer)
            clip = self.config.grad_norm_clip
            self.grad_norm = nn.utils.clip_grad_norm_(
                self.model.parameters(), clip if clip > 0 else math.inf)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.steps_done += 1

    def backward(self, network: Any, micro_batches: list, shares: list[float]) -> None:
        """Adds up the gradients of the micro-batches, each by its share of all targets."""
        # A micro-batch without a target is left out. But each process joins the
        # exchange of gradients, which comes with its last backward pass.
        learned = [i for i, share in enumerate(shares) if share > 0]
        if not learned:
            learned = [0]

        for i in learned:
            network.require_backward_grad_sync = i == learned[-1]
            loss = self.compute(network, *micro_batches[i])[1]
            # Processes average their gradients: times world_size it is a sum.
            loss = loss * (self.world_size * shares[i])
            self.scaler.scale(loss).backward()
            # The mean of no target may be NaN.
            if shares[i] > 0:
                self.loss = self.loss + loss.detach()

    def compute(self, network: Callable, x: Tensor, y: Tensor) -> Any:
        """Runs the network on a batch and returns (output, loss)."""
        x = x.to(self.device, non_blocking=True)
        y = y.to(self.device, non_blocking=True)
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32):
            result = network(x, y)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ValueError(f"got a {type(result).__name__} from the model's forward(x, y), "
                             "expected a pair (output, loss)")
        return result

    def count_targets(self, y: Tensor) -> int:
        """Counts the targets of the loss: all, or those that the model's count_targets counts."""
        # A compiled model keeps the original.
        model = getattr(self.model, "_orig_mod", self.model)
        for cls in type(model).__mro__:
            if "count_targets" in vars(cls):
                return int(model.count_targets(y))
            # An inherited count_targets does not know a new forward's loss.
            if "forward" in vars(cls):
                break
        # A loss of x alone has an empty y.
        return max(1, y.numel())

    def decay_end(self) -> float:
        """Returns the step at which the learning rate reaches min_lr."""
        end = self.config.lr_decay_iters
        return self.step_limit() if end is None else end

    def schedule(self, step: int) -> float:
        """Returns the factor on the rates at a step, as for GPT-3 (Brown et al. 2020, app. B)."""
        config = self.config
        warmup = config.warmup_iters
        if step < warmup:
            # A warm-up may end between two steps.
            return min(1.0, (step + 1) / warmup)
        if config.schedule == "constant":
            return 1.0

        share = min(1.0, (step - warmup) / max(1, self.decay_end() - warmup))
        height = 1 - share
        if config.schedule == "cosine":
            height = 0.5 * (1 + math.cos(math.pi * share))
        least = config.min_lr / max(config.learning_rate, 1e-30)
        return least + height * (1 - least)

    def set_rates(self) -> None:
        """Sets the learning rates of this step. Without a schedule they are left alone."""
        if is_scheduled(vars(self.config), self.steps_done):
            for group in self.optimizer.param_groups:
                # A callback may have brought this group.
                rate = group.setdefault("initial_lr", group["lr"])
                group["lr"] = rate * self.schedule(self.steps_done)

    def after_step(self) -> None:
        """Does what comes after each step: here nothing, in Run a lot."""


def is_scheduled(settings: dict, step: int) -> bool:
    """Tells whether the trainer sets the rates of a step: under a schedule and in a warm-up."""
    return settings["schedule"] != "constant" or step < settings["warmup_iters"]


def carry_over(before: Any, optimizer: Any, keeps_rates: bool) -> None:
    """Gives a new optimizer the state of an earlier one, parameter by parameter."""
    # An optimizer of another kind has a state of its own.
    if type(before) is not type(optimizer) or not hasattr(optimizer, "state"):
        return
    parameters = {p for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.update({p: state for p, state in before.state.items() if p in parameters})

    # Some optimizers also count in their groups. Settings stay the new ones.
    settings = ("params", "lr", "initial_lr", "betas", "momentum", "weight_decay")
    for old, new in zip(before.param_groups, optimizer.param_groups):
        new.update({key: value for key, value in old.items() if key not in settings})
        # A rate that a callback has changed goes on, unless the setting is new.
        # A rate that a schedule has reached ends with the schedule.
        if keeps_rates and old.get("initial_lr") == new["initial_lr"]:
            new["lr"] = old["lr"]

    # A scheduler of torch may hold the earlier one: both get the same list.
    before.param_groups[:] = optimizer.param_groups
    optimizer.param_groups = before.param_groups


# Rules for settings: names, test of a value, what the error says is expected.
RULES = (
    ("batch_size grad_accum_steps", lambda v: isinstance(v, int) and v >= 1, "a whole number > 0"),
    ("max_iters lr_decay_iters", lambda v: v is None or v >= 0, "a number from 0 on, or None"),
    ("num_workers", lambda v: isinstance(v, int) and 0 <= v <= 256, "a whole number up to 256"),
    ("seed", lambda v: v is None or v == int(v) >= 0, "a whole number from 0 on, or None"),
    ("learning_rate min_lr weight_decay warmup_iters", lambda v: 0 <= v < math.inf,
     "a finite number from 0 on"),
    ("grad_norm_clip", lambda v: v >= 0, "a number from 0 on"),
    ("betas", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v), "two numbers below 1"),
    ("momentum", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    ("dtype", lambda v: v in ("auto", "float32", "bfloat16", "float16"),
     "auto, float32, bfloat16 or float16"),
    ("schedule", lambda v: v in ("constant", "cosine", "linear"), "constant, cosine or linear"),
)
