"""
How a GPT writes: token by token, each one chosen by the scores of the last.

    idx = model.generate(idx, 50, temperature=0.8, do_sample=True, top_k=40)

The plain way reads the whole row again for each new token. A cache keeps the keys
and values of the tokens that were read, so that only the new token is computed.
Both ways give the same tokens.
"""

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mingpt.utils import CN, check_config, eval_mode

# Rules for settings: names, test of a value, what the error says is expected.
RULES = (
    ("max_new_tokens", lambda v: operator.index(v) >= 0, "a whole number, 0 or more"),
    ("temperature", lambda v: 0 <= v < math.inf, "0 (greedy) or more"),
    ("top_k", lambda v: v is None or operator.index(v) >= 1,
     "a whole number above 0, or None for all tokens"),
    ("top_p", lambda v: v is None or 0 < v <= 1, "a share up to 1, or None for all tokens"),
)
# Modules of torch that treat each token for itself.
TOKENWISE = {
    nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity, nn.Sequential,
    nn.ModuleList, nn.ModuleDict, nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU,
}


def write(model: Any, idx: Tensor, max_new_tokens: int, temperature: float, do_sample: bool,
          top_k: int | None, top_p: float | None, stop_token: int | None,
          use_cache: bool) -> tuple[Iterator[Tensor], Any]:
    """Checks the settings of GPT.generate.

    Returns the new tokens, (B, 1) each, and how to turn gradients off while asking for one.
    """
    if idx.dim() != 2 or idx.size(1) == 0:
        raise ValueError(f"got a prompt of shape {tuple(idx.shape)}, "
                         "expected (B, T) with one token or more a row")

    foreign = foreign_methods(model)
    wte = getattr(getattr(model, "transformer", None), "wte", None)
    # A part of one's own may know more tokens than the embedding.
    if isinstance(wte, nn.Embedding) and not foreign and idx.numel() > 0:
        V = wte.weight.size(0)
        if not 0 <= idx.min() <= idx.max() < V:
            raise ValueError(f"got tokens from {idx.min()} to {idx.max()}, expected 0 to {V - 1}")

    settings = CN(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    check_config(settings, RULES)
    choose = make_choice(temperature, do_sample, top_k, top_p)

    is_known = can_cache(model, foreign)
    cache = None
    if use_cache and is_known:
        room = min(idx.size(1) + max_new_tokens, model.block_size)
        cache = [KVCache(room) for _ in model.transformer.h]

    tokens = _write(model, idx, max_new_tokens, choose, stop_token, cache)
    # Inference mode is faster, but autograd refuses its tensors. A part of
    # one's own may keep some, and attention with fused=False its weights.
    if is_known and not foreign:
        if all(getattr(part, "fused", True) for part in attentions(model.transformer.h)):
            return tokens, torch.inference_mode
    return tokens, torch.no_grad


def _write(model: Any, idx: Tensor, max_new_tokens: int, choose: Callable,
           stop_token: int | None, cache: list["KVCache"] | None) -> Iterator[Tensor]:
    """Writes token by token. The model is in eval mode whenever it is asked for one."""
    block_size = model.block_size
    # The text is kept in pieces: the prompt, then each new token.
    pieces = [idx[:, -block_size:]]  # (B, T), (B, 1), (B, 1), ...
    T = pieces[0].size(1)
    stopped = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)  # (B, 1)

    for _ in range(max_new_tokens):
        if cache is None:
            # The model reads the last block_size tokens anew.
            window = torch.cat(pieces, dim=1)[:, -block_size:]  # (B, T)
            pieces = [window]
            logits, _ = model(window)  # (B, T, V)
        else:
            logits, _ = model(pieces[-1], cache=cache)  # (B, 1, V)
            # A full window slides from here on: each token gets a new position.
            # A part that leaves its cache empty does not take part.
            if T == block_size or any(part.length != T for part in cache):
                cache = None

        token = choose(logits[:, -1])  # (B, V) -> (B, 1)
        if stop_token is not None:
            token = token.masked_fill(stopped, stop_token)
            stopped = token == stop_token

        pieces.append(token)
        T += 1
        yield token
        if stop_token is not None and stopped.all():
            return


def one_by_one(model: Any, tokens: Iterator[Tensor], no_gradients: Any) -> Iterator[Tensor]:
    """Yields each token as (B,). Between two tokens the model is in the mode it was in."""
    while True:
        with eval_mode(model), no_gradients():
            token = next(tokens, None)
        if token is None:
            return
        # A copy of a tensor from inference mode may be learned from.
        yield token[:, 0].clone()  # (B, 1) -> (B,)


def make_choice(temperature: float, do_sample: bool, top_k: int | None,
                top_p: float | None) -> Callable[[Tensor], Tensor]:
    """Returns the function that chooses the next token: logits (B, V) -> (B, 1)."""
    # To divide by less than 1e-30 would overflow.
    if not do_sample or temperature < 1e-30:
        return lambda logits: logits.argmax(dim=-1, keepdim=True)
    return lambda logits: torch.multinomial(
        logits_to_probs(logits, temperature, top_k, top_p), num_samples=1)


def logits_to_probs(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                    top_p: float | None = None) -> Tensor:
    """Computes the probabilities to draw the next token from: (B, V) -> (B, V).

    A temperature above 1 makes all tokens more alike, one below 1 favours the likely.
    top_k keeps the k likeliest tokens. top_p then keeps the fewest tokens that have
    this much probability together (Holtzman et al. 2019, section 3.1).
    """
    logits = at_least_float32(logits) / temperature
    if top_k is not None:
        k = min(top_k, logits.size(-1))
        kth = logits.topk(k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)

    probs = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, order = probs.sort(dim=-1, descending=True)  # (B, V) each
        # A token is removed if the likelier tokens already reach top_p.
        removed = ordered.cumsum(dim=-1) - ordered >= top_p
        ordered = ordered.masked_fill(removed, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def at_least_float32(x: Tensor) -> Tensor:
    """Converts half precision to float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class KVCache:
    """Holds the keys and values of one layer for the tokens that were read."""

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.length = 0
        # Attention reads new tokens as it read the prompt: by kernel or not.
        self.uses_kernel = False
        self.k: Tensor | None = None  # (B, nh, max_length, hs)
        self.v: Tensor | None = None  # (B, nh, max_length, hs)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds T tokens, (B, nh, T, hs) each; returns all, (B, nh, length, hs) each.

        Raises ValueError for several tokens after the first ones: they would need a mask.
        """
        B, nh, T, hs = k.shape
        if T > 1 and self.k is not None:
            raise ValueError(f"got {T} tokens after a prompt, expected one at a time")
        if self.k is None or self.v is None:
            self.k = k.new_empty(B, nh, self.max_length, hs)
            self.v = v.new_empty(B, nh, self.max_length, hs)
        self.k.narrow(2, self.length, T).copy_(k)
        self.v.narrow(2, self.length, T).copy_(v)
        self.length += T
        return self.k.narrow(2, 0, self.length), self.v.narrow(2, 0, self.length)


def can_cache(model: Any, foreign: list) -> bool:
    """Tells whether generation with the cache surely gives the same tokens as without.

    foreign: from foreign_methods(model). A part of one's own takes part by an argument
    `cache=None` of its forward.
    """
    blocks = getattr(getattr(model, "transformer", None), "h", None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        return False

    parts = attentions(blocks)
    if not all(takes_cache(part.forward) for part in [*blocks, *parts]):
        return False
    # A second attention in a block, or one in a head, gets no cache.
    counts = [count_attention(part) for part in parts]
    if max(counts) > 1 or sum(counts) < count_attention(model):
        return False

    for module in model.modules():
        # Attention by a mask of its own may look ahead. A scripted module's
        # buffers have no method get.
        if has_hooks(module) or dict(module._buffers).get("_mask") is not None:
            return False
    return all(map(takes_cache, foreign))


def attentions(blocks: Any) -> list:
    """Returns the attention of each block; a block without one stands for itself."""
    return [getattr(block, "attn", block) for block in blocks]


def count_attention(part: nn.Module) -> int:
    """Counts the library's attention in a part, once for each place where it stands."""
    places = part.named_modules(remove_duplicate=False)
    return sum("_mask" in module._buffers for _, module in places)


def foreign_methods(model: nn.Module) -> list:
    """Returns the methods that compute in a model, but for those of torch and this library."""
    modules = list(model.modules())
    names = ("__call__", "forward", "features", "mlpf", "attend", "compute_qkv")
    # A program may replace a method of a class, or of a single module.
    classes = {type(module) for module in modules} - TOKENWISE
    methods = [getattr(cls, name, None) for cls in classes for name in names]
    methods += [vars(module).get(name) for module in modules for name in names]
    own = ("mingpt.model", nn.Module.__module__)
    origin = lambda method: getattr(method, "__globals__", {}).get("__name__")
    return [method for method in methods if method is not None and origin(method) not in own]


def takes_cache(method: Callable) -> bool:
    """Tells whether a method has an argument `cache`."""
    # A function in C has no code that could be asked.
    code = getattr(method, "__code__", None)
    return code is not None and "cache" in code.co_varnames[:code.co_argcount]


def has_hooks(module: nn.Module) -> bool:
    """Tells whether somebody watches or changes what goes in or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks
                or module._backward_hooks or module._backward_pre_hooks
                or nn.modules.module._has_any_global_hook())
