"""
Trains a GPT on a text: one with pretrained weights, such as GPT-2, or a fresh one.

    python projects/finetune/finetune.py --data.path=input.txt --model.name=gpt2
    python projects/finetune/finetune.py --data.path=input.txt --model.model_type=gpt-micro
    python projects/finetune/finetune.py --system.mode=sample --system.prompt="My lord, "
    python projects/finetune/finetune.py --help

The first line goes on from pretrained weights, the second starts with fresh ones, the
third writes with the result, and the last shows every setting.
"""

import logging
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mingpt.bpe import Encoder, get_encoder
from mingpt.checkpoint import read_checkpoint
from mingpt.data import TokenDataset, read_text
from mingpt.model import GPT
from mingpt.pretrained import crop_model, load_encoder, save_encoder
from mingpt.processes import gather, rank
from mingpt.run import Run
from mingpt.utils import CN, check_config, run_script, set_seed, setup_logging

logger = logging.getLogger("mingpt.finetune")


def get_config() -> CN:
    C = CN()

    C.system = CN()
    C.system.mode = "train"  # or 'sample': write text with the result, or with --model.name
    C.system.seed = 3407
    C.system.work_dir = "./out/finetune"  # where the log, the metrics and the model go
    C.system.prompt = ""  # the start of a sample; empty takes the validation text's
    C.system.length = 200  # tokens of a sample
    C.system.temperature = 0.8  # of a sample; 0 takes the likeliest token each time
    C.system.top_k = 40  # a token of a sample is drawn from this many likely ones

    C.data = CN()
    C.data.path = ""  # a text in UTF-8; the last tenth of it is for validation
    C.data.block_size = 128  # tokens that the model sees; pretrained positions are cut to it
    C.data.vocabulary = ""  # a folder with vocab.json and merges.txt; empty takes the model's

    C.model = CN()
    C.model.name = ""  # pretrained weights: gpt2, gpt2-medium, ..., owner/model, or a folder
    C.model.model_type = "gpt-micro"  # the sizes of a fresh model, if there is no name
    C.model.dropout = 0.1  # 0 turns it off
    C.model.last_blocks = None  # train only so many blocks, the last ones, and ln_f

    C.trainer = Run.get_default_config()
    C.trainer.max_iters = 500
    C.trainer.batch_size = 16
    C.trainer.learning_rate = None  # None: 6.25e-5 for pretrained weights (as GPT-1), else 1e-3
    C.trainer.warmup_iters = None  # None: 20 steps, at most a fifth of all
    C.trainer.schedule = "linear"  # down to 0 at max_iters
    C.trainer.log_interval = 50
    C.trainer.eval_interval = 100
    C.trainer.eval_batches = 50  # before and after training, all of the validation text counts
    C.trainer.keep_best = True  # the result is the model with the lowest validation loss

    return C


# -----------------------------------------------------------------------------


def load_model(config: CN) -> tuple[GPT, Encoder]:
    """Makes the model to train, in float32, and the encoder that goes with it."""
    model, encoder = start_pretrained(config) if config.model.name else start_fresh(config)
    count = config.model.last_blocks
    if count is not None:
        blocks = list(model.transformer.h)
        if count not in range(len(blocks) + 1):
            raise ValueError(f"got --model.last_blocks={count}, expected 0 to {len(blocks)}")
        model.requires_grad_(False)
        for module in (*blocks[len(blocks) - count:], model.transformer.ln_f):
            module.requires_grad_(True)
    return model, encoder


def load_pretrained(name: str | Path, vocabulary: str) -> tuple[GPT, Encoder]:
    """Loads a model in float32, without rows that stand for no token, and its encoder."""
    model = GPT.from_pretrained(name).float()
    encoder = load_encoder(vocabulary if vocabulary else name, model.config.vocab_size)
    crop_model(model, model.block_size, max(encoder.decoder) + 1)
    return model, encoder


def start_pretrained(config: CN) -> tuple[GPT, Encoder]:
    """Loads a model and cuts it to the first block_size positions."""
    name = config.model.name
    T = config.data.block_size
    model, encoder = load_pretrained(name, config.data.vocabulary)
    if T > model.block_size:
        raise ValueError(f"got --data.block_size={T}, but {name} has only "
                         f"{model.block_size} positions")
    crop_model(model, T, model.config.vocab_size)

    dropout = config.model.dropout
    model.config.merge_from_dict(dict(embd_pdrop=dropout, resid_pdrop=dropout, attn_pdrop=dropout))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model, encoder


def start_fresh(config: CN) -> tuple[GPT, Encoder]:
    """Builds a model with fresh weights, for GPT-2's vocabulary or one of your own."""
    encoder = load_encoder(config.data.vocabulary) if config.data.vocabulary else get_encoder()
    dropout = config.model.dropout
    settings = GPT.get_default_config()
    settings.model_type = config.model.model_type
    settings.vocab_size = max(encoder.decoder) + 1
    settings.block_size = config.data.block_size
    settings.embd_pdrop = dropout
    settings.resid_pdrop = dropout
    settings.attn_pdrop = dropout
    # A large vocabulary is most of a small model, so one matrix serves twice.
    settings.tie_weights = True

    return GPT(settings), encoder


def encode_text(config: CN, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens to learn from, and the last tenth, to validate."""
    text = read_text(config.data.path)
    if not text:
        raise ValueError(f"{config.data.path} is empty, expected a text")

    tokens = np.array(encoder.encode(text, encoder.special_tokens))
    split = len(tokens) * 9 // 10
    # A window and the token after it must fit into the last tenth.
    least = config.data.block_size + 1
    if len(tokens) - split < least:
        characters = math.ceil(10 * least * len(text) / len(tokens))
        raise ValueError(f"{config.data.path} has {len(text):,} characters, expected about "
                         f"{characters:,} or more: a tenth of them is for validation, and "
                         f"{least} tokens the least; or lower --data.block_size")
    return tokens[:split], tokens[split:]


def count_bytes(encoder: Encoder, tokens: np.ndarray) -> int:
    """Counts the bytes of text that tokens stand for."""
    lengths = np.zeros(max(encoder.decoder) + 1, dtype=np.int64)  # (V,)
    for number, spelled in encoder.token_bytes.items():
        lengths[number] = len(spelled)
    return int(lengths[tokens].sum())


def train(config: CN) -> None:
    work_dir = Path(config.system.work_dir).expanduser()
    T = config.data.block_size
    model, encoder = load_model(config)
    tokens, val_tokens = encode_text(config, encoder)
    val_dataset = TokenDataset(val_tokens, T, stride=T)
    # The first token of a text is no target.
    bytes_per_token = count_bytes(encoder, val_tokens[1:]) / (len(val_tokens) - 1)
    prompt = encoder.encode(config.system.prompt.replace("\\n", "\n"))
    if not prompt:
        prompt = val_tokens[:16].tolist()

    if config.trainer.learning_rate is None:
        config.trainer.learning_rate = 6.25e-5 if config.model.name else 1e-3
    if config.trainer.warmup_iters is None:
        config.trainer.warmup_iters = min(20, config.trainer.max_iters // 5)
    run = Run(config.trainer, model, TokenDataset(tokens, T), val_dataset, work_dir=work_dir)
    # Only now: a refused resume changes no file.
    setup_logging(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(f"{len(tokens):,} tokens to learn from, {len(val_tokens):,} to validate; "
                f"{trained:,} parameters are trained")

    def report(run: Run) -> None:
        """Logs the validation loss, and a text that the model writes."""
        loss = run.evaluate(val_dataset)
        bits_per_byte = loss / math.log(2) / bytes_per_token
        logger.info(f"validation loss {loss:.4f} nats per token, perplexity {math.exp(loss):.1f}, "
                    f"{bits_per_byte:.4f} bits per byte")
        if run.iter_num == 0:
            # The curve of the validation loss begins here.
            run.write_metrics(split="val", loss=loss)

        idx = torch.tensor([prompt], device=run.device)  # (1, T)
        written = model.generate(idx, config.system.length, config.system.temperature, True,
                                 config.system.top_k)[0]
        line = "-" * 80
        logger.info(f"{line}\n{encoder.decode(written)}\n{line}")

    def report_start(run: Run) -> None:
        if run.iter_num == 0:
            report(run)

    run.add_callback("on_train_start", report_start)
    run.run()
    best = None
    if rank() == 0 and config.trainer.keep_best and (work_dir / "best.pt").exists():
        saved = read_checkpoint(work_dir / "best.pt")
        best = {"model": saved["model"], "step": saved["iter_num"]}
    # Processes on other machines do not have this file.
    best = gather(best)[0]
    if best is not None:
        model.load_state_dict(best["model"])
        logger.info(f"the best model is from step {best['step']}")
    # The model is safe before anything else can fail.
    if rank() == 0:
        model.save_pretrained(work_dir / "model")
        save_encoder(encoder, work_dir / "model")
    logger.info(f"the model is in {work_dir / 'model'}")
    report(run)


def sample(config: CN) -> None:
    """Prints a text, token by token as it comes."""
    name = config.model.name
    if not name:
        name = Path(config.system.work_dir, "model").expanduser()
        if not name.is_dir():
            raise ValueError(f"there is no model in {name}; train one first, or say where it is "
                             "by --system.work_dir")
    # Only the text is wanted.
    logging.getLogger("mingpt").setLevel(logging.WARNING)
    model, encoder = load_pretrained(name, config.data.vocabulary)

    prompt = config.system.prompt.replace("\\n", "\n")
    if not prompt:
        prompt = "\n"
    idx = torch.tensor([encoder.encode(prompt)])  # (1, T)
    tokens = model.stream(idx, config.system.length, config.system.temperature, do_sample=True,
                          top_k=config.system.top_k, stop_token=encoder.eot_token)
    print(prompt, end="")
    for text in encoder.decode_stream(tokens):
        print(text, end="", flush=True)
    print()


def main(args: list[str]) -> None:
    config = get_config()
    config.merge_from_args(args)
    check_config(config.system, (
        ("mode", lambda v: v in ("train", "sample"), "train or sample"),
        ("length", lambda v: v >= 0, "0 or more"),
        ("temperature", lambda v: 0 <= v < math.inf, "0 (the likeliest token) or more"),
        ("top_k", lambda v: v >= 1, "1 or more"),
    ))

    set_seed(config.system.seed)
    if config.system.mode == "sample":
        sample(config)
    else:
        check_config(config.data, (("path", lambda v: v != "", "the name of a text file"),))
        train(config)


if __name__ == "__main__":
    run_script(main)
