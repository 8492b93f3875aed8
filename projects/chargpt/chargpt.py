"""
Teaches a GPT to write like a text, character by character.

    python projects/chargpt/chargpt.py                                  # Python's own help texts, a minute or two on a CPU
    python projects/chargpt/chargpt.py --data.path=input.txt            # any text file in UTF-8
    python projects/chargpt/chargpt.py --data.path=tinyshakespeare      # or text8, enwik8: fetched once
    python projects/chargpt/chargpt.py --system.mode=sample --system.prompt="The "      # text from the saved model
    python projects/chargpt/chargpt.py --help                           # every setting
"""

import difflib
import hashlib
import io
import json
import logging
import math
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import requests
import torch

from mingpt.data import TokenDataset
from mingpt.model import SIZES
from mingpt.trainer import Trainer, read_checkpoint
from mingpt.utils import CfgNode, check_config, progress, run_script, set_seed, setup_logging

sys.path.append(str(Path(__file__).resolve().parents[1])) # where projects keep what they share
from muon import MuonGPT

logger = logging.getLogger("mingpt.chargpt")

# -----------------------------------------------------------------------------

def get_config() -> CfgNode:
    C = CfgNode()

    C.system = CfgNode()
    C.system.mode = "train" # or 'sample': write text with the model in work_dir
    C.system.seed = 3407
    C.system.work_dir = "./out/chargpt" # where the log, the metrics and the model go
    C.system.prompt = "" # what a sample starts with; empty takes the start of the validation text
    C.system.length = 500 # characters of a sample
    C.system.temperature = 0.8 # of a sample; 0 is the likeliest character each time

    C.data = CfgNode()
    C.data.path = "" # a text file, or tinyshakespeare, text8, enwik8; empty takes Python's help texts (pydoc_data.topics)
    C.data.block_size = 64 # characters that the model sees at a time

    C.model = CharGPT.get_default_config()
    del C.model.vocab_size, C.model.block_size # the text and data.block_size decide
    C.model.n_layer, C.model.n_head, C.model.n_embd = 4, 4, 128
    C.model.embd_pdrop = C.model.resid_pdrop = C.model.attn_pdrop = 0.0 # a small model does not learn its text by heart

    C.trainer = Trainer.get_default_config()
    del C.trainer.work_dir # it is system.work_dir
    C.trainer.optimizer = "muon" # for the matrices of the blocks; 'adamw' for all
    C.trainer.momentum = 0.85 # of Muon alone; AdamW has betas
    C.trainer.max_iters = 2000
    C.trainer.batch_size = 12
    C.trainer.learning_rate = 1e-2
    C.trainer.betas = (0.9, 0.99)
    C.trainer.schedule = "linear"
    C.trainer.eval_interval = 500
    C.trainer.eval_batches = 200 # spread evenly: all of a small text, a sample of a large one; at the end all of it counts

    return C

# -----------------------------------------------------------------------------

DATASETS = { # name: address, sha1 of the text, its shares for training, validation and test
    "tinyshakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                        "04486597058d11dcc2c556b1d0433891eb639d2e", (0.9, 0.1)),
    "text8": ("http://mattmahoney.net/dc/text8.zip", "0dc3edebc970dcc96137e7deda4d9995af9d93de", (0.9, 0.05, 0.05)),
    "enwik8": ("http://mattmahoney.net/dc/enwik8.zip", "57b8363b814821dc9d47aa4d41f58733519076b2", (0.9, 0.05, 0.05)),
}

def fetch(name: str) -> Path:
    """The text of a data set in the cache folder, downloaded, unpacked and checked the first time."""
    address, sha1, _ = DATASETS[name]
    path = Path(os.environ.get("MINGPT_CACHE") or Path.home() / ".cache" / "mingpt") / name
    if not path.is_file():
        with requests.get(address, stream=True, timeout=30) as response:
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0))
            content = b"".join(progress(response.iter_content(1 << 20), f"downloading {name}", -(-size >> 20))) # MiB
        try:
            if address.endswith(".zip"):
                content = zipfile.ZipFile(io.BytesIO(content)).read(name)
        except (KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{address} has the wrong contents: {error}. Nothing was kept; try again") from error
        if (got := hashlib.sha1(content).hexdigest()) != sha1:
            raise ValueError(f"{address} has the wrong contents: sha1 {got}, expected {sha1}. Nothing was kept; try again")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder: # other processes may fetch it now
            (Path(folder) / name).write_bytes(content)
            os.replace(Path(folder) / name, path)
    return path

def read_blocks(name: str) -> Iterator[str]:
    """The text piece by piece. enwik8 is bytes by convention: each is read as the character of its number."""
    if not name:
        from pydoc_data.topics import topics
        yield "\n".join(topics[topic] for topic in sorted(topics))
        return
    path = fetch(name) if name in DATASETS else Path(name)
    if not path.is_file():
        hint = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, DATASETS, 1))
        raise ValueError(f"there is no text file {name}{hint}")
    # utf-8-sig leaves out the mark that some editors put first; line ends become \n
    with open(path, encoding="latin-1" if name == "enwik8" else "utf-8-sig", newline="" if name == "enwik8" else None) as file:
        try:
            while block := file.read(1 << 22):
                yield block
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}; convert the file first") from None

def load_text(name: str) -> tuple[str, np.ndarray]:
    """Reads a text once: its distinct characters in order, and for every position the index of its character there."""
    found, length = set(), 0
    for block in read_blocks(name):
        found.update(block)
        length += len(block)
    if len(found) < 2:
        raise ValueError(f"{name} has {len(found)} distinct characters; there is nothing to learn from fewer than two")
    chars = "".join(sorted(found))
    table = np.zeros(ord(chars[-1]) + 1, dtype=np.uint8 if len(chars) <= 256 else np.uint32)
    table[[ord(char) for char in chars]] = np.arange(len(chars))
    text, done = np.empty(length, dtype=table.dtype), 0
    for block in read_blocks(name):
        text[done:done + len(block)] = table[np.frombuffer(block.encode("utf-32-le"), dtype=np.uint32)]
        done += len(block)
    return chars, text

class CharGPT(MuonGPT):
    """A GPT that knows its characters: they are part of its checkpoints, and a run with others cannot resume one."""

    def __init__(self, config: CfgNode, chars: str):
        super().__init__(config)
        self.chars = chars

    def get_extra_state(self) -> str: # torch puts it into the state dict
        return self.chars

    def set_extra_state(self, chars: str) -> None:
        self.chars = chars

    def encode(self, prompt: str) -> torch.Tensor:
        """A prompt as tokens, (1, T). Raises ValueError for characters that the text lacks."""
        if unknown := sorted(set(prompt) - set(self.chars)):
            raise ValueError(f"the prompt has {', '.join(map(repr, unknown))}, which the model has never seen")
        return torch.tensor([[self.chars.index(char) for char in prompt]])

    def decode(self, tokens: torch.Tensor) -> str:
        return "".join(self.chars[i] for i in tokens)

# -----------------------------------------------------------------------------

def train(config: CfgNode) -> None:
    chars, text = load_text(config.data.path)
    shares = DATASETS[config.data.path][2] if config.data.path in DATASETS else (0.9, 0.1)
    train_text, *held_out = np.split(text, [int(share * len(text)) for share in np.cumsum(shares[:-1])])
    T = config.model.block_size = config.data.block_size
    config.model.vocab_size = len(chars)
    if config.trainer.lr_decay_iters is None:
        config.trainer.lr_decay_iters = config.trainer.max_iters
    config.trainer.work_dir = config.system.work_dir
    train_dataset, val_dataset = TokenDataset(train_text, T), TokenDataset(held_out[0], T, stride=T)
    model = CharGPT(config.model, chars)
    config.model = model.config
    prompt = model.encode(config.system.prompt or "".join(chars[i] for i in held_out[0][:max(1, T // 4)]))
    trainer = Trainer(config.trainer, model, train_dataset, val_dataset)
    setup_logging(config) # only now: a refused resume changes no file
    logger.info(f"{len(text):,} characters, {len(chars)} of them distinct; "
                f"{len(train_text):,} to learn from, {len(held_out[0]):,} to validate")

    def show_sample(trainer: Trainer) -> None:
        written = model.generate(prompt.to(trainer.device), config.system.length // 2, config.system.temperature, do_sample=True)
        logger.info("-" * 80 + "\n" + model.decode(written[0]) + "\n" + "-" * 80)

    if not config.trainer.resume: # what it writes before it has learned anything
        trainer.add_callback("on_train_start", show_sample)
    trainer.add_callback("on_eval_end", show_sample)
    trainer.run()
    for name, part in zip(("validation", "test"), held_out):
        loss = trainer.evaluate(TokenDataset(part, T, stride=T))
        logger.info(f"{name} loss over all {len(part):,} characters: {loss:.4f} nats, {loss / math.log(2):.4f} bits per character")
    logger.info(f"the model is in {config.system.work_dir}")

def sample(config: CfgNode) -> None:
    folder = Path(config.system.work_dir)
    if not (folder / "checkpoint.pt").is_file():
        raise ValueError(f"there is no model in {folder}; train one first, or name its folder with --system.work_dir")
    logging.getLogger("mingpt").setLevel(logging.WARNING) # the text alone is wanted
    state = read_checkpoint(folder / "checkpoint.pt")["model"]
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = CharGPT(CfgNode(**saved["model"]), state["_extra_state"])
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"checkpoint.pt and config.json in {folder} are not a model of this script: {error!r}") from None
    prompt = model.encode(config.system.prompt or "\n" * ("\n" in model.chars) or model.chars[0])
    print(model.decode(prompt[0]), end="")
    for token in model.stream(prompt, config.system.length, config.system.temperature, do_sample=True):
        print(model.decode(token), end="", flush=True)
    print()

def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    if config.model.model_type in SIZES: # a preset replaces the sizes above; those of the command line may contradict it
        config.model.n_layer = config.model.n_head = config.model.n_embd = None
        config.merge_from_args(args)
    modes = {"train": train, "sample": sample}
    check_config(config.system, (
        ("mode", lambda v: v in modes, "train or sample"),
        ("length", lambda v: v >= 0, "0 or more"),
        ("temperature", lambda v: 0 <= v < math.inf, "0 (the likeliest character) or more"),
    ))
    check_config(config.data, (("block_size", lambda v: v >= 1, "1 or more"),))
    check_config(config.trainer, (("momentum", lambda v: 0 <= v < 1, "0 to below 1"),))
    config.system.prompt = config.system.prompt.replace("\\n", "\n") # as typed on a command line
    set_seed(config.system.seed)
    modes[config.system.mode](config)

if __name__ == "__main__":
    run_script(main)
