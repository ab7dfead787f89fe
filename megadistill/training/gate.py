"""The gate, outside the engines: 6,466 parameters by default, whole on every rank, with a separate AdamW."""

from __future__ import annotations

from typing import Any

import torch

from megadistill.losses import QuantileGate
from megadistill.parallel.context import ParallelContext


class GateTrainer:
    """Keeps the quantile gate identical on all ranks.

    Its inputs are merged over the tensor-parallel group, so its gradients are equal there; over the data-parallel
    group they are summed by hand, because every loss is already divided by a global count.

    Args:
        gate: The gate.
        lr: Its learning rate, which stays constant.
        context: The grid of processes.
    """

    def __init__(self, gate: QuantileGate, *, lr: float, context: ParallelContext) -> None:
        self.gate, self.context = gate.to(context.device), context
        self.optimizer = torch.optim.AdamW(self.gate.parameters(), lr=lr, weight_decay=0.0)

    def reduce(self, loss_scale: float) -> bool:
        """Sums the gradient (one all-reduce over the data-parallel group).

        Args:
            loss_scale: The factor by which the back-propagated loss was multiplied; the gradient is divided by it.

        Returns:
            Whether all of the gradient is finite, the same on every rank.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.gate.parameters()]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        flat = self.context.sum_over_dp(flat) / loss_scale
        offset = 0
        for parameter in self.gate.parameters():
            parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        return bool(flat.isfinite().all())

    def step(self, skip: bool = False) -> None:
        """One update with the reduced gradient, unless ``skip``; the gradient is gone afterwards."""
        if not skip:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Parameters and optimizer, the same on every rank."""
        return {"gate": self.gate.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved ``state_dict``."""
        self.gate.load_state_dict(state["gate"])
        self.optimizer.load_state_dict(state["optimizer"])
