"""
Models of the GPT-2 type, in and out: a folder on this machine, or a repository of the Hugging Face hub.

    model = GPT.from_pretrained('gpt2')         # or 'owner/repository' on the hub, or a folder
    model.save_pretrained('my-gpt2')            # from_pretrained reads it, and GPT2LMHeadModel of transformers

A folder holds config.json and the weights: one file, or several and an index that says what is in which.
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

from mingpt.utils import replacing

INSTALL = 'pip install -e ".[pretrained]" (a folder needs no huggingface_hub, a .bin file no safetensors)'
HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
HUB_NAMES["distilgpt2"] = "distilbert/distilgpt2"
KINDS = ( # of weights: one file, or an index and its parts
    ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "none"}
SAME = ("vocab_size", "n_layer", "n_head", "n_embd", "embd_pdrop", "resid_pdrop", "attn_pdrop", # named so here, too
        "bos_token_id", "eos_token_id") # not used here, but saved again
CHOICES = { # what this model can be where models of the GPT-2 type differ, the default first
    "model_type": ("gpt2",), "activation_function": tuple(GELUS), "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    "tie_word_embeddings": (True, False),
}

def load_pretrained(cls, name: str) -> Any:
    """Loads a model of class cls, in eval mode; its weights keep their precision and are read when they are first used.

    name: a folder, 'owner/repository' or a key of HUB_NAMES. FileNotFoundError if it is missing, ValueError if it is
    broken or another kind of model, OSError if the hub fails, ImportError if a package is missing.
    """
    folder = _find_folder(os.fspath(name))
    given = _read_json(folder / "config.json")
    for field, values in CHOICES.items():
        if given.get(field, values[0]) not in values:
            raise ValueError(f"{folder / 'config.json'} has {field} = {reprlib.repr(given[field])}, "
                             f"but this model can only have {' or '.join(map(repr, values))}")
    path, tensors = _read_weights(folder)
    config = cls.get_default_config()
    config.merge_from_dict({field: given[field] for field in SAME if field in given})
    config.block_size = given.get("n_positions")
    config.gelu_approximate = GELUS[given.get("activation_function", "gelu_new")]
    config.tie_weights = given.get("tie_word_embeddings", True) or "lm_head.weight" not in tensors
    if config.tie_weights:
        tensors.pop("lm_head.weight", None)
    try:
        if len(tensors) // 12 != config.n_layer: # 12 a layer; a million layers would take minutes to build
            raise ValueError(f"n_layer = {reprlib.repr(config.n_layer)} does not go with {len(tensors)} tensors")
        with torch.device("meta"): # no memory, no random numbers: the weights are about to come
            model = cls(config)
        model.load_state_dict({key: _transpose(key, tensor) for key, tensor in tensors.items()}, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} and its config.json do not make a model: {' '.join(str(error).split())}") from None
    if config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model.eval()

def save_pretrained(model: Any, folder: str | Path) -> None:
    """Writes config.json and model.safetensors (pytorch_model.bin without that package) over an earlier model."""
    folder, c = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: _transpose(key, tensor.detach()).contiguous() for key, tensor in model.named_parameters()}
    eot = 50256 if c.vocab_size == 50257 else None # <|endoftext|> of GPT-2's vocabulary
    own = {field: getattr(c, field) for field in SAME if hasattr(c, field)}
    config = dict(bos_token_id=eot, eos_token_id=eot) | own | dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", n_positions=c.block_size, n_inner=None,
        activation_function="gelu_new" if c.gelu_approximate == "tanh" else "gelu", layer_norm_epsilon=1e-5,
        tie_word_embeddings=c.tie_weights, dtype=str(model.lm_head.weight.dtype).removeprefix("torch."))
    try:
        from safetensors.torch import save_file
        name, save = "model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"})
    except ImportError:
        name, save = "pytorch_model.bin", lambda path: torch.save(state, path)
    with replacing(folder / name) as weights_part, replacing(folder / "config.json") as config_part:
        save(weights_part)
        config_part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for pattern in (*KINDS[0], *KINDS[1], "generation_config.json"):
        for path in folder.glob(pattern):
            if path.name != name: # it belongs to the earlier model
                path.unlink()

def _find_folder(name: str) -> Path:
    """The folder `name`, or the one in which huggingface_hub keeps the repository `name`."""
    if name and os.path.isdir(name):
        return Path(name)
    name = HUB_NAMES.get(name, name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) or os.path.exists(name):
        raise FileNotFoundError(f"there is no folder {name!r}; on the hub, names have the form 'owner/repository'")
    try:
        from huggingface_hub import snapshot_download
        for kind in KINDS: # the second one only if the repository lacks the first
            folder = Path(snapshot_download(name, allow_patterns=["config.json", *kind]))
            if any((folder / file).is_file() for file in kind):
                break
    except ImportError:
        raise ImportError(f"there is no folder {name!r}; to fetch it from the hub: {INSTALL}") from None
    except Exception as error: # the packages below huggingface_hub have errors of their own
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise OSError(f"there is no folder {name!r}, and the hub does not give it: {problem}") from None
    return folder

def _read_json(path: Path) -> dict:
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(content := json.loads(path.read_bytes()), dict):
            return content
    raise ValueError(f"{path} holds no JSON object")

def _read_weights(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file of weights or the index in a folder, and all tensors by the names that GPT2LMHeadModel gives them."""
    names = [name for kind in KINDS for name in kind[:2]]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"there are no weights in {folder}: none of {', '.join(names)}")
    index = _read_json(path).get("weight_map") if path.suffix == ".json" else {"": path.name}
    if not isinstance(index, dict) or any(Path(str(file)).name != file for file in index.values()):
        raise ValueError(f"{path} has no weight_map, which names for each tensor a file in the same folder")
    tensors = {}
    for file in sorted(set(index.values())):
        tensors.update(_read_tensors(folder / file))
    if not any(key.startswith("transformer.") for key in tensors): # saved by GPT2Model, as OpenAI's weights are
        tensors = {key if key.startswith("lm_head.") else f"transformer.{key}": tensors[key] for key in tensors}
    return path, tensors

def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            content = load_file(path)
        else: # the oldest files are no zip archives and cannot be mapped
            content = dict(torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))
    except ImportError:
        raise ImportError(f"to read {path}: {INSTALL}") from None
    except Exception as error: # of many kinds; torch's text advises to load the file without its guard
        problem = error if isinstance(error, OSError) else "it is damaged, or holds more than tensors and their names"
        raise ValueError(f"{path} cannot be read as weights: {problem}") from None
    for key, tensor in list(content.items()):
        if str(key).endswith((".attn.bias", ".attn.masked_bias")): # masks that old versions of transformers store
            del content[key]
        elif not isinstance(key, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            found = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"{path} holds {found} as {reprlib.repr(key)}, expected floating-point tensors with names")
    return content

def _transpose(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Turns a matrix of a block from (in, out) to (out, in), the order of torch.nn.Linear, and back."""
    return tensor.t() if key.startswith("transformer.h.") and tensor.dim() == 2 else tensor
