"""
The processes of a run: who is first, what they exchange, which device and signals they get.

    torchrun --nproc_per_node=2 SCRIPT.py       # two GPUs, or two processes on a CPU

torchrun starts the same script several times. Each process has a number, its rank,
in the environment variable RANK; WORLD_SIZE says how many there are. Everything here
is read when it is asked for. One process alone needs no exchange.
"""

import atexit
import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

# Ctrl-C, kill and a closed terminal ask for an end. Windows has no SIGHUP.
STOP_SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]


def rank() -> int:
    """Returns the number of this process: 0 for the first, or the only one."""
    return dist.get_rank() if is_connected() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns the number of processes that train together."""
    return dist.get_world_size() if is_connected() else int(os.environ.get("WORLD_SIZE", "1"))


def is_connected() -> bool:
    # Some builds of torch cannot connect processes.
    return dist.is_available() and dist.is_initialized()


def choose_device(name: str) -> str:
    """Returns the device to compute on; "auto" finds one. ValueError if it is not here."""
    device = name
    if name == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")

    try:
        if world_size() > 1 and device == "cuda":
            # Each process of a machine has a GPU of its own.
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # This fails on "meta", which holds no numbers.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"got device={name!r}, which is not here; 'auto' finds one") from None
    return device


def choose_dtype(name: str, device_type: str) -> torch.dtype:
    """Returns the precision to compute in; "auto" is bfloat16 on a GPU that has it itself."""
    if name != "auto":
        return getattr(torch, name)
    if device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def connect() -> None:
    """Connects the processes that torchrun started. Raises ValueError for half a setting."""
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError("got RANK without WORLD_SIZE in the environment, expected both; "
                         "torchrun sets them")

    if world_size() > 1 and not dist.is_initialized():
        # Loaded now: DistributedDataParallel would load it later and keep the
        # process group alive.
        from torch import _dynamo  # noqa: F401
        # gloo connects processors, nccl GPUs.
        dist.init_process_group()
        # Its threads must not outlive Python.
        atexit.register(dist.destroy_process_group)


def sum_over_processes(number: float) -> float:
    """Adds up the numbers of all processes; all must call it."""
    if world_size() == 1:
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def any_process(flag: bool) -> bool:
    """Tells whether a flag is set in at least one process; all must call it."""
    return sum_over_processes(flag) > 0


def gather(value: Any) -> list:
    """Returns the values of all processes, by rank; all must call it."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits until all processes are here."""
    sum_over_processes(0)


class Signals:
    """Notes a signal that asks for an end, so that a step can be finished first.

    A second one ends the process at once. Use it as `with Signals() as signals:`.
    """

    def __init__(self) -> None:
        # The number of the signal.
        self.received: int | None = None
        self._received_at = 0.0
        self._before: dict = {}

    def _note(self, number: int, frame: Any) -> None:
        # torchrun passes Ctrl-C on, so it may come twice within a second.
        if self.received is not None and time.monotonic() > self._received_at + 1:
            raise KeyboardInterrupt
        self.received = number
        self._received_at = time.monotonic()

    def __enter__(self) -> "Signals":
        # Other threads get no signals.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                # nohup wants a signal ignored. Python cannot put back None, a
                # handler of the program in C that Python runs in.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
