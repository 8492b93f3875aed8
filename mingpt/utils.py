"""
What the rest of minGPT shares: configuration, seeds, the log, eval mode, files that appear whole.

    python projects/adder/adder.py --help                      # every field of a configuration, with its default
    python projects/adder/adder.py --trainer.max_iters=500     # set one of them
"""

import ast
import contextlib
import difflib
import functools
import glob
import json
import logging
import math
import os
import random
import shlex
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

class CfgNode(SimpleNamespace):
    """A configuration: named values, some of which are configurations themselves.

    >>> config = CfgNode(seed=1, model=CfgNode(n_layer=2))
    >>> config.merge_from_args(['--model.n_layer=3'])
    >>> config.to_dict()
    {'seed': 1, 'model': {'n_layer': 3}}
    """

    def __str__(self) -> str:
        return "\n".join(f"{name} = {value!r}" for name, value in self.fields().items())

    def to_dict(self) -> dict:
        """The same values as plain nested dictionaries."""
        return {k: v.to_dict() if isinstance(v, CfgNode) else v for k, v in vars(self).items()}

    def fields(self, prefix: str = "") -> dict:
        """All values by their dotted names, those of nested configurations included."""
        flat: dict = {}
        for key, value in vars(self).items():
            flat.update(value.fields(f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value})
        return flat

    def merge_from_dict(self, d: dict) -> None:
        """Sets the values of `d`; a dictionary given for a nested configuration is merged into it."""
        for key, value in d.items():
            old = getattr(self, key, None)
            if isinstance(old, CfgNode) and isinstance(value, dict):
                old.merge_from_dict(value)
            else:
                setattr(self, key, value)

    def merge_from_args(self, args: list[str]) -> None:
        """Sets fields from a command line, `--a.b=value` or `--a.b value`; `--help` prints all fields and exits.

        A value has the type of the field's default. Raises ValueError, with nothing changed, for an unknown field or a
        value of another type.
        """
        fields, changes, words = self.fields(), {}, iter(args)
        if "--help" in args or "-h" in args:
            print("Settings, each with its default:\n")
            print("\n".join(f"  --{name}={'' if value is None else value}" for name, value in fields.items()))
            raise SystemExit(0)
        for word in words:
            name, equals, text = word.removeprefix("--").partition("=")
            if name not in fields or not word.startswith("--"):
                hint = "".join(f"; did you mean --{near}?" for near in difflib.get_close_matches(name, fields, 1))
                raise ValueError(f"there is no setting {word.partition('=')[0]}{hint} (--help lists them all)")
            if (value := text if equals else next(words, None)) is None:
                raise ValueError(f"got {word} without a value, expected --{name}=value")
            changes[name] = _parse(name, value, fields[name])
        for name, value in changes.items():
            *groups, key = name.split(".")
            setattr(functools.reduce(getattr, groups, self), key, value)

def _parse(name: str, text: str, default):
    """The value that `text` stands for, given the field's default: _parse('x', '1e-3', 0.1) -> 0.001."""
    if isinstance(default, str):
        return None if text == "None" and default else text
    try:
        value = ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = text # a path, a device name, a word
    if isinstance(value, float) and value.is_integer() and not isinstance(default, float):
        value = int(value) # 1e3
    if default is None:
        return text if isinstance(value, str) else value
    if isinstance(default, float) and type(value) is int:
        value = float(text)
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        value = type(default)(value)
    if type(value) is not type(default) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"--{name} takes a value of type {type(default).__name__} like {default!r}, got {text[:80]!r}")
    return value

def check_config(config: CfgNode, rules) -> None:
    """Raises ValueError for the first field that breaks its rule: (names of fields, test of a value, expectation)."""
    for names, test, expected in rules:
        for name in names.split():
            try:
                good = test(getattr(config, name))
            except (TypeError, ValueError, OverflowError): # a text where a number should be
                good = False
            if not good:
                raise ValueError(f"got {name}={getattr(config, name)!r}, expected {expected}")

def set_seed(seed: int) -> None:
    """Seeds the random generators of Python, NumPy and torch (on every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True) # to the stdout of this moment, which a notebook may have replaced

class _LogFile(logging.FileHandler):
    """The log.txt of a run."""

FIRST = os.environ.get("RANK", "0") == "0" # of several processes under torchrun one speaks and writes
logger = logging.getLogger("mingpt")
if not logger.handlers:
    logger.addHandler(_Console())
    logger.setLevel(logging.INFO if FIRST else logging.WARNING)
    logger.propagate = False

def setup_logging(config: CfgNode) -> None:
    """Also writes the log to log.txt in config.system.work_dir, and to args.txt and config.json what repeats it."""
    if not config.system.work_dir:
        raise ValueError("got an empty work_dir, expected the name of a folder for the log and the model")
    if FIRST:
        work_dir = Path(config.system.work_dir)
        work_dir.mkdir(parents=True, exist_ok=True)
        args_path = work_dir / "args.txt" # has a line for each time that the run is resumed
        with naming(args_path), open(args_path, "a", encoding="utf-8") as file:
            file.write(shlex.join(sys.argv) + "\n")
        with replacing(work_dir / "config.json") as part:
            part.write_text(json.dumps(config.to_dict(), indent=4, default=str) + "\n", encoding="utf-8")
        for earlier in [handler for handler in logger.handlers if isinstance(handler, _LogFile)]:
            logger.removeHandler(earlier)
            earlier.close()
        logger.addHandler(_LogFile(work_dir / "log.txt", encoding="utf-8"))

def progress(items, label: str, total: int):
    """Yields the items, and shows how far it is if that takes long and the package tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        logger.info(f"{label} ...")
        return items
    return tqdm(items, label, total, delay=2, leave=False, disable=None if FIRST else True) # None: only on a terminal

_switching = threading.RLock() # all threads share the modes of a model

@contextlib.contextmanager
def eval_mode(model: torch.nn.Module):
    """Puts a model into eval mode for a block, then puts each module back into the mode it was in."""
    with _switching:
        training = [module for module in model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True

@contextlib.contextmanager
def naming(path: str | Path):
    """Names the file in an error of the block that names none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise

@contextlib.contextmanager
def replacing(path: str | Path):
    """Yields a path beside `path` to write to; it replaces `path` when the block ends without an error.

    So nobody ever sees half a file, not even after a crash. A file has one writer at a time: what a killed one left
    behind is removed.
    """
    path = Path(path)
    for left in path.parent.glob(glob.escape(path.name) + ".*.tmp"):
        left.unlink(missing_ok=True)
    part = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno()) # on disk before the name points to it
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def run_script(main) -> None:
    """Calls main(command line); mistakes of a user end with a line `error: …`, and MINGPT_TRACEBACK=1 shows where."""
    sys.stdout.reconfigure(errors="replace") # type: ignore[union-attr] # a terminal may lack UTF-8
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("MINGPT_TRACEBACK"):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
