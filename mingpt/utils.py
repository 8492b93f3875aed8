"""
What the rest of minGPT shares: configuration, seeds, logging, files and downloads.

    python projects/adder/adder.py --help                      # every field of a configuration, with its default
    python projects/adder/adder.py --trainer.max_iters=500     # set one of them
"""

import ast
import codecs
import contextlib
import difflib
import hashlib
import json
import logging
import os
import random
import re
import shlex
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

# -----------------------------------------------------------------------------
# configuration

class CfgNode:
    """A configuration: named values, of which some are configurations in turn.

    >>> config = CfgNode(seed=1, model=CfgNode(n_layer=2))
    >>> config.merge_from_args(['--model.n_layer=3'])
    >>> config.to_dict()
    {'seed': 1, 'model': {'n_layer': 3}}
    """

    def __init__(self, **kwargs):
        self.__dict__.update(kwargs)

    def __str__(self) -> str:
        """One line per field, `a.b = value`."""
        return "\n".join(f"{name} = {value!r}" for name, value in self.fields().items())

    def to_dict(self) -> dict:
        """The same values as plain nested dictionaries."""
        return {k: v.to_dict() if isinstance(v, CfgNode) else v for k, v in vars(self).items()}

    def fields(self, prefix: str = "") -> dict:
        """All values by their dotted names, those of nested configurations included."""
        flat = {}
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
        """Sets fields from command line arguments of the form `--a.b=value`; `--help` prints all fields and exits.

        A value has the type of the field's default; a field whose default is None takes a Python literal or a string.
        Raises ValueError, with nothing changed, for an unknown field or a value of another type.
        """
        fields = self.fields()
        if "--help" in args or "-h" in args:
            print("Settings, each with its default:\n")
            print("\n".join(f"  --{name}={'' if value is None else value}" for name, value in fields.items()))
            raise SystemExit(0)
        changes = {}
        for arg in args:
            name, equals, text = arg.removeprefix("--").partition("=")
            if not (arg.startswith("--") and equals):
                raise ValueError(f"got the argument {arg!r}, expected --name=value; --help lists the names")
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 1, cutoff=0)
                hint = f"; did you mean --{near[0]}?" if near else ""
                raise ValueError(f"there is no setting --{name}{hint} (--help lists them all)")
            changes[name] = _parse(name, text, fields[name])
        for name, value in changes.items():
            *groups, key = name.split(".")
            node = self
            for group in groups:
                node = getattr(node, group)
            setattr(node, key, value)

def _parse(name: str, text: str, default):
    """The value that `text` stands for, given the field's default: _parse('x', '1e-3', 0.1) -> 0.001."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text # a path, a device name, a word
    if default is None or (value is None and isinstance(default, str)):
        return value
    if isinstance(default, str):
        return text
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, (tuple, list)) and isinstance(value, (tuple, list)):
        return type(default)(value)
    if type(value) is not type(default):
        raise ValueError(f"--{name} takes a value of type {type(default).__name__} such as {default!r}, got {text!r}")
    return value

# -----------------------------------------------------------------------------
# seeds, modes, logging, progress

def set_seed(seed: int) -> None:
    """Seeds the random generators of Python, NumPy and torch (on every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

def setup_logging(config: CfgNode) -> None:
    """Turns the log of minGPT on, to the console and to log.txt in config.system.work_dir.

    Also writes the command line (args.txt) and the configuration (config.json) there, so that a run can be repeated.
    Of several processes under torchrun only the first does so.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return
    work_dir = Path(config.system.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    with replacing(work_dir / "args.txt") as part:
        part.write_text(shlex.join(sys.argv) + "\n", encoding="utf-8")
    with replacing(work_dir / "config.json") as part:
        part.write_text(json.dumps(config.to_dict(), indent=4, default=str) + "\n", encoding="utf-8")
    logger = logging.getLogger("mingpt")
    for old in logger.handlers[:]: # of an earlier call
        logger.removeHandler(old)
        old.close()
    for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(work_dir / "log.txt", encoding="utf-8")):
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)

@contextlib.contextmanager
def eval_mode(model: torch.nn.Module):
    """Has a model in eval mode for a block; after it every part that was in training mode is so again."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True

def format_time(seconds: float) -> str:
    """A length of time to read: format_time(75) -> '1:15', format_time(3661) -> '1:01:01'."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

class Progress:
    """Says on stderr how far a piece of work is, in bytes or another unit, and how long the rest will take.

    A terminal shows one line that renews itself; elsewhere a line comes every ten seconds. What takes under two seconds
    shows nothing.
    """

    def __init__(self, label: str, total: int | None, done: int = 0, unit: str = "bytes"):
        self.label, self.total, self.first, self.unit = label, total, done, unit
        self.start = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.pause = 0.2 if self.terminal else 10 # seconds between lines
        self.next = self.first_line = self.start + max(2, self.pause)

    def update(self, done: int) -> None:
        """Called as often as one likes with what is done so far."""
        now = time.monotonic()
        finished = done == self.total and self.next > self.first_line
        if finished or now >= self.next:
            self.next = now + self.pause
            rate = max(done - self.first, 1) / (now - self.start)
            line = f"{self.label}: {done:,} {self.unit}, {rate:,.0f}/s"
            if self.unit == "bytes":
                line = f"{self.label}: {done / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
            if self.total:
                line += f", {done / self.total:.0%}, {format_time(max(self.total - done, 0) / rate)} left"
            print(f"\r{line:<79}" if self.terminal else line, end="" if self.terminal and not finished else "\n",
                  file=sys.stderr, flush=True)

# -----------------------------------------------------------------------------
# files and downloads

@contextlib.contextmanager
def replacing(path: str | Path):
    """Yields a path beside `path` to write to; it takes the place of `path` only when the block ends without an error.

    So a reader sees the old file or the new one, never half of one, also after a crash or on a full disk.
    """
    part = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno()) # on disk before the name points to it
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def read_text(path: str | Path, size: int = 1 << 22):
    """Yields the text of a UTF-8 file of any length, piece by piece; ValueError names the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        while True:
            start = file.tell() - len(decoder.getstate()[0]) # where a character cut by the last piece began
            block = file.read(size)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at position "
                                 f"{start + error.start}; convert the file first") from None
            if text:
                yield text
            if not block:
                return

def cache_dir() -> Path:
    """Where downloads are kept: the folder that MINGPT_CACHE names, else ~/.cache/mingpt."""
    return Path(os.environ.get("MINGPT_CACHE") or Path.home() / ".cache" / "mingpt")

TIMEOUT = 30 # seconds without a byte after which a connection counts as broken
ATTEMPTS = 4 # connections tried for one file

def download(url: str, path: str | Path, sha256: str | None = None, check=None) -> Path:
    """Fetches `url` into `path`, unless that is there already (and has the sha256, if given), and returns `path`.

    A broken connection is taken up where it broke, in this call or the next. The size, the sha256 (the argument, or what
    a Hugging Face hub sends with the file) and `check(path)`, which raises ValueError for a file of no use, are verified
    before the file appears under its name. Raises OSError for a failed transfer (FileNotFoundError if the server has no such
    file) and ValueError for wrong contents.
    """
    import requests # here, as most uses of this package download nothing
    path = Path(path)
    if path.exists() and (not sha256 or _sha256(path) == sha256):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    left = Path(f"{path}.part") # what an earlier call left
    part = Path(f"{path}.{os.getpid()}.part") # only this process writes here
    with contextlib.suppress(FileNotFoundError):
        os.replace(left, part)
    problem = "the server offers no usable part of it"
    try:
        for attempt in range(ATTEMPTS):
            time.sleep(attempt * 0.5)
            have = part.stat().st_size if part.exists() else 0
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
            try:
                with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                    sha256 = sha256 or _hub_sha256(response)
                    if response.status_code == 416 or (response.status_code == 206 and not sha256):
                        part.unlink() # not a beginning of this file, or nothing could tell: start over
                        continue
                    response.raise_for_status()
                    if "text/html" in response.headers.get("Content-Type", ""):
                        raise ValueError(f"{url} answered with a web page, not with the file; is there a proxy in between?")
                    total = _receive(response, part)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = error
                continue
            if total in (None, part.stat().st_size):
                break
            problem = f"the connection ended after {part.stat().st_size} of {total} bytes"
        else:
            raise OSError(f"could not download {url}: {problem}. Try again, or put the file at {path} yourself")
        _verify(part, url, sha256, check)
        os.replace(part, path)
    except requests.HTTPError as error:
        kind = FileNotFoundError if error.response.status_code == 404 else OSError
        raise kind(f"could not download {url}: {error}. If you have the file, put it at {path}") from error
    finally:
        if part.exists() and sha256: # only where the digest will tell whether the part was right
            os.replace(part, left)
        part.unlink(missing_ok=True)
    return path

def _hub_sha256(response) -> str | None:
    """The sha256 of a large file on a Hugging Face hub, which names it in the redirect to its storage."""
    tags = [answer.headers.get("X-Linked-Etag", "").strip('"') for answer in (*response.history, response)]
    return next((tag for tag in tags if len(tag) == 64), None)

def _receive(response, part: Path) -> int | None:
    """Writes the body of a response to `part`, behind what is there if it is a continuation; returns the full size, if known."""
    have = part.stat().st_size if response.status_code == 206 else 0
    length = response.headers.get("Content-Length")
    total = have + int(length) if length else None
    progress = Progress(response.url.partition("?")[0].rpartition("/")[2], total, have)
    with open(part, "ab" if have else "wb") as file:
        for chunk in response.iter_content(1 << 16):
            file.write(chunk)
            progress.update(file.tell())
    return total

def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

def _verify(part: Path, url: str, sha256: str | None, check) -> None:
    """Raises ValueError, and removes `part`, if it is not the file that it should be."""
    try:
        if sha256 and (got := _sha256(part)) != sha256:
            raise ValueError(f"{url} has the wrong contents: sha256 {got} instead of {sha256}. Nothing was kept")
        if check:
            check(part)
    except ValueError:
        part.unlink()
        raise

def find_repository(name: str) -> tuple[Path, str | None]:
    """The folder of a model's files, and the address to fetch missing ones from: None if `name` is a folder on this machine.

    Otherwise it is 'owner/repository' on the hub, https://huggingface.co or what HF_ENDPOINT names, kept in the cache folder.
    """
    if name and Path(name).is_dir():
        return Path(name), None
    parts = name.split("/")
    if len(parts) != 2 or not all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", part) for part in parts):
        raise ValueError(f"got {name!r}, which is neither a folder nor a name of the form 'owner/repository'")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return cache_dir().joinpath(*parts), f"{endpoint.rstrip('/')}/{name}/resolve/main/"

WEIGHT_FILES = ("pytorch_model.bin", "model.safetensors", "pytorch_model.bin.index.json", "model.safetensors.index.json")

def load_repository(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json and all tensors of a model in a folder or on the hub (see find_repository), in one file or in several.

    Raises FileNotFoundError if there is none, ValueError for files that are no JSON or no weights.
    """
    folder, address = find_repository(name)

    def fetch(file: str, check) -> Path:
        if address is None and not (folder / file).is_file():
            raise FileNotFoundError(f"there is no {file} in {folder}")
        return folder / file if address is None else download(address + file, folder / file, check=check)

    config = _read_json(fetch("config.json", _read_json))
    for file in sorted(WEIGHT_FILES, key=lambda file: not (folder / file).is_file()): # what is here already comes first
        with contextlib.suppress(FileNotFoundError):
            path = fetch(file, _read_json if file.endswith(".json") else _read_tensors)
            break
    else:
        raise FileNotFoundError(f"{name} has no weights: none of {', '.join(WEIGHT_FILES)}")
    shards = sorted(set(_read_json(path)["weight_map"].values())) if path.suffix == ".json" else [path.name]
    tensors = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise ValueError(f"{path} names a file outside its folder, {shard!r}")
        tensors.update(_read_tensors(fetch(shard, _read_tensors)))
    return config, tensors

def _read_json(path: Path) -> dict:
    with contextlib.suppress(ValueError):
        if isinstance(content := json.loads(path.read_text(encoding="utf-8")), dict):
            return content
    raise ValueError(f"{path} holds no JSON object")

def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, mapped into memory where the format allows: read when they are first used."""
    if ".safetensors" in path.suffixes:
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(f"{path} needs the package safetensors: pip install safetensors") from None
    try:
        if ".safetensors" in path.suffixes:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)) # the oldest are no zip
    except Exception as error: # each library has errors of its own for a broken or malicious file
        raise ValueError(f"{path} cannot be read as weights: {error}") from error
