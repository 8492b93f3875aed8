"""
The GPT: a stack of Transformer blocks that reads a row of tokens and predicts the next one.

    config = GPT.get_default_config()
    config.model_type = "gpt2"
    config.vocab_size = 50257
    config.block_size = 1024
    model = GPT(config)                                     # or GPT.from_pretrained("gpt2")
    logits, loss = model(idx, targets)                      # train it
    idx = model.generate(idx, max_new_tokens=20)            # let it write

Letters in shape comments: B batch, T time (tokens in a row), C channels (n_embd),
V vocabulary, nh heads, hs head size (C / nh).
The network is GPT-2's: Radford et al. 2019, "Language Models are Unsupervised
Multitask Learners", section 2.3.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mingpt.generation import KVCache, at_least_float32, has_hooks, one_by_one, write
from mingpt.muon import join_muon
from mingpt.utils import CN, check_config, eval_mode, fill_in, logger

if TYPE_CHECKING:
    from typing_extensions import Self


class NewGELU(nn.Module):
    """Bends a number smoothly: GELU in its tanh form, which GPT-2 was trained with.

    Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class Dropout(nn.Dropout):
    """Sets a share of the numbers to 0 in training, and loses no time otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x


class CausalSelfAttention(nn.Module):
    """Lets each token collect from itself and the tokens before it, in n_head ways.

    Each token asks with its query. The better a key answers, the more of the
    value beside that key is collected (Vaswani et al. 2017, section 3.2).
    """

    # True: torch's kernel. False: the formula step by step, weights in att.
    fused = True
    att: Tensor  # (B, nh, T, T)

    def __init__(self, config: CN):
        """Takes any config with n_embd, n_head, attn_pdrop, resid_pdrop, block_size."""
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(
                f"got n_embd={config.n_embd}, expected a multiple of n_head={config.n_head}")

        # One matrix computes query, key and value of all heads.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_dropout = Dropout(config.attn_pdrop)
        self.resid_dropout = Dropout(config.resid_pdrop)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.block_size = config.block_size

        # For programs of minGPT, which read or set its mask: see bias below.
        self.register_buffer("_mask", None, persistent=False)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Maps (B, T, C) to (B, T, C). With a cache, x follows the tokens it holds."""
        qkv = self.compute_qkv(x) if cache is None else self.compute_qkv(x, cache=cache)
        q, k, v = qkv  # three of (B, nh, T, hs)

        # A token after a prompt needs no mask: all others stand before it.
        is_causal = cache is None or cache.k is None
        uses_kernel = self.uses_kernel() if cache is None or is_causal else cache.uses_kernel
        if cache is not None:
            cache.uses_kernel = uses_kernel
            k, v = cache.append(k, v)  # (B, nh, past + T, hs)

        if uses_kernel:
            p = self.attn_dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=is_causal)
        else:
            y = self.attend(q, k, v)
        y = y.transpose(1, 2).flatten(2)  # (B, nh, T, hs) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def compute_qkv(self, x: Tensor, cache: KVCache | None = None) -> tuple[Tensor, ...]:
        """Computes query, key and value of each token: (B, T, C) -> three of (B, nh, T, hs).

        A subclass may change them, by their positions for example: cache.length tokens
        stand before x.
        """
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, nh, hs)
        return qkv.permute(2, 0, 3, 1, 4).unbind()  # three of (B, nh, T, hs)

    def uses_kernel(self) -> bool:
        """Tells whether torch's kernel may stand for the formula."""
        is_own = type(self).attend is CausalSelfAttention.attend and "attend" not in vars(self)
        if not self.fused or not is_own:
            return False
        # The kernel does not call dropout, which may be replaced or watched.
        dropout = self.attn_dropout
        is_plain = type(dropout) in (Dropout, nn.Dropout) and "forward" not in vars(dropout)
        return is_plain and dropout.training == self.training and not has_hooks(dropout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Computes what the kernel computes, softmax(q kᵀ / √hs) v, step by step.

        q is (B, nh, T, hs), k and v are (B, nh, S, hs): S counts the tokens in the
        cache, too, T only the new ones.
        """
        T = q.size(2)
        S = k.size(2)
        att = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))  # (B, nh, T, S)
        mask = self._mask
        if mask is None:
            mask = torch.ones(S, S, device=q.device).tril()  # (S, S)
        att = att.masked_fill(mask[..., S - T:S, :S] == 0, -torch.inf)
        att = att.softmax(dim=-1)
        self.att = att.detach()
        return self.attn_dropout(att) @ v  # (B, nh, T, S) @ (B, nh, S, hs) -> (B, nh, T, hs)

    @property
    def bias(self) -> Any:
        """Returns minGPT's mask, (1, 1, block_size, block_size): 1 where a token may look.

        Whoever asks for it may change it, so attention goes by it from then on.
        """
        if self._mask is None:
            T = self.block_size
            device = next(self.parameters()).device
            mask = torch.ones(T, T, device=device).tril()  # (T, T)
            self.bias = mask.view(1, 1, T, T)  # (T, T) -> (1, 1, T, T)
        return self._mask

    @bias.setter
    def bias(self, mask: Any) -> None:
        self.register_buffer("bias", mask)

    @bias.deleter
    def bias(self) -> None:
        self._mask = None

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if name == "bias":
            super().register_buffer("_mask", tensor, persistent=False)
            self.fused = False
        else:
            super().register_buffer(name, tensor, persistent)


class MLP(nn.ModuleDict):
    """Lets each token process what it has collected, in two layers.

    It is a dictionary, as in minGPT: mlp["act"] is mlp.act.
    """

    def __init__(self, config: CN):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.act = NewGELU()
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.c_fc(x))  # (B, T, C) -> (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """Adds attention, then an MLP, to the residual stream.

    The residual stream is the vector of each token, which runs through all blocks.
    A block only adds to it. Each part reads a normalised copy.
    """

    def __init__(self, config: CN):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x_norm = self.ln_1(x)
        x = x + (self.attn(x_norm) if cache is None else self.attn(x_norm, cache=cache))
        return x + self.mlpf(self.ln_2(x))

    def mlpf(self, x: Tensor) -> Tensor:
        """Applies the MLP. This is minGPT's name; a program may give it to another module."""
        other = self._modules.get("mlpf")
        return self.mlp(x) if other is None else other(x)


class GPT(nn.Module):
    """Predicts the next token of a row: a GPT language model."""

    @staticmethod
    def get_default_config() -> CN:
        C = CN()
        # These two are required.
        C.vocab_size = None  # number of different tokens
        C.block_size = None  # how many tokens the model can look back on
        # Give a model_type, see PRESETS below, or the three sizes.
        C.model_type = "gpt"  # 'gpt2', 'gpt-nano', ...; 'gpt' has the sizes that are given
        C.n_embd = None  # channels: length of a token's vector
        C.n_layer = None  # number of blocks
        C.n_head = None  # number of heads in each block
        # Dropout: the share of numbers that is set to 0 in training.
        C.embd_pdrop = 0.1  # dropout after the embedding
        C.attn_pdrop = 0.1  # dropout of attention weights
        C.resid_pdrop = 0.1  # dropout of what a block adds to the residual stream
        C.tie_weights = False  # one matrix embeds the tokens and scores them at the end
        return C

    def __init__(self, config: CN):
        """Builds the model with fresh weights.

        The sizes of a model_type are filled into `config`. `self.config` is a complete
        copy. Raises ValueError for a setting that is missing or wrong.
        """
        super().__init__()
        # A subclass may have defaults of its own, but not all of these.
        defaults = vars(GPT.get_default_config()) | vars(self.get_default_config())
        c = complete_config(config, defaults)
        self.config = c
        self.block_size = c.block_size
        self.transformer: Any = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd),
            wpe=nn.Embedding(c.block_size, c.n_embd),
            drop=Dropout(c.embd_pdrop),
            h=nn.ModuleList([Block(c) for _ in range(c.n_layer)]),
            ln_f=nn.LayerNorm(c.n_embd),
        ))
        self.lm_head: Any = nn.Linear(c.n_embd, c.vocab_size, bias=False)

        self.apply(self._init_weights)
        # GPT-2, section 2.3: layers that add to the residual stream start
        # smaller, since 2 * n_layer of them add up.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * c.n_layer))
        if c.tie_weights:
            self.tie_weights()
        self.register_load_state_dict_pre_hook(_adapt_state_dict)

        # Nothing has failed, so the caller's config may change.
        for name in ("n_layer", "n_head", "n_embd"):
            if getattr(config, name, None) is None:
                setattr(config, name, getattr(c, name))
        count = sum(p.numel() for p in self.transformer.parameters())
        logger.info("number of parameters: %.2fM", count / 1e6)

    def _init_weights(self, module: nn.Module) -> None:
        """Draws the fresh weights of one module. It is called for every module."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()

    def tie_weights(self) -> None:
        """Makes one matrix embed the tokens and score them at the end."""
        self.lm_head.weight = self.transformer.wte.weight

    @property
    def is_tied(self) -> bool:
        """Tells whether one matrix does both."""
        weights = dict(self.named_parameters(remove_duplicate=False))
        head = weights.get("lm_head.weight")
        return head is not None and head is weights.get("transformer.wte.weight")

    def features(self, idx: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """Computes all but the output layer: tokens (B, T) -> residual stream (B, T, C).

        With a cache for each block, idx follows the tokens that the cache holds.
        Raises ValueError for more than block_size tokens.
        """
        past = 0 if cache is None else cache[0].length
        end = past + idx.size(1)
        if end > self.block_size:
            raise ValueError(
                f"got {end} tokens in a row, but block_size is {self.block_size}; shorten it")

        pos = torch.arange(past, end, device=idx.device).unsqueeze(0)  # (1, T)
        parts = self.transformer
        x = parts.drop(parts.wte(idx) + parts.wpe(pos))  # (B, T, C) + (1, T, C)
        for i, block in enumerate(parts.h):
            x = block(x) if cache is None else block(x, cache=cache[i])
        return parts.ln_f(x)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                cache: list[KVCache] | None = None) -> tuple[Tensor, Tensor | None]:
        """Scores every next token: idx (B, T) -> logits (B, T, V).

        With targets (B, T) also returns the mean loss, cross-entropy in nats. Targets
        of -1 are not counted. With a cache only the last token is scored, (B, 1, V).
        """
        if cache is None:
            x = self.features(idx)  # (B, T, C)
        else:
            x = self.features(idx, cache=cache)[:, -1:]  # (B, T, C) -> (B, 1, C)
        logits = self.lm_head(x)
        if targets is None:
            return logits, None

        # The loss is summed in float32: half precision would round it.
        scores = at_least_float32(logits).flatten(0, 1)  # (B, T, V) -> (B * T, V)
        total = F.cross_entropy(scores, targets.flatten(), ignore_index=-1, reduction="sum")
        # Without any target the loss is 0.
        return logits, total / (targets != -1).sum().clamp(min=1)

    def count_targets(self, targets: Tensor) -> int:
        """Counts the targets that the loss is a mean of: all but -1."""
        return int((targets != -1).sum())

    def configure_optimizers(self, train_config: CN) -> torch.optim.Optimizer:
        """Makes AdamW. With train_config.optimizer = "muon", Muon takes the blocks' matrices.

        Weight decay is for the matrices of Linear layers, except the embedding.
        """
        def matrices(kind: type) -> set[Tensor]:
            layers = [module for module in self.modules() if isinstance(module, kind)]
            return {p for layer in layers for p in layer.parameters(recurse=False) if p.dim() == 2}

        decayed = matrices(nn.Linear) - matrices(nn.Embedding)
        # Another module may borrow this method.
        if getattr(self, "is_tied", False):
            decayed.discard(self.lm_head.weight)
        # Parameters keep their order, which a checkpoint needs.
        first = [p for p in self.parameters() if p in decayed]
        others = [p for p in self.parameters() if p not in decayed]
        # The groups alone say it: one that is added later has torch's default.
        groups: list[dict] = [{"params": first, "weight_decay": train_config.weight_decay},
                              {"params": others, "weight_decay": 0.0}]
        name = getattr(train_config, "optimizer", "adamw")
        if name not in ("adamw", "muon"):
            raise ValueError(f"got optimizer={name!r}, expected 'adamw' or 'muon'")
        if name == "muon":
            in_blocks = set(self.transformer.h.parameters())
            # Query, key and value are stacked in one matrix.
            stacked = {p for name, p in self.named_parameters() if name.endswith("c_attn.weight")}
            return join_muon(groups, in_blocks, stacked, train_config)
        return torch.optim.AdamW(groups, lr=train_config.learning_rate, betas=train_config.betas,
                                 fused=True)

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 do_sample: bool = False, top_k: int | None = None, top_p: float | None = None,
                 stop_token: int | None = None, use_cache: bool = True) -> Tensor:
        """Continues a prompt: idx (B, T) -> (B, T + max_new_tokens).

        Takes the likeliest token each time, or with do_sample draws one. temperature,
        top_k and top_p shape the draw (see mingpt/generation.py); temperature 0 takes
        the likeliest. After its first stop_token a row contains only stop tokens, and
        all end when every row has one. The model is in eval mode meanwhile and sees
        the last block_size tokens. Raises ValueError for an empty prompt or a setting
        out of range.
        """
        tokens, no_gradients = write(self, idx, max_new_tokens, temperature, do_sample, top_k,
                                     top_p, stop_token, use_cache)
        with eval_mode(self), no_gradients():
            new = list(tokens)
        return torch.cat([idx, *new], dim=1)  # (B, T) and (B, 1) each -> (B, T + new)

    def stream(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0,
               do_sample: bool = False, top_k: int | None = None, top_p: float | None = None,
               stop_token: int | None = None, use_cache: bool = True) -> Iterator[Tensor]:
        """Yields the tokens that generate adds, (B,) each, one by one as they come."""
        tokens, no_gradients = write(self, idx, max_new_tokens, temperature, do_sample, top_k,
                                     top_p, stop_token, use_cache)
        return one_by_one(self, tokens, no_gradients)

    @classmethod
    def from_pretrained(cls, model_type: str | Path) -> "Self":
        """Loads a model of the GPT-2 type, in eval mode.

        model_type: "gpt2", "owner/name" on the Hugging Face hub, or a folder.
        """
        from mingpt.pretrained import load_pretrained
        return load_pretrained(cls, model_type)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that from_pretrained and transformers' GPT2LMHeadModel load."""
        from mingpt.pretrained import save_pretrained
        save_pretrained(self, folder, GPT)


# Each model_type has n_layer, n_head, n_embd.
PRESETS = {
    "openai-gpt": (12, 12, 768),  # 117M parameters, GPT-1
    "gpt2": (12, 12, 768),  # 124M
    "gpt2-medium": (24, 16, 1024),  # 350M
    "gpt2-large": (36, 20, 1280),  # 774M
    "gpt2-xl": (48, 25, 1600),  # 1558M
    "gopher-44m": (8, 16, 512),  # Rae et al. 2021, table 1
    "gpt-mini": (6, 6, 192),
    "gpt-micro": (4, 4, 128),
    "gpt-nano": (3, 3, 48),
}
# Rules for settings: names, test of a value, what the error says is expected.
RULES = (
    ("n_layer", lambda v: type(v) is int and v >= 0,
     "a whole number, 0 or more (a model_type sets it)"),
    ("n_head n_embd vocab_size block_size", lambda v: type(v) is int and v > 0,
     "a whole number above 0 (a model_type sets n_head and n_embd)"),
    ("embd_pdrop resid_pdrop attn_pdrop", lambda v: 0 <= v <= 1 and v is not True,
     "a share from 0 to 1"),
)


def complete_config(config: CN, defaults: dict) -> CN:
    """Copies a configuration, with defaults and the sizes of its model_type filled in.

    Raises ValueError for a setting that is missing, wrong or contradicts the model_type.
    """
    complete = CN()
    # The class of the configuration may have some of them.
    for name in [*defaults, *vars(config)]:
        if hasattr(config, name) and not name.startswith("_"):
            setattr(complete, name, getattr(config, name))
    fill_in(complete, defaults, "GPT")

    model_type = complete.model_type
    if model_type not in (*PRESETS, "gpt", None):
        raise ValueError(f"got model_type={model_type!r}, expected {', '.join(PRESETS)}; "
                         "or give n_layer, n_head and n_embd")
    for name, size in zip(("n_layer", "n_head", "n_embd"), PRESETS.get(model_type, ())):
        if getattr(complete, name) not in (None, size):
            raise ValueError(f"model_type {model_type!r} means {name}={size}, but "
                             f"{name}={getattr(complete, name)} is given; give one of them")
        setattr(complete, name, size)

    check_config(complete, RULES)
    return complete


def _adapt_state_dict(model: GPT, state: dict, prefix: str, *args) -> None:
    """Lets weights load with or without a head of their own, and minGPT's masks."""
    own = model.state_dict(prefix=prefix)
    for key in list(state):
        if key.endswith((".attn.bias", ".attn.masked_bias")) and key not in own:
            del state[key]
    # An attention of one's own may have minGPT's mask, which is no weight.
    for name, mask in model.named_buffers(prefix.removesuffix(".")):
        if name.endswith(".attn.bias") and name in own:
            state.setdefault(name, mask)

    name = prefix + "lm_head.weight"
    wte = state.get(prefix + "transformer.wte.weight")
    if wte is None or name not in own or own[name].shape != wte.shape:
        return
    # Where more than the head is missing, only a part is meant to be loaded.
    if own.keys() - state.keys() == {name}:
        state[name] = wte.clone()
    head = state.get(name, wte)
    if model.is_tied and head is not wte and not torch.equal(head, wte):
        model.lm_head.weight = nn.Parameter(torch.empty_like(own[name]))
        model.config.tie_weights = False
        logger.info("these weights have a head of their own, so it is not tied any more")
