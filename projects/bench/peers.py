"""
GPT-2 as others build it, for bench.py: the same sizes and weights, another way to compute.

    model = PEERS["transformers"](config)       # the config of a mingpt.model.GPT
    logits, loss = model(x, y)
    idx = model.generate(idx, 20)               # takes the likeliest token each time

minGPT and nanoGPT are written again here by their ideas. Their designs are what the bench
compares, not their files.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class FormulaGELU(nn.Module):
    """Computes GELU's tanh form operation by operation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + torch.tanh(inner))


class Attention(nn.Module):
    """Computes causal attention: by its formula with a stored mask, or by torch's kernel."""

    def __init__(self, c, by_formula: bool):
        super().__init__()
        self.n_head = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd)
        self.weight_dropout = nn.Dropout(c.attn_pdrop)
        self.out_dropout = nn.Dropout(c.resid_pdrop)
        mask = torch.ones(c.block_size, c.block_size).tril() if by_formula else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = [part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for part in self.c_attn(x).chunk(3, dim=-1)]  # (B, nh, T, hs) each

        if self.mask is None:
            dropout_p = self.weight_dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        else:
            scores = q @ k.transpose(2, 3) / math.sqrt(q.size(-1))  # (B, nh, T, T)
            scores = scores.masked_fill(self.mask[:T, :T] == 0, -math.inf)
            y = self.weight_dropout(scores.softmax(dim=-1)) @ v

        joined = y.transpose(1, 2).flatten(2)  # (B, nh, T, hs) -> (B, T, C)
        return self.out_dropout(self.c_proj(joined))


class Block(nn.Module):
    """Adds attention and an MLP to the residual stream."""

    def __init__(self, c, by_formula: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.n_embd)
        self.attn = Attention(c, by_formula)
        self.ln_2 = nn.LayerNorm(c.n_embd)
        self.mlp = nn.ModuleDict(dict(
            c_fc=nn.Linear(c.n_embd, 4 * c.n_embd),
            act=FormulaGELU() if by_formula else nn.GELU(),
            c_proj=nn.Linear(4 * c.n_embd, c.n_embd),
            dropout=nn.Dropout(c.resid_pdrop),
        ))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        h = self.ln_2(x)
        for part in self.mlp.values():
            h = part(h)
        return x + h


class PlainGPT(nn.Module):
    """Builds GPT-2 without a cache: each new token reads the whole row again.

    as_mingpt: attention and GELU by their formulas, a head of its own, and all tokens
    are scored when it writes. Else as nanoGPT: torch's kernels, a head that is the
    embedding, and only the last token is scored.
    """

    def __init__(self, c, as_mingpt: bool):
        super().__init__()
        self.as_mingpt = as_mingpt
        self.block_size = c.block_size
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd),
            wpe=nn.Embedding(c.block_size, c.n_embd),
            drop=nn.Dropout(c.embd_pdrop),
            h=nn.ModuleList([Block(c, by_formula=as_mingpt) for _ in range(c.n_layer)]),
            ln_f=nn.LayerNorm(c.n_embd),
        ))

        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if not as_mingpt:
            self.lm_head.weight = self.transformer.wte.weight

    def features(self, idx: torch.Tensor) -> torch.Tensor:
        parts = self.transformer
        pos = torch.arange(idx.size(1), device=idx.device)  # (T,)
        x = parts.drop(parts.wte(idx) + parts.wpe(pos))  # (B, T, C)
        for block in parts.h:
            x = block(x)
        return parts.ln_f(x)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.lm_head(self.features(x))  # (B, T, V)
        return logits, mean_loss(logits, y)

    @torch.no_grad()
    def generate(self, idx: torch.Tensor, new: int) -> torch.Tensor:
        for _ in range(new):
            h = self.features(idx[:, -self.block_size:])  # (B, T, C)
            if not self.as_mingpt:
                h = h[:, -1:]  # (B, 1, C)
            scores = self.lm_head(h)[:, -1]  # (B, V)
            idx = torch.cat([idx, scores.argmax(-1, keepdim=True)], dim=1)
        return idx


class Transformers(nn.Module):
    """Wraps GPT2LMHeadModel. Its head is tied, and it has a cache."""

    def __init__(self, c):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel
        # No token ends a text.
        self.net = GPT2LMHeadModel(GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
            n_head=c.n_head, embd_pdrop=c.embd_pdrop, resid_pdrop=c.resid_pdrop,
            attn_pdrop=c.attn_pdrop, bos_token_id=None, eos_token_id=None))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.net(x, use_cache=False).logits  # (B, T, V)
        return logits, mean_loss(logits, y)

    def generate(self, idx: torch.Tensor, new: int) -> torch.Tensor:
        mask = torch.ones_like(idx)
        return self.net.generate(idx, attention_mask=mask, max_new_tokens=new, do_sample=False,
                                 pad_token_id=0)


def mean_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Computes the cross-entropy in nats: logits (B, T, V), y (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)


PEERS = {
    "minGPT": lambda c: PlainGPT(c, as_mingpt=True),
    "nanoGPT": lambda c: PlainGPT(c, as_mingpt=False),
    "transformers": Transformers,
}
