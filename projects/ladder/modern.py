"""
Changes mingpt's GPT by inventions that came after GPT-2; each can be switched off.

    config = ModernGPT.get_default_config()
    config.qk_norm = False                      # one of five switches
    model = ModernGPT(config)                   # generate, cache and trainer are GPT's
    train_config.optimizer = "muon"             # the sixth change is the trainer's setting
    train_config.learning_rate = 1e-2

The ladder measures them: python projects/ladder/ladder.py --system.rungs=ModernGPT
In shapes: B batch, T time, C channels, nh heads, hs head size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mingpt.generation import KVCache
from mingpt.model import GPT, CausalSelfAttention
from mingpt.utils import CfgNode


class ModernAttention(CausalSelfAttention):
    """Sees how far apart two tokens are, and compares only directions."""

    def __init__(self, config: CfgNode):
        super().__init__(config)
        self.rotary = config.rotary
        self.qk_norm = config.qk_norm
        hs = config.n_embd // config.n_head
        if config.rotary and hs % 2 == 1:
            raise ValueError(f"got heads of {hs} channels, expected an even number, as rotation "
                             "takes pairs; change n_embd or n_head")

        # Pair i of a head's numbers turns by speed[i] with each token: the
        # first by a whole radian, the last by about a ten thousandth.
        speed = 10_000.0 ** (-torch.arange(0, hs, 2) / hs)  # (hs / 2,)
        angles = torch.arange(config.block_size)[:, None] * speed  # (block_size, hs / 2)
        self.register_buffer("angles", angles, persistent=False)

    def compute_qkv(self, x: Tensor, cache: KVCache | None = None) -> tuple[Tensor, ...]:
        """Computes query, key and value: (B, T, C) -> three of (B, nh, T, hs)."""
        q, k, v = super().compute_qkv(x)
        if self.qk_norm:
            # Query and key get a fixed length, so scores cannot grow without
            # bound (Henry et al. 2020, "Query-Key Normalization").
            q = F.rms_norm(q, q.shape[-1:])
            k = F.rms_norm(k, k.shape[-1:])

        if self.rotary:
            past = 0 if cache is None else cache.length
            angles = self.angles[past:past + x.size(1)]  # (T, hs / 2)
            q = rotate(q, angles)
            k = rotate(k, angles)
        return q, k, v


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns pairs of numbers, x (B, nh, T, hs), by angles (T, hs / 2).

    The product of a query and a key then depends on the distance between their tokens
    and not on their places. Su et al. 2021, "RoFormer", section 3.2.
    """
    a, b = x.chunk(2, dim=-1)  # (B, nh, T, hs / 2) each
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class SquaredReLU(nn.Module):
    """Squares what is positive and drops the rest (So et al. 2021, "Primer", section 4)."""

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        # Each token is treated for itself. The argument tells generation so.
        return x.relu().square()


class NoPositions(nn.Module):
    """Stands in the place of the table of positions, which rotary attention does not need."""

    def forward(self, positions: Tensor, cache: KVCache | None = None) -> float:
        return 0.0


class ModernGPT(GPT):
    """Changes a GPT in five ways, each with a switch in its config."""

    @staticmethod
    def get_default_config() -> CfgNode:
        C = GPT.get_default_config()
        C.rotary = True  # positions by rotation of query and key, in place of a learned table
        C.rms_norm = True  # normalisation without a mean and a bias, in place of LayerNorm
        C.qk_norm = True  # query and key of the same length
        C.relu_squared = True  # in place of GELU
        C.zero_init = True  # each block adds nothing to the residual stream at the start
        return C

    def __init__(self, config: CfgNode):
        """Builds a GPT, then exchanges its parts. The weights it keeps are the GPT's."""
        super().__init__(config)
        c = self.config
        if c.rotary:
            self.transformer.wpe = NoPositions()
        if c.rms_norm:
            # Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
            self.transformer.ln_f = nn.RMSNorm(c.n_embd)

        for block in self.transformer.h:
            attention = ModernAttention(c)
            attention.load_state_dict(block.attn.state_dict())
            block.attn = attention
            if c.rms_norm:
                block.ln_1 = nn.RMSNorm(c.n_embd)
                block.ln_2 = nn.RMSNorm(c.n_embd)
            if c.relu_squared:
                block.mlp.act = SquaredReLU()
            if c.zero_init:
                # Zhang et al. 2019, "Fixup Initialization", section 3.
                nn.init.zeros_(block.attn.c_proj.weight)
                nn.init.zeros_(block.mlp.c_proj.weight)
