"""
Teaches a GPT to write like a text, character by character.

    python projects/chargpt/chargpt.py                              # Python's own help texts
    python projects/chargpt/chargpt.py --data.path=input.txt        # any text file in UTF-8
    python projects/chargpt/chargpt.py --data.path=tinyshakespeare  # or text8, enwik8
    python projects/chargpt/chargpt.py --system.mode=sample --system.prompt="The "
    python projects/chargpt/chargpt.py --help                       # every setting

Training takes three and a half minutes on one core; the data sets that are named are
downloaded once. The fourth line writes with the model that was saved last.
"""

import difflib
import hashlib
import io
import logging
import math
import zipfile
from pathlib import Path

import numpy as np
import requests
import torch
from torch import Tensor

from mingpt.checkpoint import load_model_state, read_checkpoint
from mingpt.data import TokenDataset, read_text
from mingpt.model import GPT, PRESETS
from mingpt.run import Run
from mingpt.utils import (
    CfgNode, cache_folder, check_config, progress, replacing, run_script, set_seed, setup_logging)

logger = logging.getLogger("mingpt.chargpt")


def get_config() -> CfgNode:
    """Returns the settings with their defaults."""
    C = CfgNode()

    C.system = CfgNode()
    C.system.mode = "train"  # or "sample": writes with the model in work_dir
    C.system.seed = 3407
    C.system.work_dir = "./out/chargpt"  # where the log, the metrics and the model go
    C.system.prompt = ""  # of a sample; empty takes the start of the validation text
    C.system.length = 500  # characters of a sample
    C.system.temperature = 0.8  # of a sample; 0 takes the likeliest character each time

    C.data = CfgNode()
    C.data.path = ""  # a text, tinyshakespeare, text8 or enwik8; empty: Python's help texts
    C.data.block_size = 64  # characters that the model sees at a time

    C.model = GPT.get_default_config()
    # The text and data.block_size decide these two.
    del C.model.vocab_size
    del C.model.block_size
    C.model.n_layer = 4
    C.model.n_head = 4
    C.model.n_embd = 128
    # A model of this size does not memorise its text.
    C.model.embd_pdrop = 0.0
    C.model.resid_pdrop = 0.0
    C.model.attn_pdrop = 0.0

    C.trainer = Run.get_default_config()
    C.trainer.optimizer = "muon"
    C.trainer.momentum = 0.85  # of Muon
    C.trainer.max_iters = 2000
    C.trainer.batch_size = 12
    C.trainer.learning_rate = 1e-2
    C.trainer.betas = (0.9, 0.99)
    C.trainer.schedule = "linear"
    C.trainer.eval_interval = 500
    C.trainer.eval_batches = 200  # spread evenly through the text; at the end all of it counts
    return C


# -----------------------------------------------------------------------------
# The text

# Each name has an address and the sha1 of the text.
DATASETS = {
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "04486597058d11dcc2c556b1d0433891eb639d2e"),
    "text8": ("http://mattmahoney.net/dc/text8.zip", "0dc3edebc970dcc96137e7deda4d9995af9d93de"),
    "enwik8": ("http://mattmahoney.net/dc/enwik8.zip", "57b8363b814821dc9d47aa4d41f58733519076b2"),
}
# Shares of a text that train, validate and test, as others split these two.
SHARES = {"text8": (0.9, 0.05, 0.05), "enwik8": (0.9, 0.05, 0.05)}
PART_CHARACTERS = 1 << 22


def fetch(name: str) -> Path:
    """Returns the file of a data set in the cache folder; the first time it is downloaded.

    Raises OSError for a failed download, and ValueError for contents other than expected:
    nothing is kept then.
    """
    address, sha1 = DATASETS[name]
    path = cache_folder() / name
    if path.is_file():
        return path
    try:
        with requests.get(address, stream=True, timeout=30) as response:
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0))
            parts = response.iter_content(1 << 20)
            content = b"".join(progress(parts, f"downloading {name}", math.ceil(size / (1 << 20))))
    except OSError as error:
        raise OSError(f"the download failed: {error}. Get {address} in another way, and put "
                      f"the text at {path}") from error

    wrong = f"{address} has the wrong contents; nothing was kept, try again"
    if address.endswith(".zip"):
        try:
            content = zipfile.ZipFile(io.BytesIO(content)).read(name)
        except (KeyError, zipfile.BadZipFile):
            raise ValueError(wrong) from None
    if hashlib.sha1(content).hexdigest() != sha1:
        raise ValueError(wrong)

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(content)
    return path


def find_text(name: str) -> str:
    """Returns the text of a file or a data set, or Python's help texts for an empty name."""
    if name == "":
        from pydoc_data.topics import topics
        return "\n".join(topics[topic] for topic in sorted(topics))
    if name == "enwik8":
        # It counts as bytes: each one is the character with its number.
        return fetch(name).read_bytes().decode("latin-1")
    if name in DATASETS:
        return read_text(fetch(name))

    near = difflib.get_close_matches(name, DATASETS, 1)
    if near and not Path(name).exists():
        raise ValueError(f"there is no text file {name}; did you mean {near[0]}?")
    return read_text(name)


def encode(text: str) -> tuple[str, np.ndarray]:
    """Returns the distinct characters of a text in order, and the text as their places there.

    >>> encode("abba")
    ('ab', array([0, 1, 1, 0], dtype=uint8))
    """
    chars = "".join(sorted(set(text)))
    if len(chars) < 2:
        raise ValueError(f"got a text with {len(chars)} distinct characters, expected two or more")
    table = np.zeros(ord(chars[-1]) + 1, dtype=np.uint8 if len(chars) <= 256 else np.uint32)
    table[[ord(char) for char in chars]] = np.arange(len(chars))

    # Part by part, since four bytes for each character are a lot of memory.
    tokens = np.empty(len(text), dtype=table.dtype)
    for start in range(0, len(text), PART_CHARACTERS):
        part = text[start:start + PART_CHARACTERS]
        numbers = np.frombuffer(part.encode("utf-32-le"), dtype=np.uint32)
        tokens[start:start + len(part)] = table[numbers]
    return chars, tokens


def split(tokens: np.ndarray, name: str, block_size: int) -> list[np.ndarray]:
    """Cuts a text into parts that train, validate and (large data sets) test.

    Raises ValueError for a text that is too short for one window in each part.
    """
    shares = SHARES.get(name, (0.9, 0.1))
    needed = math.ceil((block_size + 1) / min(shares)) + 1
    if len(tokens) < needed:
        raise ValueError(f"got a text of {len(tokens):,} characters, expected {needed:,} or more "
                         f"for block_size={block_size}; take a longer text or a smaller block_size")
    ends = [int(share * len(tokens)) for share in np.cumsum(shares[:-1])]
    return np.split(tokens, ends)


# -----------------------------------------------------------------------------
# The model

class CharGPT(GPT):
    """Predicts characters, and knows which they are.

    They are part of its state dict: a run on another text cannot resume a checkpoint.
    """

    def __init__(self, config: CfgNode, chars: str):
        super().__init__(config)
        self.chars = chars

    def get_extra_state(self) -> str:
        return self.chars

    def set_extra_state(self, chars: str) -> None:
        self.chars = chars

    def encode(self, prompt: str) -> Tensor:
        """Returns a prompt as tokens, (1, T); ValueError for characters that the text lacks."""
        unknown = sorted(set(prompt) - set(self.chars))
        if unknown:
            raise ValueError(
                f"the prompt has {', '.join(map(repr, unknown))}, which the model has never seen")
        return torch.tensor([[self.chars.index(char) for char in prompt]])

    def decode(self, tokens: Tensor) -> str:
        """Returns the text of tokens (T,)."""
        return "".join(self.chars[token] for token in tokens.tolist())


# -----------------------------------------------------------------------------
# What the script does

def train(config: CfgNode) -> None:
    """Trains a model, shows what it writes on the way, and saves it in work_dir."""
    name = config.data.path
    T = config.data.block_size
    chars, tokens = encode(find_text(name))
    train_tokens, *held_out = split(tokens, name, T)

    config.model.vocab_size = len(chars)
    config.model.block_size = T
    model = CharGPT(config.model, chars)
    prompt = config.system.prompt
    if not prompt:
        prompt = model.decode(torch.from_numpy(held_out[0][:math.ceil(T / 4)].astype(np.int64)))
    start = model.encode(prompt)  # (1, T)
    run = Run(config.trainer, model, TokenDataset(train_tokens, T),
              TokenDataset(held_out[0], T, stride=T), work_dir=config.system.work_dir)
    # Only now, so that a refused resume changes no file.
    setup_logging(config)
    logger.info(f"{len(tokens):,} characters, {len(chars)} of them distinct; "
                f"{len(train_tokens):,} to learn from, {len(held_out[0]):,} to validate")

    def show_sample(run: Run) -> None:
        written = model.generate(start.to(run.device), config.system.length // 2,
                                 config.system.temperature, do_sample=True)
        logger.info("-" * 80 + "\n" + model.decode(written[0]) + "\n" + "-" * 80)

    if not run.goes_on:
        # It writes before it has learned anything.
        run.add_callback("on_train_start", show_sample)
    run.add_callback("on_eval_end", show_sample)
    run.run()

    for label, part in zip(("validation", "test"), held_out):
        loss = run.evaluate(TokenDataset(part, T, stride=T))
        bits = loss / math.log(2)
        per_byte = bits / count_bytes(chars, part, name)
        logger.info(f"{label}, all {len(part):,} characters: {loss:.4f} nats each, "
                    f"{bits:.4f} bits, {per_byte:.4f} bits per byte")
    logger.info(f"the model is in {config.system.work_dir}")


def count_bytes(chars: str, tokens: np.ndarray, name: str) -> float:
    """Returns the mean number of bytes of a character in the file that the tokens came from."""
    if name == "enwik8":
        return 1.0
    widths = np.array([len(char.encode("utf-8")) for char in chars])
    return float(widths[tokens].mean())


def sample(config: CfgNode) -> None:
    """Prints a text that the model in work_dir writes."""
    path = Path(config.system.work_dir) / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"there is no model in {config.system.work_dir}; train one first, "
                         "or name its folder with --system.work_dir")
    # The text alone is wanted.
    logging.getLogger("mingpt").setLevel(logging.WARNING)
    content = read_checkpoint(path)
    if "_extra_state" not in content["model"]:
        raise ValueError(f"{path} is no model of this script: it lacks its characters")
    model = CharGPT(CfgNode(**content["model_config"]), content["model"]["_extra_state"])
    load_model_state(model, content["model"])

    prompt = config.system.prompt
    if not prompt:
        prompt = "\n" if "\n" in model.chars else model.chars[0]
    idx = model.encode(prompt)  # (1, T)
    print(prompt, end="")
    for token in model.stream(idx, config.system.length, config.system.temperature,
                              do_sample=True):
        print(model.decode(token), end="", flush=True)
    print()


def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    if config.model.model_type in PRESETS:
        # A preset replaces the sizes above; the command line may contradict it.
        config.model.n_layer = None
        config.model.n_head = None
        config.model.n_embd = None
        config.merge_from_args(args)

    modes = {"train": train, "sample": sample}
    check_config(config.system, (
        ("mode", lambda v: v in modes, "train or sample"),
        ("length", lambda v: v >= 0, "0 or more"),
        ("temperature", lambda v: 0 <= v < math.inf, "0 (the likeliest character) or more"),
    ))
    check_config(config.data, (("block_size", lambda v: v >= 1, "1 or more"),))
    # A new line is typed as \n on a command line.
    config.system.prompt = config.system.prompt.replace("\\n", "\n")
    set_seed(config.system.seed)
    modes[config.system.mode](config)


if __name__ == "__main__":
    run_script(main)
