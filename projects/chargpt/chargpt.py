"""
Teaches a GPT to write like a text, character by character.

    python projects/chargpt/chargpt.py                                  # Python's own help texts, a minute or two on a CPU
    python projects/chargpt/chargpt.py --data.path=input.txt            # any text file in UTF-8
    python projects/chargpt/chargpt.py --data.path=tinyshakespeare      # or text8, enwik8: fetched once
    python projects/chargpt/chargpt.py --system.mode=sample --system.prompt="The "      # text from the saved model
    python projects/chargpt/chargpt.py --help                           # every setting
"""

import hashlib
import json
import logging
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from muon import Muon, Optimizers
from mingpt.model import GPT
from mingpt.trainer import Trainer
from mingpt.utils import CfgNode, cache_dir, download, read_text, replacing, set_seed, setup_logging

logger = logging.getLogger("mingpt.chargpt")

# -----------------------------------------------------------------------------

def get_config() -> CfgNode:
    C = CfgNode()

    C.system = CfgNode()
    C.system.mode = "train" # or 'sample': write text with the model in work_dir
    C.system.seed = 3407
    C.system.work_dir = "./out/chargpt" # where the log, the metrics and the model go
    C.system.prompt = None # what a sample starts with; None takes the first characters of the validation text
    C.system.length = 500 # characters of a sample
    C.system.temperature = 0.8 # of a sample; 0 is the likeliest character each time

    C.data = CfgNode()
    C.data.path = None # a text file, or tinyshakespeare, text8, enwik8; None takes Python's help texts (pydoc_data.topics)
    C.data.block_size = 64 # characters that the model sees at a time

    C.model = GPT.get_default_config()
    C.model.n_layer, C.model.n_head, C.model.n_embd = 4, 4, 128
    C.model.embd_pdrop = C.model.resid_pdrop = C.model.attn_pdrop = 0.0 # a small model does not learn its text by heart

    C.trainer = Trainer.get_default_config()
    C.trainer.optimizer = "muon" # for the matrices of the blocks; 'adamw' for all
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
    path = cache_dir() / name
    if not path.exists():
        archive = download(address, cache_dir() / f"{name}.download")
        try:
            with zipfile.ZipFile(archive).open(name) if address.endswith(".zip") else open(archive, "rb") as source, \
                    replacing(path) as part, open(part, "wb") as out:
                digest = hashlib.sha1()
                while block := source.read(1 << 20):
                    digest.update(block)
                    out.write(block)
                if digest.hexdigest() != sha1:
                    raise ValueError(f"its text has the sha1 {digest.hexdigest()}, not {sha1}")
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{address} has the wrong contents: {error}. Nothing was kept; try again") from error
        finally:
            archive.unlink()
    return path

def read_blocks(name: str | None):
    """The text piece by piece. enwik8 is bytes by convention: each is read as the character of its number."""
    if name is None:
        from pydoc_data.topics import topics
        yield "\n".join(topics[topic] for topic in sorted(topics))
    elif name == "enwik8":
        with open(fetch(name), "rb") as file:
            while block := file.read(1 << 22):
                yield block.decode("latin-1")
    else:
        yield from read_text(fetch(name) if name in DATASETS else name)

def load_text(name: str | None) -> tuple[str, np.ndarray]:
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

class CharDataset(Dataset):
    """Windows of block_size characters, each with the characters that follow them; they begin `stride` apart."""

    def __init__(self, text: np.ndarray, block_size: int, stride: int = 1):
        if len(text) <= block_size:
            raise ValueError(f"got a text of {len(text)} characters for a block_size of {block_size}; take a longer text (a tenth of "
                             "it is for validation) or a smaller --data.block_size")
        self.text, self.block_size, self.stride = text, block_size, stride

    def __len__(self) -> int:
        return math.ceil((len(self.text) - self.block_size - 1) / self.stride) + 1

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: x (B, T) and y (B, T), one character later."""
        starts = np.minimum(np.asarray(indices) * self.stride, len(self.text) - self.block_size - 1) # the last ends with the text
        windows = torch.from_numpy(self.text[starts[:, None] + np.arange(self.block_size + 1)].astype(np.int64)) # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.__getitems__([index])
        return x[0], y[0]

class CharGPT(GPT):
    """A GPT whose matrices Muon may train."""

    def configure_optimizers(self, train_config) -> torch.optim.AdamW | Optimizers:
        """GPT's AdamW; with the optimizer 'muon' that one has only what has no weight decay, and Muon has the matrices."""
        adamw = super().configure_optimizers(train_config)
        if train_config.optimizer == "adamw":
            return adamw
        if train_config.optimizer != "muon":
            raise ValueError(f"got --trainer.optimizer={train_config.optimizer}, expected muon or adamw")
        matrices = adamw.param_groups.pop(0)["params"]
        return Optimizers(adamw, Muon(matrices, train_config.learning_rate, train_config.weight_decay))

# -----------------------------------------------------------------------------

def encode_prompt(prompt: str, chars: str, device) -> torch.Tensor:
    """A prompt as the model wants it: (1, T). Raises ValueError for characters that its text lacks."""
    if unknown := sorted(set(prompt) - set(chars)):
        raise ValueError(f"the prompt has {unknown}, which the model has never seen; it knows {chars!r}")
    return torch.tensor([[chars.index(char) for char in prompt]], device=device)

# -----------------------------------------------------------------------------

def train(config: CfgNode) -> None:
    chars, text = load_text(config.data.path)
    shares = DATASETS[config.data.path][2] if config.data.path in DATASETS else (0.9, 0.1)
    train_text, *held_out = np.split(text, [int(share * len(text)) for share in np.cumsum(shares[:-1])])
    T = config.data.block_size
    train_dataset, val_dataset = CharDataset(train_text, T), CharDataset(held_out[0], T, stride=T)
    config.data.chars = chars # config.json keeps them for sampling
    config.model.vocab_size, config.model.block_size = len(chars), T
    if config.trainer.lr_decay_iters is None:
        config.trainer.lr_decay_iters = config.trainer.max_iters
    config.trainer.work_dir = config.system.work_dir
    prompt = config.system.prompt or "".join(chars[i] for i in val_dataset.text[:T // 4])
    model = CharGPT(config.model)
    config.model = model.config
    setup_logging(config)
    trainer = Trainer(config.trainer, model, train_dataset, val_dataset)
    prompt = encode_prompt(prompt, chars, trainer.device)
    logger.info(f"{len(text):,} characters, {len(chars)} of them distinct; {len(train_text):,} to learn from, {len(held_out[0]):,} to validate")

    def show_sample(trainer: Trainer) -> None:
        written = model.generate(prompt, config.system.length // 2, config.system.temperature, do_sample=True)[0]
        logger.info("-" * 80 + "\n" + "".join(chars[i] for i in written) + "\n" + "-" * 80)

    if not config.trainer.resume: # what it writes before it has learned anything
        trainer.add_callback("on_train_start", show_sample)
    trainer.add_callback("on_eval_end", show_sample)
    trainer.run()
    for name, part in zip(("validation", "test"), held_out):
        loss = trainer.evaluate(CharDataset(part, T, stride=T))
        logger.info(f"{name} loss over all {len(part):,} characters: {loss:.4f} nats, {loss / math.log(2):.4f} bits per character")
    logger.info(f"the model is in {config.system.work_dir}")

def sample(config: CfgNode) -> None:
    folder = Path(config.system.work_dir)
    if not (folder / "checkpoint.pt").is_file():
        raise ValueError(f"there is no model in {folder}; train one first, or name its folder with --system.work_dir")
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    chars = saved["data"]["chars"]
    model = GPT(CfgNode(**saved["model"]))
    model.load_state_dict(torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["model"])
    prompt = config.system.prompt or "\n" * ("\n" in chars) or chars[0]
    print(prompt, end="")
    for token in model.stream(encode_prompt(prompt, chars, "cpu"), config.system.length, config.system.temperature, do_sample=True):
        print(chars[token.item()], end="", flush=True)
    print()

def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    set_seed(config.system.seed)
    modes = {"train": train, "sample": sample}
    if config.system.mode not in modes:
        raise ValueError(f"got --system.mode={config.system.mode}, expected {' or '.join(modes)}")
    modes[config.system.mode](config)

if __name__ == "__main__":
    main(sys.argv[1:])
