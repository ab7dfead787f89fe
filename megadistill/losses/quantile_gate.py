"""The gate of DAC-KL, and what takes its place (paper: Eq. 6-7; docs/method.md, "Token level").

Suffixes: C tokens, K knots. All quantities are in nats or logits of a quantile; nothing here communicates.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from megadistill.config.loss import LossConfig
from megadistill.errors import ConfigError

_FLOOR = -30.0  # nats; what a class below e^-30 weighs does not matter to where the mask should end
_INPUT_SCALE = 0.1
_DEFAULTS = LossConfig()


class QuantileGate(nn.Module):
    """MLP (two hidden layers of 64) from the teacher's sorted top-K to a lower and an upper quantile, as logits.

    With an upper quantile of 1 there is no upper edge, and the gate learns the lower one alone.

    With guards the bounds hold by construction: lambda_l = logit(lower_max) - softplus(a) and
    lambda_u = logit(upper_min) + softplus(b). Every pair below and above the two bounds can be reached, and
    lambda_l < lambda_u. Without guards: lambda_l = a and lambda_u = lambda_l + softplus(b).
    The weights come from a separate generator, so every rank starts from the same gate; the last layer starts at
    zero, so that every token starts at the quantiles (lower, upper).

    Args:
        top_k: Number of log-probabilities that it reads.
        lower: Lower quantile at the start.
        upper: Upper quantile at the start.
        lower_max: Largest lower quantile, with guards.
        upper_min: Smallest upper quantile, with guards.
        guards: Whether the bounds hold.
        hidden_size: Size of the hidden layers.
        seed: Seed of the weights.

    Raises:
        ConfigError: The quantiles are not in order.
    """

    def __init__(
        self,
        top_k: int = _DEFAULTS.top_k,
        *,
        lower: float = _DEFAULTS.lower,
        upper: float = _DEFAULTS.upper,
        lower_max: float = _DEFAULTS.lower_max,
        upper_min: float = _DEFAULTS.upper_min,
        guards: bool = _DEFAULTS.guards,
        hidden_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < lower < upper <= 1:
            raise ConfigError(f"the gate starts at lower={lower}, upper={upper}; it needs 0 < lower < upper <= 1")
        if guards and not (lower < lower_max < upper_min < upper):
            raise ConfigError(
                f"the gate starts at lower={lower}, upper={upper}; with guards it needs "
                f"lower < lower_max={lower_max} < upper_min={upper_min} < upper"
            )
        self.top_k, self.guards, self.has_upper = top_k, guards, upper < 1
        self.max_lambda_l, self.min_lambda_u = logit(lower_max), logit(upper_min)
        sizes = ((top_k + 1, hidden_size), (hidden_size, hidden_size), (hidden_size, 1 + self.has_upper))
        first, second, last = (skip_init(nn.Linear, *size) for size in sizes)
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
        start_l, start_u = logit(lower), logit(upper)
        start = [_inverse_softplus(self.max_lambda_l - start_l) if guards else start_l]
        if self.has_upper:
            start.append(_inverse_softplus(start_u - (self.min_lambda_u if guards else start_l)))
        self._initialize(start, seed)

    @classmethod
    def from_config(cls, config: LossConfig, *, seed: int = 0) -> QuantileGate:
        """The gate that ``config`` describes."""
        return cls(
            config.top_k,
            lower=config.lower,
            upper=config.upper,
            lower_max=config.lower_max,
            upper_min=config.upper_min,
            guards=config.guards,
            seed=seed,
        )

    def forward(self, sorted_log_probs: Tensor, log_tail: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantile logits (lambda_l [C], lambda_u [C] or None), computed in the dtype of the parameters.

        Args:
            sorted_log_probs: [C, K] the teacher's largest log-probabilities, descending; missing columns are filled.
            log_tail: [C] log of the sum of all other probabilities, -inf when there is none.
        """
        dtype = next(self.parameters()).dtype
        features = torch.cat([F.pad(sorted_log_probs, (0, self.top_k - sorted_log_probs.shape[-1]), value=_FLOOR),
                              log_tail.unsqueeze(-1)], -1)  # fmt: skip
        first, *others = self.layers(features.clamp_min(_FLOOR).to(dtype) * _INPUT_SCALE).unbind(-1)
        lambda_l = self.max_lambda_l - F.softplus(first) if self.guards else first
        if not others:
            return lambda_l, None
        return lambda_l, (self.min_lambda_u if self.guards else lambda_l) + F.softplus(others[0])

    def _initialize(self, start: list[float], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        linears = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for linear in linears[:-1]:
                bound = linear.in_features**-0.5
                for parameter in (linear.weight, linear.bias):
                    drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
                    parameter.copy_((2 * drawn - 1) * bound)
            linears[-1].weight.zero_()
            linears[-1].bias.copy_(torch.tensor(start))


def logit(probability: float) -> float:
    """Log of the odds; infinite for 0 and 1."""
    if probability in (0.0, 1.0):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


def learning_parameters(gate: nn.Module | None, config: LossConfig, *, looks_ahead: bool) -> list[Tensor]:
    """The gate's parameters that get a gradient.

    Args:
        gate: The gate, if there is one.
        config: Whether and what it learns.
        looks_ahead: Whether the student's head after the virtual step is there.

    Raises:
        ConfigError: The gate or that head is missing, or the gate does not fit.
    """
    if config.clip != "gate":
        return []
    if gate is None and config.uses_gate:
        raise ConfigError("loss.clip=gate needs a gate; pass a QuantileGate or set loss.clip to fixed or off")
    if getattr(gate, "top_k", config.top_k) != config.top_k:
        raise ConfigError(f"loss.top_k={config.top_k} differs from the gate's top_k={getattr(gate, 'top_k', None)}")
    if gate is None or config.gate_objective == "frozen" or not torch.is_grad_enabled():
        return []
    if config.looks_ahead and not looks_ahead:
        raise ConfigError("loss.gate_objective=student needs the student's head after a virtual step: pass ahead")
    return [parameter for parameter in gate.parameters() if parameter.requires_grad]
