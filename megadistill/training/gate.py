"""The gate outside the engines: 13 thousand parameters, whole on every rank, with an AdamW of their own."""

from __future__ import annotations

from typing import Any

import torch

from megadistill.losses import QuantileGate
from megadistill.parallel.context import ParallelContext


class GateTrainer:
    """Keeps the quantile gate identical on all ranks.

    Its inputs are merged over the tensor-parallel group, so its gradients are equal there; over the data-parallel
    group they are summed by hand, because every loss is already divided by a global count.
    """

    def __init__(self, gate: QuantileGate, *, lr: float, context: ParallelContext) -> None:
        self.gate, self.context = gate.to(context.device), context
        self.optimizer = torch.optim.AdamW(self.gate.parameters(), lr=lr, weight_decay=0.0)

    def reduce(self, loss_scale: float) -> bool:
        """Sums the gradient (one all-reduce over dp) and says whether all of it is finite, the same on every rank.
        ``loss_scale``: the factor on the loss that was back-propagated."""
        for parameter in self.gate.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in self.gate.parameters()])
        flat = self.context.sum_over_dp(flat) / loss_scale
        offset = 0
        for parameter in self.gate.parameters():
            parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        return bool(flat.isfinite().all())

    def step(self, skip: bool = False) -> None:
        """One update with the reduced gradient, unless ``skip``."""
        if not skip:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"gate": self.gate.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gate.load_state_dict(state["gate"])
        self.optimizer.load_state_dict(state["optimizer"])
