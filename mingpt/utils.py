"""
Holds what the rest of minGPT shares: configuration, seeds, log, atomic files, scripts.

    python projects/adder/adder.py --help                      # every setting
    python projects/adder/adder.py --trainer.max_iters=500     # set one
"""

import ast
import contextlib
import difflib
import glob
import inspect
import json
import logging
import os
import random
import re
import shlex
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from mingpt.processes import rank

# ---- Configuration -----------------------------------------------------------


class CfgNode(SimpleNamespace):
    """Holds named values; some of them are configurations themselves.

    >>> config = CfgNode(seed=1, model=CfgNode(n_layer=2))
    >>> config.merge_from_args(["--model.n_layer=3"])
    >>> print(config)
    seed: 1
    model:
        n_layer: 3
    """

    # Programs put configurations into sets, each as a thing of its own.
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __str__(self) -> str:
        lines = []
        for name, value in vars(self).items():
            if isinstance(value, CfgNode):
                lines += [f"{name}:", textwrap.indent(str(value), "    ")]
            else:
                lines.append(f"{name}: {value}")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Returns the values as nested dictionaries: {"seed": 1, "model": {"n_layer": 3}}."""
        return {name: value.to_dict() if isinstance(value, CfgNode) else value
                for name, value in vars(self).items()}

    def fields(self) -> dict:
        """Returns the values by their dotted names: {"seed": 1, "model.n_layer": 3}."""
        values: dict = {}
        for name, value in vars(self).items():
            if isinstance(value, CfgNode):
                # A field may be called fields.
                inner = CfgNode.fields(value)
                values |= {f"{name}.{key}": field for key, field in inner.items()}
            else:
                values[name] = value
        return values

    def merge_from_dict(self, d: dict) -> None:
        """Sets the values of `d`; a dictionary for a nested configuration is merged into it."""
        for name, value in d.items():
            old = getattr(self, name, None)
            if isinstance(old, CfgNode) and isinstance(value, dict):
                old.merge_from_dict(value)
            else:
                setattr(self, name, value)

    def merge_from_args(self, args: list[str]) -> None:
        """Sets fields from a command line, `--a.b=value` or `--a.b value`.

        A value has the type of the field's default. `--help` prints all fields, with the
        comments beside them in the caller's function get_config, and exits. Raises
        ValueError, with nothing changed, for an unknown field or a value of another type.
        """
        fields = CfgNode.fields(self)
        if "--help" in args or "-h" in args:
            get_config = sys._getframe(1).f_globals.get("get_config")
            comments = _read_comments(get_config) if get_config else {}
            lines = ["Settings, each with its default:", ""]
            for name, value in fields.items():
                option = f"  --{name}={'' if value is None else value}"
                line = f"{option:30}  {comments.get(name, '')}"
                lines.append(textwrap.fill(line, 80, subsequent_indent=" " * 32))
            print("\n".join(lines))
            raise SystemExit(0)

        changes = {}
        words = iter(args)
        for word in words:
            option, equals, text = word.partition("=")
            name = option.removeprefix("--")
            if name == option:
                raise ValueError(f"got {word}, expected --name=value (--help lists all names)")
            if name not in fields:
                raise ValueError(f"there is no setting {option}{_suggest(name, fields)}; "
                                 "--help lists them all")
            if not equals:
                # The next word is the value, unless it is an option.
                text = next(words, "--")
                if text.startswith("--"):
                    raise ValueError(f"got {option} without a value, expected {option}=value")
            changes[name] = _parse(name, text, fields[name])

        for name, value in changes.items():
            # "a.b" and 3 become {"a": {"b": 3}}.
            for part in reversed(name.split(".")):
                value = {part: value}
            self.merge_from_dict(value)


# minGPT's short name
CN = CfgNode


def _parse(name: str, text: str, default):
    """Returns the value of a text, in the type of the default: ("x", "1e-3", 0.1) -> 0.001."""
    if isinstance(default, str):
        # "None" unsets a text; where the default is empty, it is just a word.
        return None if text == "None" and default else text
    try:
        value = ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError, TypeError):
        # A path, the name of a device, a word.
        value = text

    # An integer may come as 1e3, a float as 1, yes as 1, a tuple as a list.
    if isinstance(value, float) and value.is_integer() and not isinstance(default, float):
        value = int(value)
    if type(value) is int and isinstance(default, float):
        value = float(text)
    if isinstance(default, bool) and value in (0, 1):
        value = bool(value)
    if isinstance(value, list) and isinstance(default, tuple):
        value = tuple(value)
    if default is not None and type(value) is not type(default):
        expected = f"a value of type {type(default).__name__} like {default!r}"
        raise ValueError(f"--{name} takes {expected}, got {text!r}")
    return value


def _read_comments(build: Callable) -> dict[str, str]:
    """Returns the comments beside the fields that a function sets, by the fields' dotted names.

    `C.a.b = 1  # why` -> {"a.b": "why"}; `C.a = X.get_default_config()` adds X's to "a.".
    """
    source = inspect.getsource(build)
    comments: dict[str, str] = {}
    for field, owner in re.findall(r"\w+\.?([\w.]*) = (\w+)\.get_default_config\(\)", source):
        if owner in build.__globals__:
            inner = _read_comments(build.__globals__[owner].get_default_config)
            prefix = f"{field}." if field else ""
            comments |= {prefix + name: comment for name, comment in inner.items()}
    # The function's own comment on a field counts more.
    return comments | dict(re.findall(r"\w+\.([\w.]+) = .*?  # (.*)", source))


# Names from other libraries, and the names of the same settings here.
OTHER_NAMES = {"lr": "learning_rate", "dropout": "embd_pdrop resid_pdrop attn_pdrop"}


def _suggest(name: str, known: Iterable[str]) -> str:
    """Returns a hint: ("lr", ["learning_rate"]) -> " (did you mean learning_rate?)"."""
    last = name.rpartition(".")[2]
    meant = OTHER_NAMES.get(last, last).split()
    near = [field for field in known if field.rpartition(".")[2] in meant]
    if not near:
        near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def fill_in(config, defaults: dict, owner: str) -> None:
    """Gives a configuration the fields that it lacks, and Python's own numbers for NumPy's.

    One line of the log names the fields without a default.
    """
    for name, value in defaults.items():
        # A value of the configuration's class becomes its own.
        setattr(config, name, getattr(config, name, value))
    # A class that serves as a configuration has fields such as __module__.
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    for name, value in fields.items():
        setattr(config, name, to_python(value))
    unused = [name + _suggest(name, defaults) for name in fields if name not in defaults]
    if unused:
        logger.warning(f"{owner} does not use {', '.join(unused)}")


def to_python(value):
    """Returns Python's own number for one of NumPy or torch; other values as they are."""
    if type(value) is tuple:
        return tuple(map(to_python, value))
    is_number = isinstance(value, (np.generic, torch.Tensor)) and value.ndim == 0
    return value.item() if is_number else value


def check_config(config, rules: Iterable[tuple[str, Callable, str]]) -> None:
    """Raises ValueError for the first field that breaks its rule.

    A rule has the names of settings, the test of a value, and the words for the error:
    ("n_head n_embd", lambda value: value > 0, "a positive integer").
    """
    for names, test, expected in rules:
        for name in names.split():
            value = getattr(config, name)
            try:
                good = test(value)
            except (TypeError, ValueError, OverflowError):
                # The value is a text where a number should be, for example.
                good = False
            if not good:
                raise ValueError(f"got {name}={value!r}, expected {expected}")


# ---- Seeds and modes ---------------------------------------------------------


def set_seed(seed: int) -> None:
    """Seeds the random generators of Python, NumPy and torch (on every device)."""
    random.seed(int(seed))
    np.random.seed(seed)
    torch.manual_seed(seed)


_locks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model into eval mode for a block, then each module back into its mode.

    Threads take turns: one that leaves first would turn dropout on for the others.
    """
    with _locks.setdefault(model, threading.RLock()):
        training = [module for module in model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


# ---- Log ---------------------------------------------------------------------


class _Console(logging.Handler):
    """Prints the log of the first process."""

    def emit(self, record: logging.LogRecord) -> None:
        # The processes of mp.spawn get their rank after the import.
        if rank() != 0:
            return
        text = self.format(record)
        try:
            print(text, flush=True)
        except UnicodeEncodeError:
            print(ascii(text))
        except (OSError, ValueError):
            # Nobody reads any more, as after `| head`, but training goes on.
            sys.stdout = open(os.devnull, "w", encoding="utf-8")


class _LogFile(logging.FileHandler):
    """Writes the log.txt of a run."""


logger = logging.getLogger("mingpt")
# A user may have set it up already.
if not logger.handlers and logger.level == logging.NOTSET:
    logger.addHandler(_Console())
    logger.setLevel(logging.INFO)
    logger.propagate = False


def setup_logging(config: CfgNode) -> None:
    """Writes the log to log.txt in config.system.work_dir from now on.

    The folder also gets config.json, and args.txt with a line for each start and resume.
    """
    if not config.system.work_dir:
        raise ValueError("got an empty work_dir, expected a folder for the log and the model")
    if rank() != 0:
        return
    work_dir = Path(config.system.work_dir).expanduser()
    work_dir.mkdir(parents=True, exist_ok=True)

    args_path = work_dir / "args.txt"
    with naming_file(args_path), open(args_path, "ab") as file:
        # The name of a file may be bytes that are no UTF-8.
        file.write(os.fsencode(shlex.join(sys.argv) + "\n"))
    with replacing(work_dir / "config.json") as part:
        text = json.dumps(config.to_dict(), indent=4, default=str)
        part.write_text(text + "\n", encoding="utf-8")

    # The log of an earlier run in this process ends here.
    for handler in list(logger.handlers):
        if isinstance(handler, _LogFile):
            logger.removeHandler(handler)
            handler.close()
    logger.addHandler(_LogFile(work_dir / "log.txt", encoding="utf-8", errors="backslashreplace"))


def progress(items: Iterable, label: str, total: int) -> Iterable:
    """Returns the items; shows how far their use is where tqdm is installed and it takes long."""
    try:
        from tqdm import tqdm
    except ImportError:
        logger.info(f"{label} ...")
        return items
    # None hides it where stderr is no terminal.
    disable = None if rank() == 0 and sys.stderr else True
    return tqdm(items, label, total, delay=2, leave=False, disable=disable)


# ---- Files -------------------------------------------------------------------


def cache_folder() -> Path:
    """Returns the folder of downloads: $MINGPT_CACHE, else ~/.cache/mingpt."""
    return Path(os.environ.get("MINGPT_CACHE") or "~/.cache/mingpt").expanduser()


@contextlib.contextmanager
def naming_file(path: str | Path) -> Iterator[None]:
    """Adds the file's name to an OSError that lacks it, such as "disk full"."""
    try:
        yield
    except OSError as error:
        if not error.filename:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it replaces `path` if the block ends well.

    So a file is complete or absent, even after a crash. It has one writer at a time:
    leftovers of a killed writer are removed.
    """
    path = Path(path)
    for leftover in path.parent.glob(glob.escape(path.name) + ".[0-9]*.tmp"):
        leftover.unlink(missing_ok=True)

    part = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with naming_file(path):
            yield part
            # The bytes are on the disk before the name leads to them.
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---- Scripts -----------------------------------------------------------------


def run_script(main: Callable[[list[str]], None]) -> None:
    """Calls main(command line); an error of the user is printed as one line, `error: …`.

    The environment variable MINGPT_TRACEBACK=1 shows where an error comes from.
    """
    # A terminal may lack UTF-8. A notebook's stdout, or None, cannot change.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")

    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("MINGPT_TRACEBACK"):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
