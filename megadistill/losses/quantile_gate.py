"""The gate of DAC-KL and the teacher's quantile function (paper: Eq. 6-7; docs/method.md, "Token level").

Suffixes: C tokens, K knots. All quantities are in nats or logits of a quantile; nothing here communicates.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from megadistill.config.loss import LossConfig, Quantile
from megadistill.errors import ConfigError

_FLOOR = -30.0  # nats; what a class below e^-30 weighs does not matter to where the mask should end
_INPUT_SCALE = 0.1
_DEFAULTS = LossConfig()


class QuantileGate(nn.Module):
    """MLP (two hidden layers of 64) from the teacher's sorted top-K to a lower and an upper quantile, as logits.

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
        if not 0 < lower < upper < 1:
            raise ConfigError(f"the gate starts at lower={lower}, upper={upper}; it needs 0 < lower < upper < 1")
        if guards and not (lower < lower_max < upper_min < upper):
            raise ConfigError(
                f"the gate starts at lower={lower}, upper={upper}; with guards it needs "
                f"lower < lower_max={lower_max} < upper_min={upper_min} < upper"
            )
        self.top_k, self.guards = top_k, guards
        self.max_lambda_l, self.min_lambda_u = _logit(lower_max), _logit(upper_min)
        sizes = ((top_k + 1, hidden_size), (hidden_size, hidden_size), (hidden_size, 2))
        first, second, last = (skip_init(nn.Linear, *size) for size in sizes)
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
        start_l, start_u = _logit(lower), _logit(upper)
        if guards:
            start = [_inverse_softplus(self.max_lambda_l - start_l), _inverse_softplus(start_u - self.min_lambda_u)]
        else:
            start = [start_l, _inverse_softplus(start_u - start_l)]
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

    def forward(self, sorted_log_probs: Tensor, log_tail: Tensor) -> tuple[Tensor, Tensor]:
        """Quantile logits (lambda_l [C], lambda_u [C]), computed in the dtype of the parameters.

        Args:
            sorted_log_probs: [C, K] the teacher's largest log-probabilities, descending; missing columns are filled.
            log_tail: [C] log of the sum of all other probabilities, -inf when there is none.
        """
        dtype = next(self.parameters()).dtype
        features = torch.cat([F.pad(sorted_log_probs, (0, self.top_k - sorted_log_probs.shape[-1]), value=_FLOOR),
                              log_tail.unsqueeze(-1)], -1)  # fmt: skip
        out_C2 = self.layers(features.clamp_min(_FLOOR).to(dtype) * _INPUT_SCALE)
        first, second = F.softplus(out_C2[:, 0]) if self.guards else out_C2[:, 0], F.softplus(out_C2[:, 1])
        if self.guards:
            return self.max_lambda_l - first, self.min_lambda_u + second
        return first, first + second

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


class QuantileFunction:
    """Log-probability at a quantile: piecewise linear on the logit scale through the sorted top-K, slope 1 outside.

    Slope 1 continues a geometric tail (quantile of mass) or Zipf's law (quantile of classes) exactly. Computed in
    float64 and in the log domain, because the mass beside a confident teacher's top class is far below round-off.

    Args:
        sorted_log_probs: [C, K] the teacher's largest log-probabilities, descending.
        log_tail: [C] log of the sum of all other probabilities.
        kind: Quantiles of mass or of ranks.
        num_classes: V.
    """

    def __init__(self, sorted_log_probs: Tensor, log_tail: Tensor, kind: Quantile, num_classes: int) -> None:
        log_probs_CK = sorted_log_probs.to(torch.float64)
        if kind == "mass":
            half_CK = log_probs_CK - math.log(2)
            # log of the mass above, and of tail + mass below; each without the class itself, which counts half.
            above_CK = torch.logcumsumexp(log_probs_CK, -1)
            below_CK = torch.logcumsumexp(
                torch.cat([log_tail.to(torch.float64).unsqueeze(-1), log_probs_CK.flip(-1)], -1), -1
            ).flip(-1)
            empty_C1 = torch.full_like(half_CK[:, :1], -math.inf)
            log_above_CK = torch.logaddexp(torch.cat([empty_C1, above_CK[:, :-1]], -1), half_CK)
            log_below_CK = torch.logaddexp(below_CK[:, 1:], half_CK)
            lambda_CK = log_below_CK - log_above_CK
        else:
            rank_K = torch.arange(log_probs_CK.shape[-1], device=log_probs_CK.device, dtype=torch.float64) + 0.5
            lambda_CK = (torch.log(num_classes - rank_K) - torch.log(rank_K)).expand_as(log_probs_CK)
        self.knots_CK = lambda_CK.flip(-1).contiguous()
        self.values_CK = log_probs_CK.flip(-1)

    def __call__(self, quantile_logit: Tensor) -> Tensor:
        """Thresholds theta [C] float64 at quantile logits [C], which may be infinite; differentiable in them."""
        point_C1 = quantile_logit.to(torch.float64).unsqueeze(-1)
        right_C1 = torch.searchsorted(self.knots_CK, point_C1.detach().contiguous())
        last = self.knots_CK.shape[-1] - 1
        low_C1, high_C1 = (right_C1 - 1).clamp(0, last), right_C1.clamp(0, last)
        run_C1 = self.knots_CK.gather(-1, high_C1) - self.knots_CK.gather(-1, low_C1)
        rise_C1 = self.values_CK.gather(-1, high_C1) - self.values_CK.gather(-1, low_C1)
        is_inside_C1 = run_C1 > 0
        slope_C1 = torch.where(is_inside_C1, rise_C1 / torch.where(is_inside_C1, run_C1, 1.0), 1.0)
        theta_C1 = self.values_CK.gather(-1, low_C1) + slope_C1 * (point_C1 - self.knots_CK.gather(-1, low_C1))
        return theta_C1.squeeze(-1)


def constant_quantiles(lower: float, upper: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Quantile logits of clip=fixed for tokens [C] like ``like``; 0 and 1 are -inf and +inf."""
    return torch.full_like(like, _logit(lower)), torch.full_like(like, _logit(upper))


def _logit(probability: float) -> float:
    if probability in (0.0, 1.0):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))
