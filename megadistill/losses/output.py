"""What the objective reports: one table of its scalars, which are read by name everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor


def _scalar(metric: str, *, per: str = "token") -> Any:
    """A scalar that is a sum divided by the global count of ``per``, and its name in metrics.jsonl."""
    return field(metadata={"metric": metric, "per": per})


@dataclass(frozen=True, kw_only=True)
class DistillScalars:
    """The scalars of a call, each a sum divided by a global count.

    To add one: a field here, and in ``objective.py`` one line that adds a chunk's share to the total of that name.

    Attributes:
        sft: Cross-entropy, in nats per token.
        dac_kl: Token loss times temperature squared, in nats per token; without its weight, like the other terms.
        span: Span term, a norm per pair.
        policy: Policy term per token; it can be negative.
        kept_mass: Teacher probability that the mask keeps.
        classes: Sum of the mask over the classes; 0 without clipping, like the next ones.
        few_classes: Share of the tokens of which the mask keeps less than 1.5 classes.
        mean_lower: Quantile l of the mask.
        square_lower: Its square.
        mean_upper: Quantile u of the mask; 1 without clipping.
    """

    sft: Tensor = _scalar("loss/sft")
    dac_kl: Tensor = _scalar("loss/dac_kl")
    span: Tensor = _scalar("loss/span", per="pair")
    policy: Tensor = _scalar("loss/policy")
    kept_mass: Tensor = _scalar("kept_mass")
    classes: Tensor = _scalar("mask/classes")
    few_classes: Tensor = _scalar("mask/few_classes")
    mean_lower: Tensor = _scalar("gate/lower")
    square_lower: Tensor = _scalar("gate/lower_square")
    mean_upper: Tensor = _scalar("gate/upper")


TERMS = ("sft", "dac_kl", "span", "policy")  # names of their weights in LossConfig, too
SCALAR_NAMES = tuple(scalar.name for scalar in fields(DistillScalars))
METRIC_NAMES = tuple(str(scalar.metadata["metric"]) for scalar in fields(DistillScalars))
PER_PAIR = frozenset(scalar.name for scalar in fields(DistillScalars) if scalar.metadata["per"] == "pair")


@dataclass(frozen=True, kw_only=True)
class DistillOutput(DistillScalars):
    """The loss and what to log. All but ``loss`` is detached; all of it is equal on all tensor-parallel ranks.

    Scalars are this call's sum divided by the global count, so that adding them up over data-parallel ranks and
    micro-batches gives the global mean.

    Attributes:
        loss: The weighted sum, differentiable.
        kl_map: [T] unclipped KL in nats at ``temperature``, 0 where the token is ignored.
        teacher_top1: [T] int64 argmax p, -1 where the token is ignored.
    """

    loss: Tensor
    kl_map: Tensor
    teacher_top1: Tensor

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The detached scalars (0-dim, dtype of the loss) by their name in metrics.jsonl.

        Always those of ``METRIC_NAMES``, in this order: stacked and summed over ranks they are the global metrics.
        """
        return {metric: getattr(self, name) for name, metric in zip(SCALAR_NAMES, METRIC_NAMES, strict=True)}
