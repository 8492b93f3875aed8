"""
Muon, an optimizer for weight matrices: each step changes all directions of a matrix alike.

    python projects/chargpt/chargpt.py --trainer.optimizer=muon

A few directions dominate the gradient of a weight matrix. Gradient descent moves
far along them and hardly along the others, and so does AdamW. Muon sets all
singular values of a step to about 1: of the gradient's U S Vᵀ it keeps U Vᵀ, the
nearest orthogonal matrix. Source: https://kellerjordan.github.io/posts/muon/ (2024).
torch.optim.Muon computes in bfloat16, which many processors do slowly.
"""

import math

import torch
from torch.nn import functional as F


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Sets all singular values of a matrix to about 1: (m, n) -> (m, n).

    Each Newton-Schulz step turns a singular value s into a s + b s³ + c s⁵. With these
    a, b and c small values grow fast: after five steps nearly all are 0.7 to 1.2.
    """
    if matrix.size(0) > matrix.size(1):
        # The products of the transposed matrix are smaller.
        return orthogonalize(matrix.T, steps).T

    a, b, c = 3.4445, -4.7750, 2.0315
    # No singular value is larger than the norm.
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        A = x @ x.T  # (m, m)
        # B = b A + c A A, and x = a x + B x, each in one pass.
        B = torch.addmm(A, A, A, beta=b, alpha=c)  # (m, m)
        x = torch.addmm(x, B, x, beta=a)  # (m, n)
    return x


class Muon(torch.optim.Optimizer):
    """Trains matrices by orthogonal steps, with decoupled weight decay.

    A group with parts=3 holds matrices stacked from three, such as query, key and
    value: each third is orthogonalized by itself. Rows that took long steps lately
    take shorter ones ("NorMuon", Li et al. 2025, algorithm 1). A step changes a weight
    by 0.2 times the learning rate (root mean square), about as much as AdamW, so one rate
    serves both ("Muon is Scalable for LLM Training", Liu et al. 2025, section 2.2).
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95,
                 beta2: float = 0.95):
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2, parts=1)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step_matrix(matrix, matrix.grad, group)

    def _step_matrix(self, matrix: torch.Tensor, grad: torch.Tensor, group: dict) -> None:
        state = self.state[matrix]
        if not state:
            # Exponential moving averages of the gradient and each row's square.
            state["gradient"] = torch.zeros_like(matrix)  # (m, n)
            state["row_square"] = torch.zeros_like(matrix[:, :1])  # (m, 1)

        state["gradient"].lerp_(grad, 1 - group["momentum"])
        # Nesterov's momentum looks one step ahead.
        gradient = grad.lerp(state["gradient"], group["momentum"])
        parts = gradient.chunk(group["parts"])
        direction = torch.cat([orthogonalize(part) for part in parts])  # (m, n)

        row_square = direction.square().mean(dim=1, keepdim=True)  # (m, 1)
        state["row_square"].lerp_(row_square, 1 - group["beta2"])
        direction = direction / (state["row_square"].sqrt() + 1e-8)
        # Its length becomes 1. The step gets a length of 0.2 for each weight.
        direction = F.normalize(direction, dim=(0, 1))  # type: ignore[arg-type]
        length = group["lr"] * 0.2 * math.sqrt(matrix.numel())

        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.sub_(direction, alpha=length)


class JoinedOptimizer(torch.optim.Optimizer):
    """Joins several optimizers to one, which torch's schedulers accept."""

    def __init__(self, *parts: torch.optim.Optimizer):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts

    def step(self) -> None:  # type: ignore[override]
        """Takes a step of each part, with the groups and the state of this optimizer."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state
            part.step()
        if next(groups, None) is not None:
            raise ValueError("got a group that none of the joined optimizers trains")


def join_muon(groups: list[dict], in_blocks: set, stacked: set, config) -> JoinedOptimizer:
    """Makes Muon for the blocks' matrices, joined with AdamW for all other parameters.

    groups: AdamW's two groups, the matrices first. stacked: matrices stacked from three.
    """
    matrices = [p for p in groups[0]["params"] if p in in_blocks]
    rest = [p for p in groups[0]["params"] if p not in in_blocks]
    muon_groups = [{"params": [p for p in matrices if p in stacked], "parts": 3},
                   {"params": [p for p in matrices if p not in stacked]}]
    both = dict(lr=config.learning_rate, weight_decay=config.weight_decay)
    adamw = torch.optim.AdamW([{"params": rest}, groups[1]], **both, betas=config.betas, fused=True)
    muon = Muon(muon_groups, **both, momentum=getattr(config, "momentum", 0.95))
    return JoinedOptimizer(adamw, muon)
