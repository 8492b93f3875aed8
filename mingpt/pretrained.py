"""
Reads and writes models of the GPT-2 type: a folder, or a repository of the Hugging Face hub.

    model = GPT.from_pretrained("gpt2")        # or "owner/repository", or a folder
    encoder = load_encoder("gpt2", model.config.vocab_size)
    model.save_pretrained("my-gpt2")           # transformers reads this folder, too
    save_encoder(encoder, "my-gpt2")

A folder holds config.json; the weights, in one file, or in several with an index
that names the file of each tensor; and the vocabulary, in tokenizer.json, or in
vocab.json and merges.txt.
"""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mingpt.bpe import Encoder, get_encoder
from mingpt.utils import logger, replacing

INSTALL = "pip install huggingface_hub safetensors"
HUB_NAMES = {name: f"openai-community/{name}"
             for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
HUB_NAMES["distilgpt2"] = "distilbert/distilgpt2"
# One file, or an index and its parts. The form that is preferred comes first.
WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
VOCABULARY_FILES = ("tokenizer.*", "vocab.*", "merges.txt", "added_tokens.json", "*.model")
HEAD = "lm_head.weight"

# A GPT's configuration has these fields under the same names.
SHARED_FIELDS = ("vocab_size", "n_layer", "n_head", "n_embd",
                 "embd_pdrop", "resid_pdrop", "attn_pdrop")
# These are only kept, and saved again.
KEPT_FIELDS = ("bos_token_id", "eos_token_id")
# Settings in which GPT-2 models differ, and the values that this library
# supports, the default first. "gelu" is the exact form, the other names mean
# the tanh form.
MODEL_CHOICES = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True, False),
}
# The same for the parts of tokenizer.json.
TOKENIZER_CHOICES: dict[str, dict[str, tuple]] = {
    "normalizer": {"type": (None,)},
    "pre_tokenizer": {"type": ("ByteLevel",), "add_prefix_space": (False,), "use_regex": (True,)},
    "model": {"type": ("BPE",), "continuing_subword_prefix": (None, ""),
              "end_of_word_suffix": (None, ""), "byte_fallback": (False,),
              "ignore_merges": (False,)},
}

# ---- Models ------------------------------------------------------------------


class SkipInit(TorchFunctionMode):
    """Draws no fresh weights: they would cost seconds, and random numbers of the caller's seed."""

    # torch calls this in place of each function. The functions of torch.nn.init
    # get `tensor` by name.
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def load_pretrained(cls: Any, name: str | Path) -> Any:
    """Loads a model of class `cls`, in eval mode and in the precision of its weights.

    name: a folder, "owner/repository" or a key of HUB_NAMES. FileNotFoundError if
    it is missing, ValueError if it is broken or another kind of model, OSError if
    the hub fails, ImportError if a package is missing.
    """
    folder = _find_folder(name)
    settings = _read_json(folder / "config.json")
    _check_choices(folder / "config.json", settings, MODEL_CHOICES)
    tensors = _read_weights(folder)

    config = cls.get_default_config()
    config.merge_from_dict({field: settings[field] for field in SHARED_FIELDS if field in settings})
    config.block_size = settings.get("n_positions")
    config.tie_weights = settings.get("tie_word_embeddings", True) or HEAD not in tensors
    layers = {key.split(".")[2] for key in tensors if key.startswith("transformer.h.")}
    try:
        # A million layers would take minutes to build.
        if len(layers) != config.n_layer:
            raise ValueError(f"n_layer is {config.n_layer!r}, but {len(layers)} have weights")
        with SkipInit():
            model = cls(config)
        # safetensors maps its files: a weight is read when it is first used.
        state = {key: _transpose(key, tensor) for key, tensor in tensors.items()}
        model.load_state_dict(state, assign=True)
    except (ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"config.json and the weights in {folder} do not make a model: "
                         f"{problem}") from None

    # The model is no longer tied if a head of its own was among the weights.
    if model.config.tie_weights:
        model.tie_weights()
    if settings.get("activation_function") == "gelu":
        for block in model.transformer.h:
            block.mlp.act = nn.GELU()
    kept = {field: settings[field] for field in KEPT_FIELDS if field in settings}
    model.config.merge_from_dict(kept)
    return model.eval()


def crop_model(model: Any, block_size: int, vocab_size: int) -> None:
    """Cuts a model, in place, to its first positions and the rows of its first tokens.

    Rows without a token, where a vocabulary is padded, could be drawn otherwise.
    """
    t = model.transformer
    for module, size in ((t.wpe, block_size), (t.wte, vocab_size), (model.lm_head, vocab_size)):
        # A copy, since a view would keep all rows in memory and in checkpoints.
        module.weight.data = module.weight.data[:size].clone()  # (rows, C) -> (size, C)
    t.wpe.num_embeddings = block_size
    t.wte.num_embeddings = vocab_size
    model.lm_head.out_features = vocab_size
    model.block_size = block_size
    model.config.block_size = block_size
    model.config.vocab_size = vocab_size


def save_pretrained(model: Any, folder: str | Path, GPT: Any) -> None:
    """Writes config.json and model.safetensors over an earlier model in the folder.

    Without the package safetensors the weights are in pytorch_model.bin. ValueError
    for a model with a part that the class GPT lacks, since no such folder can hold it.
    """
    # A model may have no block, or other blocks.
    activation = dict(model.named_modules()).get("transformer.h.0.mlp.act")
    _check_parts(model, GPT, activation)
    is_exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": model.config.block_size,
        "activation_function": "gelu" if is_exact else "gelu_new",
        "tie_word_embeddings": model.is_tied,
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
    }
    config |= {field: getattr(model.config, field) for field in SHARED_FIELDS}
    # Without these fields transformers takes 50256, GPT-2's <|endoftext|>.
    eot = 50256 if model.config.vocab_size == 50257 else None
    config |= {field: getattr(model.config, field, eot) for field in KEPT_FIELDS}
    state = model.state_dict()
    if model.is_tied:
        del state[HEAD]
    # In a file of safetensors no tensors share memory.
    state = {key: _transpose(key, tensor).clone(memory_format=torch.contiguous_format)
             for key, tensor in state.items()}

    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from safetensors.torch import save_file
        name = "model.safetensors"
    except ImportError:
        name = "pytorch_model.bin"
    with replacing(folder / name) as weights, replacing(folder / "config.json") as settings:
        settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if name == "model.safetensors":
            save_file(state, weights, metadata={"format": "pt"})
            # save_file makes a file that only its owner can read.
            shutil.copymode(settings, weights)
        else:
            torch.save(state, weights)

    # Other weights, and settings for generation, belong to the earlier model.
    for pattern in (*WEIGHT_FILES[0], *WEIGHT_FILES[1], "generation_config.json"):
        for path in folder.glob(pattern):
            if path.name != name:
                path.unlink()


def _check_parts(model: Any, GPT: Any, activation: nn.Module | None) -> None:
    """Raises ValueError, with its name, for a part of a model that GPT-2 does not have."""
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        # "meta" is a device without memory.
        with torch.device("meta"):
            gpt2 = GPT(model.config)
    finally:
        logger.disabled = was_disabled

    if isinstance(activation, nn.GELU):
        for block in gpt2.transformer.h:
            block.mlp.act = nn.GELU(activation.approximate)
    parts = _describe(model)
    expected = _describe(gpt2)
    for name in [*expected, *parts]:
        if parts.get(name) != expected.get(name):
            raise ValueError(f"a folder of the GPT-2 type cannot hold this model: {name} is "
                             "not GPT-2's")


def _describe(model: nn.Module) -> dict[str, Any]:
    """Returns what a model computes, but for the values of its weights: {name: part}."""
    parts: dict[str, Any] = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # A module that stands in several places counts in each.
    for name, module in model.named_modules(remove_duplicate=False):
        # These two compute nothing when a model is used.
        if isinstance(module, nn.Dropout) or type(module) is nn.Identity:
            continue

        # A folder holds no loss, so the whole model's forward may differ.
        forward = "features" if module is model else "forward"
        for field in (forward, "attend", "compute_qkv", "mlpf", "eps", "n_head", "approximate"):
            value = getattr(module, field, None)
            # Methods of two modules are equal if their functions are. The
            # whole model has no name.
            parts[f"{name}.{field}".lstrip(".")] = getattr(value, "__func__", value)

        mask = getattr(module, "_mask", None)
        is_causal = mask is None or torch.equal(mask != 0, torch.ones_like(mask).tril() != 0)
        parts[f"{name}.mask"] = is_causal
    return parts


# ---- Vocabularies ------------------------------------------------------------


def load_encoder(name: str | Path, vocab_size: int | None = None) -> Encoder:
    """Loads the encoder of a model, from where its weights are.

    vocab_size is the number of the model's rows, which may be more than there are
    tokens. With OpenAI's 50,257 and no vocabulary there, OpenAI's is taken. Without a
    model, None takes a folder of any size. ValueError if the vocabulary is missing,
    broken, too large or of another kind than GPT-2's; else as load_pretrained.
    """
    folder = _find_folder(name)
    files = {path.name for pattern in VOCABULARY_FILES for path in folder.glob(pattern)}
    if vocab_size == 50257 and not files:
        return get_encoder()
    rows = math.inf if vocab_size is None else vocab_size

    try:
        if "tokenizer.json" in files:
            vocabulary, merges, added = _read_tokenizer(folder / "tokenizer.json")
        elif {"vocab.json", "merges.txt"} <= files:
            vocabulary, merges, added = _read_vocabulary(folder)
        else:
            raise ValueError("put its tokenizer.json there, or its vocab.json and merges.txt")
        for token, number in (vocabulary | added).items():
            if token == "" or type(number) is not int or not 0 <= number < rows:
                raise ValueError(f"got the token {token!r} with the number {number!r}, expected "
                                 f"a text and one of the {rows} rows of the model")
        return Encoder(vocabulary, merges, added)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder} holds no vocabulary of this model: {error}") from None


def _read_tokenizer(path: Path) -> tuple[dict, list, dict]:
    """Reads the vocabulary, the merges and the added tokens of a tokenizer.json."""
    content = _read_json(path)
    for part, choices in TOKENIZER_CHOICES.items():
        _check_choices(f"the {part} of {path.name}", content.get(part) or {"type": None}, choices)
    # Old files have "a b" where newer ones have ["a", "b"].
    merges = [pair.split(" ") if isinstance(pair, str) else pair
              for pair in content["model"]["merges"]]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return content["model"]["vocab"], merges, added


def _read_vocabulary(folder: Path) -> tuple[dict, list, dict]:
    """Reads the same from vocab.json, merges.txt and added_tokens.json."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    if lines[0].startswith("#version"):
        del lines[0]
    merges = [line.split() for line in lines if line.strip()]
    added = folder / "added_tokens.json"
    return _read_json(folder / "vocab.json"), merges, _read_json(added) if added.is_file() else {}


def save_encoder(encoder: Encoder, folder: str | Path) -> None:
    """Writes vocab.json, merges.txt and added_tokens.json over an earlier vocabulary.

    load_encoder and transformers' GPT2Tokenizer read them.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [" ".join(pair) for pair in encoder.bpe_ranks]
    for name, text in (
        ("vocab.json", json.dumps(encoder.encoder)),
        ("merges.txt", "\n".join(["#version: 0.2", *pairs]) + "\n"),
        ("added_tokens.json", json.dumps(encoder.special_tokens)),
    ):
        with replacing(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    (folder / "tokenizer.json").unlink(missing_ok=True)


# ---- Folders and files -------------------------------------------------------


def _find_folder(name: str | Path) -> Path:
    """Returns the folder `name`, or the one where huggingface_hub keeps that repository."""
    name = os.path.expanduser(os.fspath(name))
    if os.path.isdir(name):
        return Path(name)

    repository = HUB_NAMES.get(name, name)
    # No part begins with a dot, so no name leads out of the hub's folder.
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository, re.ASCII):
        raise FileNotFoundError(
            f"there is no folder {name!r}; on the hub, names have the form 'owner/repository'")

    try:
        from huggingface_hub import snapshot_download
        # The second form of weights is fetched only if the first is missing.
        for weights in WEIGHT_FILES:
            patterns = ["config.json", *VOCABULARY_FILES, *weights]
            folder = Path(snapshot_download(repository, allow_patterns=patterns))
            if any((folder / file).is_file() for file in weights):
                break
        return folder
    except ImportError:
        raise ImportError(f"there is no folder {name!r}; to fetch it: {INSTALL}") from None
    except Exception as error:
        # The packages below huggingface_hub have errors of their own.
        first_line = str(error).strip().partition("\n")[0]
        raise OSError(f"there is no folder {name!r}, and the hub does not give it: "
                      f"{type(error).__name__}: {first_line}") from None


def _read_json(path: Path) -> dict:
    """Reads a file that holds a JSON object; ValueError if it does not."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _check_choices(owner: str | Path, given: dict, choices: dict[str, tuple]) -> None:
    """Raises ValueError for a field whose value is not supported; the default is the first."""
    for field, values in choices.items():
        if given.get(field, values[0]) not in values:
            raise ValueError(f"{owner} has {field} = {given[field]!r}, "
                             f"expected {' or '.join(map(repr, values))}")


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a folder, by the names that GPT2LMHeadModel has for them."""
    # The third name of a form is a pattern for the parts of an index.
    names = [name for form in WEIGHT_FILES for name in form[:2]]
    paths = [folder / name for name in names if (folder / name).is_file()]
    if not paths:
        raise FileNotFoundError(f"there are no weights in {folder}: none of {', '.join(names)}")
    path = paths[0]
    files = {path}
    if path.suffix == ".json":
        index = _read_json(path).get("weight_map")
        if not isinstance(index, dict) or any(Path(str(f)).name != f for f in index.values()):
            raise ValueError(f"{path} has no weight_map that gives each tensor a file in the "
                             "same folder")
        files = {folder / name for name in index.values()}

    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file
                tensors |= load_file(path)
            else:
                tensors |= torch.load(path, "cpu", weights_only=True)
        except ImportError:
            raise ImportError(f"to read {path}: {INSTALL}") from None
        except Exception:
            # Errors are of many kinds. torch's would advise to load the file
            # without its guard.
            raise ValueError(f"{path} cannot be read as weights: it is missing or damaged, or "
                             "holds more than tensors and their names") from None
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"the weights in {folder} hold {type(tensor).__name__} as {key!r}, "
                             "expected tensors with names")

    # GPT2Model and OpenAI save without the prefix.
    if not any(key.startswith("transformer.") for key in tensors):
        tensors = {key if key == HEAD else f"transformer.{key}": tensor
                   for key, tensor in tensors.items()}
    return tensors


def _transpose(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Turns a block's matrix from (in, out) to torch's (out, in), and back."""
    if key.startswith("transformer.h.") and tensor.dim() == 2:
        return tensor.t()
    return tensor
