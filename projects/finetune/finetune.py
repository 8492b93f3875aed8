"""
Trains a GPT on a text, in GPT-2's tokens: one with pretrained weights, such as GPT-2, or a fresh one.

    python projects/finetune/finetune.py --data.path=input.txt --model.name=gpt2            # or a folder, owner/model
    python projects/finetune/finetune.py --data.path=input.txt --model.model_type=gpt-micro # fresh weights
    python projects/finetune/finetune.py --system.mode=sample --system.prompt="My lord, "   # text from the result
    python projects/finetune/finetune.py --help                                             # every setting
"""

import hashlib
import json
import logging
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from mingpt.bpe import Encoder, get_encoder
from mingpt.data import TokenDataset, encode_file
from mingpt.model import GPT
from mingpt.trainer import Trainer, read_checkpoint
from mingpt.utils import FIRST, CfgNode, check_config, replacing, run_script, set_seed, setup_logging

sys.path.append(str(Path(__file__).resolve().parents[1])) # where projects keep what they share
from muon import MuonGPT

logger = logging.getLogger("mingpt.finetune")

def get_config() -> CfgNode:
    C = CfgNode()

    C.system = CfgNode()
    C.system.mode = "train" # or 'sample': write text with the trained model, or with the one that model.name says
    C.system.seed = 3407
    C.system.work_dir = "./out/finetune" # where the tokens, the log, the metrics and the model go
    C.system.prompt = "" # what a sample starts with; empty takes the start of the validation text, or a newline
    C.system.length = 200 # tokens of a sample
    C.system.temperature = 0.8 # of a sample; 0 is the likeliest token each time
    C.system.top_k = 40 # each token is drawn from so many likely ones

    C.data = CfgNode()
    C.data.path = "" # a text file in UTF-8; the last tenth of it is for validation
    C.data.block_size = 128 # tokens that the model sees at a time; the positions of a pretrained model are cut to this

    C.model = CfgNode()
    C.model.name = "" # pretrained weights: gpt2, gpt2-medium, ..., owner/model on the hub, or a folder
    C.model.model_type = "gpt-micro" # the sizes of a fresh model, if there is no name
    C.model.dropout = 0.1 # 0 turns it off
    C.model.last_blocks = None # train only this many blocks, from the end, and the last LayerNorm; None trains all

    C.trainer = Trainer.get_default_config()
    del C.trainer.work_dir # it is system.work_dir
    C.trainer.optimizer = "adamw" # or 'muon' for the matrices of the blocks
    C.trainer.max_iters = 500
    C.trainer.batch_size = 16
    C.trainer.learning_rate = None # None is 6.25e-5 with pretrained weights, as for GPT-1, else 1e-3
    C.trainer.warmup_iters = 20
    C.trainer.schedule = "linear" # down to 0 at max_iters
    C.trainer.log_interval = 50
    C.trainer.eval_interval = 100
    C.trainer.eval_batches = 50 # at the end all of the validation text counts
    C.trainer.keep_best = True # the model with the lowest validation loss is the result

    return C

# -----------------------------------------------------------------------------

def load_encoder(folder: str | Path) -> Encoder:
    """The vocabulary in a folder of the GPT-2 type, if there is one, else GPT-2's own."""
    vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
    if not (folder and vocabulary.is_file() and merges.is_file()):
        return get_encoder()
    try:
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = [(left, right) for left, right in map(str.split, lines[lines[0].startswith("#version"):])]
        return Encoder(json.loads(vocabulary.read_text(encoding="utf-8")), pairs)
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{vocabulary} and {merges} are no vocabulary of the GPT-2 type: {error!r}") from None

def save_encoder(encoder: Encoder, folder: Path) -> None:
    """Writes the two files that load_encoder and transformers' GPT2Tokenizer read."""
    merges = "\n".join(map(" ".join, encoder.bpe_ranks))
    for name, text in (("vocab.json", json.dumps(encoder.encoder)), ("merges.txt", f"#version: 0.2\n{merges}\n")):
        with replacing(folder / name) as part:
            part.write_text(text, encoding="utf-8")

def encode_text(encoder: Encoder, path: str, work_dir: Path) -> np.ndarray:
    """The tokens of a text. They are kept in a file whose name changes with the text and the vocabulary."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        raise ValueError(f"got --data.path={path}, expected the name of a text file that is not empty")
    digest = hashlib.sha256(json.dumps([encoder.encoder, list(encoder.bpe_ranks)]).encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    tokens = work_dir / f"tokens-{digest.hexdigest()[:16]}.bin"
    work_dir.mkdir(parents=True, exist_ok=True)
    if FIRST and not tokens.exists():
        encode_file(encoder, path, tokens, allowed_special=encoder.special_tokens)
    while not tokens.exists(): # the other processes wait for the first
        time.sleep(0.1)
    return np.memmap(tokens, dtype=np.uint16, mode="r")

def load_model(config: CfgNode, encoder: Encoder) -> MuonGPT:
    """The model to train, with fresh or pretrained weights, in float32; only its first block_size positions."""
    name, T = config.model.name, config.data.block_size
    if name:
        pretrained = GPT.from_pretrained(name)
        settings, weights = pretrained.config, pretrained.state_dict()
        if T > pretrained.block_size:
            raise ValueError(f"got --data.block_size={T}, but {name} has only {pretrained.block_size} positions")
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:T]
    else:
        settings, weights = GPT.get_default_config(), None
        settings.model_type, settings.vocab_size = config.model.model_type, max(encoder.decoder) + 1
    if max(encoder.decoder) >= settings.vocab_size:
        raise ValueError(f"{name} knows {settings.vocab_size} tokens, but the vocabulary goes up to number "
                         f"{max(encoder.decoder)}; put the vocab.json and merges.txt of the model into its folder")
    settings.block_size = T
    settings.embd_pdrop = settings.resid_pdrop = settings.attn_pdrop = config.model.dropout
    model = MuonGPT(settings)
    if weights:
        model.load_state_dict(weights)
    if (count := config.model.last_blocks) is not None:
        if count not in range(len(model.transformer.h) + 1):
            raise ValueError(f"got --model.last_blocks={count}, expected 0 to {len(model.transformer.h)} or None")
        model.requires_grad_(False)
        for module in (*model.transformer.h[len(model.transformer.h) - count:], model.transformer.ln_f):
            module.requires_grad_(True)
    return model

def train(config: CfgNode) -> None:
    work_dir, T = Path(config.system.work_dir), config.data.block_size
    encoder = load_encoder(config.model.name)
    tokens = encode_text(encoder, config.data.path, work_dir)
    split = len(tokens) * 9 // 10
    train_dataset, val_dataset = TokenDataset(tokens[:split], T), TokenDataset(tokens[split:], T, stride=T)
    model = load_model(config, encoder)
    if config.trainer.learning_rate is None:
        config.trainer.learning_rate = 6.25e-5 if config.model.name else 1e-3
    if config.trainer.lr_decay_iters is None:
        config.trainer.lr_decay_iters = config.trainer.max_iters
    config.trainer.work_dir = config.system.work_dir
    prompt = encoder.encode(config.system.prompt.replace("\\n", "\n")) or tokens[split:split + 16].tolist()
    trainer = Trainer(config.trainer, model, train_dataset, val_dataset)
    setup_logging(config) # only now: a refused resume changes no file
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(f"{len(tokens):,} tokens: {split:,} to learn from, {len(tokens) - split:,} to validate; "
                f"{trained:,} parameters are trained")

    def report(trainer: Trainer) -> None:
        loss = trainer.evaluate(val_dataset)
        logger.info(f"validation loss over all tokens: {loss:.4f} nats per token, perplexity {math.exp(loss):.1f}")
        idx = torch.tensor([prompt], device=trainer.device) # (1, T)
        written = model.generate(idx, config.system.length, config.system.temperature, True, config.system.top_k)[0]
        logger.info("-" * 80 + "\n" + encoder.decode(written) + "\n" + "-" * 80)
        if trainer.iter_num == 0: # where the curve of the validation loss begins
            trainer.write_metrics(split="val", loss=loss)

    if not config.trainer.resume:
        trainer.add_callback("on_train_start", report)
    trainer.run()
    if config.trainer.keep_best and (work_dir / "best.pt").exists():
        best = read_checkpoint(work_dir / "best.pt")
        model.load_state_dict(best["model"])
        logger.info(f"the best model is that of step {best['iter_num']}")
    report(trainer)
    if FIRST:
        model.save_pretrained(work_dir / "model")
        save_encoder(encoder, work_dir / "model")
    logger.info(f"the model is in {work_dir / 'model'}")

def sample(config: CfgNode) -> None:
    folder = config.model.name or Path(config.system.work_dir, "model")
    if not config.model.name and not folder.is_dir():
        raise ValueError(f"there is no model in {folder}; train one first, or say where it is by --system.work_dir")
    logging.getLogger("mingpt").setLevel(logging.WARNING) # the text alone is wanted
    encoder, model = load_encoder(folder), GPT.from_pretrained(folder).float()
    prompt = config.system.prompt.replace("\\n", "\n") or "\n"
    tokens = model.stream(torch.tensor([encoder.encode(prompt)]), config.system.length, config.system.temperature,
                          do_sample=True, top_k=config.system.top_k, stop_token=encoder.eot_token)
    print(prompt, end="")
    for text in encoder.decode_stream(tokens):
        print(text, end="", flush=True)
    print()

def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    modes = {"train": train, "sample": sample}
    check_config(config.system, (
        ("mode", lambda v: v in modes, "train or sample"),
        ("length", lambda v: v >= 0, "0 or more"),
        ("temperature", lambda v: 0 <= v < math.inf, "0 (the likeliest token) or more"),
        ("top_k", lambda v: v >= 1, "1 or more"),
    ))
    set_seed(config.system.seed)
    modes[config.system.mode](config)

if __name__ == "__main__":
    run_script(main)
