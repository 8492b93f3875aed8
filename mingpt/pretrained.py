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

import contextlib
import json
import os
import re
import reprlib
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mingpt.bpe import Encoder, get_encoder
from mingpt.utils import logger, replacing

INSTALL = ("pip install huggingface_hub safetensors "
           "(a folder needs no huggingface_hub, a .bin file no safetensors)")
HUB_NAMES = {name: f"openai-community/{name}"
             for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
HUB_NAMES["distilgpt2"] = "distilbert/distilgpt2"
# One file, or an index and its parts. The form that is preferred comes first.
WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
VOCABULARY_FILES = ("tokenizer.*", "vocab.*", "merges.txt", "added_tokens.json", "*.model")
EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"

# A GPT's configuration has these fields under the same names.
SHARED_FIELDS = ("vocab_size", "n_layer", "n_head", "n_embd",
                 "embd_pdrop", "resid_pdrop", "attn_pdrop")
# These are only kept, and saved again.
KEPT_FIELDS = ("bos_token_id", "eos_token_id")
# Settings in which GPT-2 models differ, and the values that this library supports,
# the default first. "gelu" is the exact form, the other names mean the tanh form.
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
TOKENIZER_CHOICES = {
    "normalizer.type": (None,),
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False,),
    "pre_tokenizer.use_regex": (True,),
    "model.type": ("BPE",),
    "model.continuing_subword_prefix": (None, ""),
    "model.end_of_word_suffix": (None, ""),
    "model.byte_fallback": (False,),
}
# Modules for the MLP, and the names that transformers has for them.
ACTIVATIONS = {
    "NewGELU()": "gelu_new",
    "GELU(approximate='tanh')": "gelu_new",
    "GELU(approximate='none')": "gelu",
}

# -----------------------------------------------------------------------------
# Models


class SkipInit(TorchFunctionMode):
    """Draws no fresh weights, as others are about to replace them.

    They would cost seconds, and random numbers that the caller's seed is for.
    """

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
    given = _read_json(folder / "config.json")
    _check_choices(folder / "config.json", given, MODEL_CHOICES)
    path, tensors = _read_weights(folder)

    config = cls.get_default_config()
    config.merge_from_dict({field: given[field] for field in SHARED_FIELDS if field in given})
    config.block_size = given.get("n_positions")
    config.tie_weights = given.get("tie_word_embeddings", True) or HEAD not in tensors
    if EMBEDDING in tensors:
        tensors.setdefault(HEAD, tensors[EMBEDDING])
    try:
        # A layer has 12 tensors. A million layers would take minutes to build.
        if len(tensors) // 12 != config.n_layer:
            raise ValueError(f"n_layer = {reprlib.repr(config.n_layer)} does not go with "
                             f"{len(tensors)} tensors")
        with SkipInit():
            model = cls(config)
        # Files are mapped into memory, so a weight is read when it is first used.
        state = {key: _transpose(key, tensor) for key, tensor in tensors.items()}
        model.load_state_dict(state, assign=True)
    except (ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{path} and its config.json do not make a model: {problem}") from None

    # The model is no longer tied if a head of its own was among the weights.
    if model.config.tie_weights:
        model.tie_weights()
    if given.get("activation_function") == "gelu":
        for block in model.transformer.h:
            block.mlp.act = nn.GELU()
    model.config.merge_from_dict({field: given[field] for field in KEPT_FIELDS if field in given})
    return model.eval()


def crop_model(model: Any, block_size: int, vocab_size: int) -> None:
    """Cuts a model, in place, to its first positions and the rows of its first tokens.

    Rows without a token, where a vocabulary is padded, could be drawn otherwise.
    """
    t = model.transformer
    is_tied = model.is_tied
    for module, size in ((t.wpe, block_size), (t.wte, vocab_size), (model.lm_head, vocab_size)):
        module.weight = nn.Parameter(module.weight.detach()[:size])  # (rows, C) -> (size, C)
    if is_tied:
        model.tie_weights()
    t.wpe.num_embeddings = block_size
    t.wte.num_embeddings = vocab_size
    model.lm_head.out_features = vocab_size
    model.block_size = block_size
    model.config.block_size = block_size
    model.config.vocab_size = vocab_size


def save_pretrained(model: Any, folder: str | Path) -> None:
    """Writes config.json and model.safetensors over an earlier model in the folder.

    Without the package safetensors the weights are in pytorch_model.bin. ValueError
    for a model with a part that GPT-2 lacks, since no such folder can hold it.
    """
    activation = _find_activation(model)
    state = model.state_dict()
    if model.is_tied:
        del state[HEAD]
    # In a file of safetensors no tensors share memory.
    state = {key: _transpose(key, tensor).clone(memory_format=torch.contiguous_format)
             for key, tensor in state.items()}

    # In GPT-2's own vocabulary this is the number of <|endoftext|>.
    eot = 50256 if model.config.vocab_size == 50257 else None
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": model.block_size,
        "n_inner": None,
        "activation_function": activation,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": model.is_tied,
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
    }
    config |= {field: getattr(model.config, field) for field in SHARED_FIELDS}
    config |= {field: getattr(model.config, field, eot) for field in KEPT_FIELDS}

    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from safetensors.torch import save_file
        name = "model.safetensors"
    except ImportError:
        name = "pytorch_model.bin"
    with replacing(folder / name) as weights, replacing(folder / "config.json") as settings:
        if name == "model.safetensors":
            save_file(state, weights, metadata={"format": "pt"})
        else:
            torch.save(state, weights)
        settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    # Other weights, and settings for generation, belong to the earlier model.
    for pattern in (*WEIGHT_FILES[0], *WEIGHT_FILES[1], "generation_config.json"):
        for path in folder.glob(pattern):
            if path.name != name:
                path.unlink()


def _find_activation(model: Any) -> str:
    """Returns the activation of a model; ValueError for a part that GPT-2 does not have."""
    plain = _build_plain(model)
    # A module that stands in several places counts in each.
    found = dict(model.named_modules(remove_duplicate=False))
    activation = found.get("transformer.h.0.mlp.act")
    if str(activation) in ACTIVATIONS:
        for block in plain.transformer.h:
            block.mlp.act = activation
    expected = dict(plain.named_modules(remove_duplicate=False))
    for name in [*expected, *found]:
        got = _describe(found.get(name), expected.get(name))
        wanted = _describe(expected.get(name))
        if got != wanted:
            raise ValueError("a folder of the GPT-2 type cannot hold this model: "
                             f"{name or 'it'} has {got}, expected {wanted}")
    return ACTIVATIONS[str(activation)]


def _build_plain(model: Any) -> Any:
    """Builds a GPT of the same configuration, without memory for its weights."""
    # The model may be of a subclass; GPT is the first class that has this method.
    gpt = [cls for cls in type(model).__mro__ if hasattr(cls, "get_default_config")][-1]
    config = gpt.get_default_config()
    config.merge_from_dict({field: getattr(model.config, field) for field in vars(config)})
    disabled = logger.disabled
    logger.disabled = True
    try:
        with torch.device("meta"), SkipInit():
            return gpt(config)
    finally:
        logger.disabled = disabled


def _describe(module: nn.Module | None, plain: nn.Module | None = None) -> str:
    """Says what a module computes, apart from its weights and the modules in it.

    plain is the module that GPT-2 has there.
    """
    if module is None:
        return "nothing"
    words = [] if any(module.children()) else [module._get_name()]
    for name, parameter in module.named_parameters(recurse=False):
        words.append(f"{name} {list(parameter.shape)}")
    if hasattr(module, "eps"):
        words.append(f"eps {module.eps}")
    if hasattr(module, "n_head"):
        words.append(f"{module.n_head} heads")
    # A GPT may compute its loss in a forward of its own; other parts may not.
    names = ["features", "mlpf", "attend"] if hasattr(module, "transformer") else [
        "forward", "mlpf", "attend"]
    if plain is not None and isinstance(module, type(plain)):
        if any(is_changed(module, plain, name) for name in names):
            words.append("a method of its own")
    mask = module._buffers.get("_mask")
    if mask is not None and not torch.equal(mask != 0, torch.ones_like(mask).tril() != 0):
        words.append("a mask of its own")
    return ", ".join(words) or "no weights of its own"


def is_changed(module: nn.Module, plain: nn.Module, name: str) -> bool:
    """Tells whether a module has another method of this name than a plain one."""
    methods = [getattr(type(part), name, None) for part in (module, plain)]
    return name in vars(module) or methods[0] is not methods[1]


# -----------------------------------------------------------------------------
# Vocabularies


def load_encoder(name: str | Path, vocab_size: int | None = None) -> Encoder:
    """Loads the encoder of a model, from where its weights are.

    vocab_size is the number of the model's rows, which may be more than there are
    tokens. With OpenAI's 50,257 and no vocabulary there, OpenAI's is taken. Without a
    model, None takes a folder of any size. ValueError if the vocabulary is missing,
    broken, too large or of another kind than GPT-2's; else as load_pretrained.
    """
    folder = _find_folder(name)
    files = [path.name for pattern in VOCABULARY_FILES for path in folder.glob(pattern)]
    if vocab_size == 50257 and not files:
        return get_encoder()
    if "tokenizer.json" in files:
        path = folder / "tokenizer.json"
        read = _read_tokenizer
    elif "vocab.json" in files and "merges.txt" in files:
        path = folder / "vocab.json"
        read = _read_vocabulary
    else:
        raise ValueError(f"there is no vocabulary of the model in {folder}; put its "
                         "tokenizer.json there, or its vocab.json and merges.txt")
    try:
        vocabulary, merges, added = read(path)
        if "" in vocabulary | added:
            raise ValueError("it has a token without text")
        for token, number in (vocabulary | added).items():
            is_number = type(number) is int and number >= 0
            if not is_number or vocab_size is not None and number >= vocab_size:
                raise ValueError(f"{token!r} has the number {reprlib.repr(number)}, "
                                 f"but the model has {vocab_size} rows")
        return Encoder(vocabulary, [(left, right) for left, right in merges], added)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} holds no vocabulary for this model: {error}") from None


def _read_tokenizer(path: Path) -> tuple[dict, list, dict]:
    """Reads the vocabulary, the merges and the added tokens of a tokenizer.json."""
    content = _read_json(path)
    given = {}
    for part in ("normalizer", "pre_tokenizer", "model"):
        for field, value in (content.get(part) or {"type": None}).items():
            given[f"{part}.{field}"] = value
    _check_choices(path.name, given, TOKENIZER_CHOICES)
    # Old files have "a b" where newer ones have ["a", "b"].
    merges = [pair.split(" ") if isinstance(pair, str) else pair
              for pair in content["model"]["merges"]]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return content["model"]["vocab"], merges, added


def _read_vocabulary(path: Path) -> tuple[dict, list, dict]:
    """Reads the same from vocab.json and the files beside it."""
    lines = (path.parent / "merges.txt").read_text(encoding="utf-8").splitlines()
    if lines[0].startswith("#version"):
        del lines[0]
    merges = [line.split() for line in lines if line.strip()]
    added_path = path.parent / "added_tokens.json"
    added = _read_json(added_path) if added_path.is_file() else {}
    return _read_json(path), merges, added


def save_encoder(encoder: Encoder, folder: str | Path) -> None:
    """Writes vocab.json and merges.txt over an earlier vocabulary; added_tokens.json if needed.

    load_encoder and transformers' GPT2Tokenizer read them.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [" ".join(pair) for pair in encoder.bpe_ranks]
    texts = {
        "vocab.json": json.dumps(encoder.encoder),
        "merges.txt": "\n".join(["#version: 0.2", *pairs]) + "\n",
    }
    added = dict(encoder.special_tokens)
    if "<|endoftext|>" in encoder.encoder:
        # Everybody knows this one.
        del added["<|endoftext|>"]
    if added:
        texts["added_tokens.json"] = json.dumps(added)
    for name, text in texts.items():
        with replacing(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    for name in {"tokenizer.json", "added_tokens.json"} - texts.keys():
        (folder / name).unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# Folders and files


def _find_folder(name: str | Path) -> Path:
    """Returns the folder `name`, or the one where huggingface_hub keeps that repository."""
    name = os.path.expanduser(os.fspath(name))
    if name and os.path.isdir(name):
        return Path(name)
    name = HUB_NAMES.get(name, name)
    # Neither part begins with a dot, so a name cannot lead out of the hub's folder.
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) or os.path.exists(name):
        raise FileNotFoundError(
            f"there is no folder {name!r}; on the hub, names have the form 'owner/repository'")
    try:
        from huggingface_hub import snapshot_download
        # The second form of weights is fetched only if the repository lacks the first.
        for weights in WEIGHT_FILES:
            patterns = ["config.json", *VOCABULARY_FILES, *weights]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
            if any((folder / file).is_file() for file in weights):
                break
    except ImportError:
        raise ImportError(f"there is no folder {name!r}; to fetch it from the hub: "
                          f"{INSTALL}") from None
    except Exception as error:
        # The packages below huggingface_hub have errors of their own.
        first_line = str(error).strip().partition("\n")[0]
        raise OSError(f"there is no folder {name!r}, and the hub does not give it: "
                      f"{type(error).__name__}: {first_line}") from None
    return folder


def _read_json(path: Path) -> dict:
    """Reads a file that holds a JSON object; ValueError if it does not."""
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    raise ValueError(f"{path} holds no JSON object")


def _check_choices(file: str | Path, given: dict, choices: dict[str, tuple]) -> None:
    """Raises ValueError for a field whose value is not supported; the default is the first."""
    for field, values in choices.items():
        if given.get(field, values[0]) not in values:
            raise ValueError(f"{file} has {field} = {reprlib.repr(given[field])}, "
                             f"expected {' or '.join(map(repr, values))}")


def _read_weights(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Returns the file of weights or the index, and the tensors by GPT2LMHeadModel's names."""
    names = [name for form in WEIGHT_FILES for name in form[:2]]
    paths = [folder / name for name in names if (folder / name).is_file()]
    if not paths:
        raise FileNotFoundError(f"there are no weights in {folder}: none of {', '.join(names)}")
    path = paths[0]
    if path.suffix == ".json":
        index = _read_json(path).get("weight_map")
        if not isinstance(index, dict) or any(Path(str(f)).name != f for f in index.values()):
            raise ValueError(f"{path} has no weight_map, which names for each tensor a file in "
                             "the same folder")
        files = sorted(set(index.values()))
    else:
        files = [path.name]

    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors.update(_read_tensors(folder / file))
    # GPT2Model saves without the prefix, as OpenAI's weights are.
    if not any(key.startswith("transformer.") for key in tensors):
        tensors = {key if key == HEAD else f"transformer.{key}": tensor
                   for key, tensor in tensors.items()}
    return path, tensors


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads one file of tensors, without the masks that old versions of transformers store."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            content = load_file(path)
        else:
            # The oldest files are no zip archives and cannot be mapped into memory.
            content = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            content = dict(content)
    except ImportError:
        raise ImportError(f"to read {path}: {INSTALL}") from None
    except Exception as error:
        # Errors are of many kinds, and torch's advise to load the file without its guard.
        problem = "it is damaged, or holds more than tensors and their names"
        if isinstance(error, OSError):
            problem = str(error)
        raise ValueError(f"{path} cannot be read as weights: {problem}") from None

    for key, tensor in list(content.items()):
        if str(key).endswith((".attn.bias", ".attn.masked_bias")):
            del content[key]
            continue
        is_weight = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        if not isinstance(key, str) or not is_weight:
            got = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"{path} holds {got} as {reprlib.repr(key)}, "
                             "expected floating-point tensors with names")
    return content


def _transpose(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Turns a block's matrix from (in, out) to torch's (out, in), and back."""
    if key.startswith("transformer.h.") and tensor.dim() == 2:
        return tensor.t()
    return tensor
