"""
Muon, an optimizer for matrices: each step changes all directions of a matrix alike. Several projects train with it.

    python projects/chargpt/chargpt.py --trainer.optimizer=muon

A gradient of a weight matrix is mostly a sum of few directions. Plain descent, and AdamW too, moves along these and hardly
along the others. Muon sets all singular values of the step to about 1: of U S Vᵀ it takes U Vᵀ, the nearest orthogonal matrix.
Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. torch.optim.Muon does so in bfloat16, in which many
processors do not compute: without AVX-512 it was seen to take 32 times as long. It does not balance the rows, as here.
"""

import math

import torch
from torch.nn import functional as F

from mingpt.model import GPT

def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """U S Vᵀ -> about U Vᵀ, for a matrix (m, n): the Newton-Schulz iteration, which needs products alone.

    Every step turns each singular value s into 3.4445 s - 4.775 s³ + 2.0315 s⁵, which after a few lies between 0.7 and 1.2
    unless it was very small; Jordan chose the factors to lift small ones fast.
    """
    if matrix.size(0) > matrix.size(1):
        return orthogonalize(matrix.T, steps).T # the products below are of the smaller size
    x = matrix / (matrix.norm() + 1e-7) # no singular value is above 1
    for _ in range(steps):
        square = x @ x.T # (m, m)
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x

class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay, for parameters that are matrices.

    Rows that took long steps of late take shorter ones, so that all neurons learn alike: "NorMuon", Li et al. 2025,
    algorithm 1. A step changes each weight by 0.2 times the rate (root mean square), which is what AdamW's do, so that the
    rate of one serves the other (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).
    A parameter group with parts=3 has matrices that are three in one, one above the other.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95, beta2: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2, parts=1))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if not self.state[p]: # both are means in which recent steps count more
                    self.state[p]["mean"] = torch.zeros_like(p) # of the gradients
                    self.state[p]["row"] = torch.zeros_like(p[:, :1]) # of the squared directions of each row, (m, 1)
                mean, row = self.state[p]["mean"], self.state[p]["row"]
                mean.lerp_(p.grad, 1 - momentum)
                ahead = p.grad.lerp(mean, momentum) # Nesterov: the mean a step ahead
                direction = torch.cat([orthogonalize(part) for part in ahead.chunk(group["parts"])])
                row.lerp_(direction.square().mean(1, keepdim=True), 1 - group["beta2"])
                direction = F.normalize(direction / (row.sqrt() + 1e-8), dim=(0, 1)) # of length 1
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(direction, alpha=-lr * 0.2 * math.sqrt(p.numel()))

class Optimizers:
    """Several optimizers in the place of one, each with parameters of its own."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)

class MuonGPT(GPT):
    """A GPT whose matrices Muon may train."""

    def configure_optimizers(self, train_config) -> torch.optim.AdamW | Optimizers:
        """GPT's AdamW; with train_config.optimizer = 'muon' that one has what has no weight decay, Muon the matrices.

        train_config.momentum, if there is one, is Muon's.
        """
        adamw = super().configure_optimizers(train_config)
        if train_config.optimizer == "adamw":
            return adamw
        if train_config.optimizer != "muon":
            raise ValueError(f"got optimizer={train_config.optimizer}, expected muon or adamw")
        matrices = [p for p in adamw.param_groups.pop(0)["params"] if p.requires_grad]
        joined = {p for name, p in self.named_parameters() if name.endswith("c_attn.weight")} # query, key and value
        groups = [{"params": [p for p in matrices if p in joined], "parts": 3},
                  {"params": [p for p in matrices if p not in joined]}]
        given = {"momentum": train_config.momentum} if hasattr(train_config, "momentum") else {} # or Muon's default
        return Optimizers(adamw, Muon(groups, train_config.learning_rate, train_config.weight_decay, **given))
