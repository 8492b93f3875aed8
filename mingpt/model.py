"""
The GPT: a stack of Transformer blocks that reads a row of tokens and predicts the next one.

    config = GPT.get_default_config()
    config.model_type, config.vocab_size, config.block_size = 'gpt2', 50257, 1024
    model = GPT(config)                                     # or GPT.from_pretrained('gpt2')
    logits, loss = model(idx, targets)                      # train it
    idx = model.generate(idx, max_new_tokens=20)            # let it write

In shape comments: B batch, T time (tokens in a row), C channels (n_embd), V vocabulary, nh heads, hs head size.
The network is GPT-2's: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
"""

import math
import operator
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mingpt.pretrained import load_pretrained, save_pretrained
from mingpt.utils import CfgNode, check_config, eval_mode, logger

class CausalSelfAttention(nn.Module):
    """Each token looks at itself and the tokens before it and collects what is relevant, in n_head independent ways."""

    def __init__(self, config: CfgNode):
        super().__init__()
        self.n_head, self.attn_pdrop, self.resid_pdrop = config.n_head, config.attn_pdrop, config.resid_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd) # query, key and value of all heads in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: "KVCache | None" = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head) # (B, T, 3C) -> (B, T, 3, nh, hs)
        qkv = qkv.permute(2, 0, 3, 1, 4) # (3, B, nh, T, hs)
        q, k, v = qkv.unbind() # (B, nh, T, hs) each
        past = cache.length if cache else 0
        if cache:
            k, v = cache.append(qkv[1:]) # (B, nh, past + T, hs)
        mask = None # query i is token number past + i: it looks at that one and those before it
        if T > 1 and past > 0:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        pdrop = self.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, pdrop, is_causal=not past) # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C) # the heads side by side again
        return F.dropout(self.c_proj(y), self.resid_pdrop, self.training)

class MLP(nn.Module):
    """Each token processes what it has collected, in two layers, the inner one four times as wide."""

    def __init__(self, config: CfgNode):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.gelu_approximate, self.resid_pdrop = config.gelu_approximate, config.resid_pdrop

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate=self.gelu_approximate) # (B, T, C) -> (B, T, 4C)
        return F.dropout(self.c_proj(x), self.resid_pdrop, self.training) # -> (B, T, C)

class Block(nn.Module):
    """Attention, then MLP. Each reads a normalised copy of the residual stream and adds its result to the stream."""

    def __init__(self, config: CfgNode):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: "KVCache | None" = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))

class KVCache:
    """Keys and values of a layer for the tokens read so far, so that they need not be computed again."""

    def __init__(self, max_length: int):
        self.max_length, self.length = max_length, 0 # tokens that it has room for, and that it holds
        self.kv: Tensor | None = None # (2, B, nh, max_length, hs)

    def append(self, kv: Tensor) -> Tensor:
        """Adds the keys and values of T more tokens, (2, B, nh, T, hs); returns all it has, (2, B, nh, length, hs)."""
        two, B, nh, T, hs = kv.shape
        if self.kv is None:
            self.kv = kv.new_empty(two, B, nh, self.max_length, hs)
        self.kv.narrow(3, self.length, T).copy_(kv)
        self.length += T
        return self.kv.narrow(3, 0, self.length)

SIZES = { # model_type: n_layer, n_head, n_embd
    "openai-gpt":  (12, 12, 768),  # 117M parameters, GPT-1
    "gpt2":        (12, 12, 768),  # 124M
    "gpt2-medium": (24, 16, 1024), # 355M
    "gpt2-large":  (36, 20, 1280), # 774M
    "gpt2-xl":     (48, 25, 1600), # 1558M
    "gopher-44m":  (8, 16, 512),   # the smallest of the Gopher paper, table 1
    "gpt-mini": (6, 6, 192), "gpt-micro": (4, 4, 128), "gpt-nano": (3, 3, 48),
}

RULES = ( # fields of a complete configuration, a test of their values, what is expected
    ("n_layer n_head n_embd vocab_size block_size", lambda v: type(v) is int and v > 0,
     "a whole number above 0 (a model_type sets n_layer, n_head and n_embd)"),
    ("embd_pdrop resid_pdrop attn_pdrop", lambda v: 0 <= v <= 1 and v is not True, "a share from 0 to 1"),
    ("gelu_approximate", lambda v: v in ("tanh", "none"), "'tanh' or 'none'"),
)

class GPT(nn.Module):
    """A GPT language model."""

    @staticmethod
    def get_default_config() -> CfgNode:
        return CfgNode(
            model_type="gpt", # or a name in SIZES
            n_layer=None, n_head=None, n_embd=None, # layers, heads and channels, unless model_type sets them
            vocab_size=None, # required: number of different tokens
            block_size=None, # required: the most tokens that the model can look back on
            embd_pdrop=0.1, # dropout after the embedding; 0 turns it off
            resid_pdrop=0.1, # dropout on what is added to the residual stream
            attn_pdrop=0.1, # dropout on the attention weights
            gelu_approximate="tanh", # the form of GELU that GPT-2 was trained with; 'none' is the exact one
            tie_weights=True, # one matrix embeds the tokens and scores them at the end, as in the GPT papers
        )

    def __init__(self, config: CfgNode):
        """Builds the model with fresh weights. `config` is not changed; the completed copy is `self.config`."""
        super().__init__()
        self.config = config = resolve_config(config)
        self.block_size = config.block_size
        wte, wpe = (nn.Embedding.from_pretrained(torch.empty(size, config.n_embd), freeze=False) # filled below
                    for size in (config.vocab_size, config.block_size)) # what a token is, where it stands
        self.transformer: Any = nn.ModuleDict(dict(
            wte=wte, wpe=wpe, drop=nn.Dropout(config.embd_pdrop),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = wte.weight
        for name, module in self.named_modules(): # std: less for the 2 * n_layer projections to the residual stream
            if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta: # there, weights come later
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj") else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.register_load_state_dict_pre_hook(_adapt_state_dict)
        logger.info("number of parameters: %.2fM", sum(p.numel() for p in self.parameters()) / 1e6)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: list[KVCache] | None = None) -> tuple[Tensor, Tensor | None]:
        """Scores every next token: idx (B, T) -> logits (B, T, V), and their cross-entropy in nats with targets (B, T).

        Targets of -1 are not counted. With a cache for each layer, idx follows what they hold. ValueError if too long.
        """
        try:
            logits = self.lm_head(self._features(idx, cache)) # (B, T, C) -> (B, T, V)
            if targets is None:
                return logits, None
            # at least float32, as half precision would round the sum: (B, T, V) -> (B*T, V)
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
            total = F.cross_entropy(scores, targets.flatten(), ignore_index=-1, reduction="sum")
        except IndexError:
            raise ValueError(f"unknown token: the vocabulary goes from 0 to {self.config.vocab_size - 1}") from None
        return logits, total / (targets != -1).sum().clamp(min=1) # 0 if nothing is to be predicted

    def _features(self, idx: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """All of the model but its last layer: (B, T) tokens -> (B, T, C)."""
        past = cache[0].length if cache else 0
        end = past + idx.size(1)
        if end > self.block_size:
            raise ValueError(f"got a sequence of {end} tokens, but block_size is {self.block_size}; shorten it")
        positions = torch.arange(past, end, device=idx.device) # (T,)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions)) # (B, T, C) + (T, C)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache[i] if cache else None)
        return self.transformer.ln_f(x)

    def configure_optimizers(self, train_config: CfgNode) -> torch.optim.AdamW:
        """AdamW, with weight decay on the matrices of Linear layers, except one that is the embedding, too."""
        matrices = {m.weight: None for m in self.modules() if isinstance(m, nn.Linear)} # a set has no order
        matrices.pop(self.transformer.wte.weight, None)
        others = [p for p in self.parameters() if p not in matrices]
        groups: list[dict] = [{"params": list(matrices)}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=train_config.learning_rate, betas=train_config.betas,
                                 weight_decay=train_config.weight_decay, fused=True)

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, do_sample: bool = False,
                 top_k: int | None = None, top_p: float | None = None, stop_token: int | None = None,
                 use_cache: bool = True) -> Tensor:
        """Continues a prompt, idx (B, T) -> (B, T + max_new_tokens), by the likeliest tokens, or by draws if do_sample.

        temperature, top_k and top_p shape the draw (see logits_to_probs); temperature 0 is greedy. A row repeats
        stop_token once it has come to it, and all end when every row has. The model is in eval mode and sees the last
        block_size tokens. Raises ValueError for an empty prompt or a setting out of range.
        """
        with torch.inference_mode(), eval_mode(self): # once for all tokens
            new = list(self._tokens(
                idx, max_new_tokens, temperature, do_sample, top_k, top_p, stop_token, use_cache, nullcontext))
        return torch.cat([idx] + [token[:, None] for token in new], dim=1) # (B,) each -> (B, T + new)

    def stream(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, do_sample: bool = False,
               top_k: int | None = None, top_p: float | None = None, stop_token: int | None = None,
               use_cache: bool = True) -> Iterator[Tensor]:
        """What generate adds to the prompt, token by token as it comes: yields (B,), at most max_new_tokens times."""
        return self._tokens(idx, max_new_tokens, temperature, do_sample, top_k, top_p, stop_token, use_cache, eval_mode)

    def _tokens(self, idx, max_new_tokens, temperature, do_sample, top_k, top_p, stop_token, use_cache, mode):
        """Checks the arguments and returns the new tokens, one by one; mode(model) holds while one is computed."""
        if idx.dim() != 2 or idx.size(1) == 0:
            raise ValueError(f"got a prompt of shape {tuple(idx.shape)}, expected (B, T) with one token or more a row")
        if idx.numel() and not 0 <= idx.min() <= idx.max() < self.config.vocab_size:
            raise ValueError(f"got {idx.min()} to {idx.max()}, but the vocabulary is 0 to {self.config.vocab_size - 1}")
        check_config(CfgNode(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p), (
            ("max_new_tokens", lambda v: operator.index(v) >= 0, "a whole number, 0 or more"),
            ("temperature", lambda v: 0 <= v < math.inf, "0 (greedy) or more"),
            ("top_k", lambda v: v is None or operator.index(v) >= 1, "a whole number above 0, or None for all tokens"),
            ("top_p", lambda v: v is None or 0 < v <= 1, "a share above 0 and up to 1, or None for all tokens"),
        ))
        greedy = not do_sample or temperature < 1e-30 # dividing by so little would overflow

        def tokens() -> Iterator[Tensor]:
            room = min(idx.size(1) + max_new_tokens, self.block_size)
            cache = [KVCache(room) for _ in self.transformer.h] if use_cache else None
            stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device) # (B,)
            text, unread = [idx], idx # pieces (B, T), (B, 1), (B, 1), ...; and what of them the cache lacks
            for _ in range(max_new_tokens):
                with torch.no_grad(), mode(self): # both end before the token is handed out
                    if cache and cache[0].length + unread.size(1) > self.block_size:
                        cache = None # from here on the window slides, so every token changes its position
                    if not cache:
                        unread = torch.cat(text, dim=1)[:, -self.block_size:] # (B, block_size) at most
                    logits = self.lm_head(self._features(unread, cache)[:, -1]) # of the last token alone, (B, V)
                    probs = logits if greedy else logits_to_probs(logits, temperature, top_k, top_p)
                    token = probs.argmax(-1) if greedy else torch.multinomial(probs, 1)[:, 0] # (B,)
                    if stop_token is not None:
                        token = torch.where(stopped, stop_token, token)
                        stopped |= token == stop_token
                yield token
                if stop_token is not None and stopped.all():
                    break
                unread = token[:, None] # (B,) -> (B, 1)
                text.append(unread)
        return tokens()

    @classmethod
    def from_pretrained(cls, name: str) -> "GPT":
        """Loads a model of the GPT-2 type, in eval mode: 'gpt2', 'owner/name' on the Hugging Face hub, or a folder."""
        return load_pretrained(cls, name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that from_pretrained and GPT2LMHeadModel of transformers load."""
        save_pretrained(self, folder)

def resolve_config(config: CfgNode) -> CfgNode:
    """A complete copy of a configuration, with the sizes of its model_type; ValueError for what is missing or wrong."""
    resolved = GPT.get_default_config()
    resolved.merge_from_dict(vars(config))
    name = resolved.model_type
    if name not in (*SIZES, "gpt", None):
        raise ValueError(f"unknown model_type {name!r}; give one of {', '.join(SIZES)}, or n_layer, n_head and n_embd")
    for key, size in zip(("n_layer", "n_head", "n_embd"), SIZES.get(name, ())):
        if (given := getattr(resolved, key)) not in (None, size):
            raise ValueError(f"model_type {name!r} means {key}={size}, but {key}={given} is given; give one of them")
        setattr(resolved, key, size)
    check_config(resolved, RULES)
    if resolved.n_embd % resolved.n_head:
        raise ValueError(f"got n_embd={resolved.n_embd}, expected a multiple of n_head={resolved.n_head}")
    return resolved

def _adapt_state_dict(model: GPT, state: dict, prefix: str, *args) -> None:
    """Lets weights load that were saved without the tied head, or with the mask that minGPT stores."""
    for key in [key for key in state if key.endswith((".attn.bias", ".attn.masked_bias"))]:
        del state[key]
    wte, head = prefix + "transformer.wte.weight", prefix + "lm_head.weight"
    if model.config.tie_weights and wte in state and not torch.equal(state.setdefault(head, state[wte]), state[wte]):
        raise ValueError("these weights have an output layer of their own; set config.tie_weights = False")

def logits_to_probs(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                    top_p: float | None = None) -> Tensor:
    """The distribution to draw the next token from: (B, V) logits -> (B, V) probabilities.

    A temperature above 1 flattens it, one below sharpens it. top_k leaves the k likeliest tokens; top_p then the fewest
    that have this much probability together (nucleus sampling, Holtzman et al. 2019, section 3.1).
    """
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:] # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if top_p is not None:
        ordered, order = probs.sort(descending=True) # (B, V)
        spare = ordered.cumsum(-1) - ordered >= top_p # the likelier tokens suffice without this one
        probs = probs.masked_fill(spare.scatter(-1, order, spare), 0.0) # back in the order of the vocabulary
        probs = probs / probs.sum(-1, keepdim=True)
    return probs
