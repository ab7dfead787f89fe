"""What the objective can be told (section `loss` of a run's configuration)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

from megadistill.errors import ConfigError

IGNORE_INDEX = -100

Clip = Literal["gate", "fixed", "off"]
Remainder = Literal["bucket", "renormalise"]
Quantile = Literal["mass", "rank"]
GateObjective = Literal["minimise", "maximise", "frozen"]
Baseline = Literal[
    "forward_kl", "reverse_kl", "skewed_forward_kl", "skewed_reverse_kl", "jensen_shannon", "total_variation"
]
Divergence = Literal["dac_kl", Baseline]
Backend = Literal["auto", "torch", "compile", "triton"]


@dataclass(frozen=True)
class LossConfig:
    """The three terms and their options; docs/method.md gives the mathematics and says which choices are ours.

    Raises ConfigError for a value outside its range.
    """

    sft: float = 1.0
    """Weight of the cross-entropy on the labels. A term of weight 0 is not computed and is reported as 0."""
    dac_kl: float = 1.0
    """Weight of the dynamically clipped KL from teacher to student."""
    span: float = 1.0
    """Weight of the span correlation term."""
    divergence: Divergence = "dac_kl"
    """The token-level loss: dac_kl is the method's; the others are baselines. They have no mask and no gate, take the
    weight `dac_kl` and are reported in its place."""
    skew: float = 0.1
    """Share alpha of skewed_forward_kl, KL(p || alpha p + (1-alpha) q), and skewed_reverse_kl, KL(q || alpha q +
    (1-alpha) p)."""
    jensen_shannon_beta: float = 0.5
    """Share beta of jensen_shannon: beta KL(p || m) + (1-beta) KL(q || m), m = beta p + (1-beta) q."""
    temperature: float = 1.0
    """Divides the logits of both models in DAC-KL (whose term is multiplied by its square) and in the span term."""
    clip: Clip = "gate"
    """Quantile bounds from the learned gate, constant ones (`lower`, `upper`), or none (plain forward KL)."""
    remainder: Remainder = "bucket"
    """Clipped classes share one bucket, or both sides are renormalised over the kept classes."""
    quantile: Quantile = "mass"
    """What a quantile counts: teacher probability mass, or classes."""
    lower: float = 0.02
    """Lower quantile: the constant of clip=fixed and where the gate starts."""
    upper: float = 0.98
    """Upper quantile: the constant of clip=fixed and where the gate starts."""
    top_k: int = 32
    """Number of teacher classes that carry the quantile function and feed the gate."""
    softness: float = 0.25
    """Width of the mask's sigmoid edges, in nats."""
    chunk_tokens: int | Literal["auto"] = "auto"
    """Rows whose logits exist at once; `auto` chooses by shard size and device."""
    backend: Backend = "auto"
    """What runs the work between the matrix products: eager torch, torch.compile, Triton, or the best of them here."""
    gate_objective: GateObjective = "minimise"
    """What the gate does to DAC-KL; the coverage guard is added to either direction."""
    guards: bool = True
    """Keep the gate from collapsing: `lower_max` and `upper_min` by construction, and the coverage penalty."""
    lower_max: float = 0.1
    """Largest lower quantile that the gate can give."""
    upper_min: float = 0.9
    """Smallest upper quantile that the gate can give."""
    coverage_weight: float = 50.0
    """Weight of relu(clipped mass - coverage_target)^2 in the gate's objective."""
    coverage_target: float = 0.05
    """Clipped teacher mass that is free of penalty."""
    span_eps: float = 1e-6
    """Smoothing of the norm in the span term."""

    def __post_init__(self) -> None:
        for name in ("sft", "dac_kl", "span", "coverage_weight"):
            self._number(name, "a number >= 0", lambda value: value >= 0)
        for name in ("temperature", "softness", "span_eps"):
            self._number(name, "a number > 0", lambda value: value > 0)
        for name in ("lower", "upper", "coverage_target"):
            self._number(name, "a number in [0, 1]", lambda value: 0 <= value <= 1)
        for name in ("lower_max", "upper_min", "skew", "jensen_shannon_beta"):
            self._number(name, "a number in (0, 1)", lambda value: 0 < value < 1)
        self._choice("divergence", Divergence)
        self._choice("backend", Backend)
        self._choice("clip", Clip)
        self._choice("remainder", Remainder)
        self._choice("quantile", Quantile)
        self._choice("gate_objective", GateObjective)
        for low, high in (("lower", "upper"), ("lower_max", "upper_min")):
            if getattr(self, low) >= getattr(self, high):
                raise ConfigError(
                    f"loss.{low}={getattr(self, low)} must be smaller than loss.{high}={getattr(self, high)}"
                )
        if not _is_integer(self.top_k) or self.top_k < 1:
            raise ConfigError(f"loss.top_k={self.top_k!r} must be an integer >= 1")
        if self.chunk_tokens != "auto" and (not _is_integer(self.chunk_tokens) or self.chunk_tokens < 1):
            raise ConfigError(f"loss.chunk_tokens={self.chunk_tokens!r} must be 'auto' or an integer >= 1")
        if not isinstance(self.guards, bool):
            raise ConfigError(f"loss.guards={self.guards!r} must be true or false")

    @property
    def is_clipped(self) -> bool:
        """Whether a mask is computed at all."""
        return self.dac_kl > 0 and self.divergence == "dac_kl" and self.clip != "off"

    @property
    def uses_gate(self) -> bool:
        """Whether the mask's quantiles come from the gate."""
        return self.is_clipped and self.clip == "gate"

    def _number(self, name: str, allowed: str, accept: Any) -> None:
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not -sys.float_info.max <= value <= sys.float_info.max
            or not accept(value)
        ):
            raise ConfigError(f"loss.{name}={value!r} must be {allowed}")

    def _choice(self, name: str, allowed: Any) -> None:
        if getattr(self, name) not in get_args(allowed):
            raise ConfigError(f"loss.{name}={getattr(self, name)!r} must be one of {', '.join(get_args(allowed))}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
