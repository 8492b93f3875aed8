"""
Checkpoints: one file with all that a run needs to go on.

    content = read_checkpoint("out/adder/checkpoint.pt")
    load_model_state(model, content["model"])

A checkpoint is a dictionary:

    model, model_config     weights, and the settings to build the model again
    optimizer, scaler       their state_dict()
    iter_num, seed          steps done, and the seed of the examples
    best_loss, elapsed      lowest validation loss, seconds of training
    random_states           of the random generators, for each process
    config                  settings of the run
"""

import contextlib
import json
import math
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mingpt.utils import CfgNode, replacing, to_python

# Types that torch.load(weights_only=True) reads.
PLAIN_TYPES = (str, int, float, bool, bytes, type(None))


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Writes a checkpoint beside `path`, then renames it. Makes the folder."""
    path = Path(path).expanduser()
    content = make_plain(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, open(part, "wb") as file:
        torch.save(content, file)


def make_plain(value: Any, name: str = "checkpoint") -> Any:
    """Copies a nested value, with NumPy's numbers as Python's.

    Raises ValueError for what could not be read back, with the name of its entry.
    """
    if isinstance(value, dict):
        return {make_plain(key, name): make_plain(item, f"{name}[{key!r}]")
                for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [make_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in PLAIN_TYPES or isinstance(value, Tensor):
        return value

    raise ValueError(f"got a {type(value).__name__} as {name}, which a checkpoint cannot hold; "
                     "expected tensors, numbers, texts, lists, tuples and dictionaries")


def read_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint to the CPU; ValueError for a missing, damaged or other file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}; start without resume")

    try:
        with zipfile.ZipFile(path) as archive:
            # This compares checksums, which torch.load does not.
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Each library has errors of its own for a broken file. The text of
        # torch's would advise to load the file without its guard.
        raise ValueError(f"{path} is damaged or no checkpoint: {type(error).__name__}") from None

    if not isinstance(content, dict) or "random_states" not in content:
        raise ValueError(f"{path} is no checkpoint of a run")
    return content


def plain_settings(config: Any) -> dict:
    """Returns the settings of a configuration in JSON's types; other values as texts."""
    settings = dict(vars(config)) if hasattr(config, "__dict__") else config
    return json.loads(json.dumps(settings, default=_as_json, skipkeys=True))


def _as_json(value: Any) -> Any:
    return vars(value) if isinstance(value, CfgNode) else str(value)


def changed_settings(then: dict, config: Any) -> list[str]:
    """Names the settings that have changed: ["max_iters was 2, is 4"]."""
    now = plain_settings(config)
    return [f"{name} was {then[name]}, is {value}" for name, value in now.items()
            if name != "resume" and name in then and then[name] != value]


def model_state(model: nn.Module) -> dict:
    """Returns a model's weights, by names without the traces of torch.compile."""
    return {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}


def load_model_state(model: nn.Module, state: dict) -> None:
    """Loads what model_state returned, into a model compiled or not."""
    names = {name.replace("_orig_mod.", ""): name for name in model.state_dict()}
    model.load_state_dict({names.get(name, name): value for name, value in state.items()})


def check_fits(content: dict, model: nn.Module, optimizer: Any, path: str | Path) -> None:
    """Raises ValueError unless a checkpoint has the form of this model and this optimizer."""
    saved = _shapes(content["model"])
    own = _shapes(model_state(model))
    for name in sorted({*saved, *own}):
        if saved.get(name) != own.get(name):
            there = str(saved.get(name, "nothing"))[:80]
            here = str(own.get(name, "nothing"))[:80]
            raise ValueError(f"{path} is a checkpoint of another model: {name} is {there} in "
                             f"the file and {here} in the model")

    then = content["optimizer"]["param_groups"]
    now = optimizer.state_dict()["param_groups"]
    # Schedulers of torch and callbacks may have added settings to a group.
    fits = [len(old["params"]) == len(new["params"]) and old.keys() >= new.keys()
            for old, new in zip(then, now)]
    if len(then) != len(now) or not all(fits):
        raise ValueError(f"{path} was written with another optimizer, or other layers were "
                         "trained; resume with the same")


def _shapes(state: dict) -> dict:
    # Values that are no tensors, such as a vocabulary, have to be equal.
    return {name: tuple(value.shape) if isinstance(value, Tensor) else value
            for name, value in state.items()}


def random_state(device_type: str) -> dict:
    """Returns the state of every random generator, in types that can be read back."""
    numpy: Any = np.random.get_state()
    numpy = (numpy[0], numpy[1].tolist(), *numpy[2:])
    state = {"python": random.getstate(), "numpy": numpy, "cpu": torch.get_rng_state()}
    if device_type != "cpu":
        state[device_type] = torch.get_device_module(device_type).get_rng_state()
    return state


def set_random_state(state: dict, device_type: str) -> None:
    """Puts every random generator back into the state that random_state returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if device_type != "cpu" and device_type in state:
        torch.get_device_module(device_type).set_rng_state(state[device_type])


def finite_or_none(value: Any) -> Any:
    """Returns a number as Python's own, but None for a float that JSON cannot hold."""
    value = to_python(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def set_aside(folder: Path) -> None:
    """Renames the files of an earlier run: checkpoint.pt becomes checkpoint.pt.old."""
    for name in ("checkpoint.pt", "best.pt", "metrics.jsonl"):
        if (folder / name).exists():
            (folder / name).replace(folder / f"{name}.old")


def keep_rows(path: Path, steps: int) -> None:
    """Drops from metrics.jsonl the rows after this many steps, and rows that a crash has cut."""
    if path.exists():
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if line.endswith(b"\n") and json.loads(line)["iteration"] <= steps:
                    kept.append(line)
        with replacing(path) as part:
            part.write_bytes(b"".join(kept))
