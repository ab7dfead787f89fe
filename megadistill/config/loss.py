"""Section ``loss`` of a run's configuration, which is also what the losses take from Python."""

import warnings
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from megadistill.config.adaptive import AdakdSection, TaidSection, check_adakd, check_taid
from megadistill.config.section import (
    NonNegativeFloat,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    Section,
    UnitInterval,
    allowed,
    require_combination,
    section_type,
)
from megadistill.errors import ConfigError
from megadistill.files import nearest

Clip = Literal["gate", "fixed", "entropy", "off"]
Remainder = Literal["bucket", "truncate", "renormalize", "none"]
Coverage = Literal["absolute", "relative"]
GateObjective = Literal["minimize", "maximize", "student", "frozen"]
# ``dac_kl``, and the names in ``megadistill.losses.divergences``, which cannot be imported from here.
TokenLoss = Literal[
    "dac_kl",
    "forward_kl",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "jensen_shannon",
    "total_variation",
    "alpha_beta",
]
SKEWED = frozenset({"skewed_forward_kl", "skewed_reverse_kl"})  # those of which ``skew`` is a setting
SpanRelation = Literal["hadamard", "joint", "log"]
Backend = Literal["auto", "torch", "compile", "triton"]

# Spellings of former releases -> the present ones.
_RESPELLED = {"renormalise": "renormalize", "minimise": "minimize", "maximise": "maximize"}


class LossConfig(Section):
    """The three terms and their options; docs/method.md has the mathematics and marks the choices that are ours.

    From Python, every field is a keyword with the default of the configuration: ``LossConfig(clip="fixed", span=0)``.

    Raises:
        ConfigError: A value that is not allowed, in one line with its key, the value and what is allowed. (As a part
            of a whole configuration the error is pydantic's, to which ``load_config`` adds the file.)
    """

    sft: NonNegativeFloat = Field(1.0, description="Weight of the cross-entropy on the references.")
    dac_kl: NonNegativeFloat = Field(1.0, description="Weight of the token loss DAC-KL (paper, Eq. 6-8).")
    span: NonNegativeFloat = Field(1.0, description="Weight of the span loss (paper, Eq. 10).")
    sft_text: Literal["reference", "text"] = Field(
        "reference",
        description="What the cross-entropy is computed on: the references, or the text of generation.mode (SeqKD).",
    )
    average: Literal["token", "row"] = Field(
        "token",
        description="Cross-entropy and token loss: mean over all tokens, or over rows of each row's mean.",
    )
    divergence: TokenLoss = Field(
        "dac_kl",
        description="The token loss: DAC-KL, or a baseline with its weight and its place in the metrics (no gate).",
    )
    skew: OpenUnitInterval = Field(
        0.1, description="alpha of the skewed divergences: the first side's share of the mixture."
    )
    jensen_shannon_beta: OpenUnitInterval = Field(0.5, description="beta of jensen_shannon: the teacher's share.")
    ab_alpha: NonNegativeFloat = Field(
        0.2, description="alpha of alpha_beta; larger: larger gaps count more. 1 beside beta 0: the forward KL."
    )
    ab_beta: NonNegativeFloat = Field(
        0.7, description="beta of alpha_beta; larger: classes count more by the student's probability."
    )
    temperature: PositiveFloat = Field(
        1.0, description="Distillation temperature tau; the token loss is multiplied by tau squared."
    )
    clip: Clip = Field(
        "gate",
        description="Where the mask ends. gate: at quantiles that an MLP predicts; fixed: at lower and upper; entropy: "
        "at lower times the teacher's entropy over log V, and at upper; off: plain forward KL.",
    )
    remainder: Remainder = Field(
        "bucket",
        description="Classes that are clipped away. bucket: they are one class; truncate: the teacher is renormalized "
        "over the kept ones, the student has all; renormalize: both are; none: sums as they are, with the top class "
        "once more (paper, Eq. 7-8).",
    )
    lower: UnitInterval = Field(
        0.02, description="Lower quantile of the teacher's mass for clip fixed and entropy; where the gate starts."
    )
    upper: UnitInterval = Field(
        1.0,
        description="Upper quantile for clip fixed and entropy; where the gate starts. 1: the mask has no upper edge.",
    )
    top_k: PositiveInt = Field(32, description="Teacher log-probabilities that the gate sees.")
    softness: PositiveFloat = Field(0.25, description="Width of the mask's edges, in nats.")
    chunk_tokens: Literal["auto"] | PositiveInt = Field(
        "auto", description="Tokens whose logits are held at a time; auto: by shard size and device."
    )
    backend: Backend = Field(
        "auto", description="What runs the losses between the matrix products; auto picks by device and vocabulary."
    )
    gate_objective: GateObjective = Field(
        "minimize",
        description="What the gate does with DAC-KL. minimize, maximize: with the guards' penalty in either direction; "
        "student: makes it agree with a step on the references of the batch, without the penalty; frozen: nothing.",
    )
    guards: bool = Field(True, description="Keep the gate from collapsing: bounds and a penalty on dropped mass.")
    lower_max: OpenUnitInterval = Field(0.1, description="Guard: largest lower quantile.")
    upper_min: OpenUnitInterval = Field(0.9, description="Guard: smallest upper quantile.")
    coverage: Coverage = Field(
        "absolute",
        description="Guard: the dropped teacher mass that is penalized, or its share of all that lies beside the top "
        "class, which sees confident tokens, too.",
    )
    coverage_weight: NonNegativeFloat = Field(50.0, description="Guard: weight of the penalty on dropped teacher mass.")
    coverage_target: UnitInterval = Field(0.05, description="Guard: dropped teacher mass that costs nothing.")
    span_relation: SpanRelation = Field(
        "hadamard",
        description="What the span loss compares. hadamard: products of neighboring distributions (paper); joint: the "
        "probabilities of the phrases as written; log: their logarithms, with a small loss.span such as 0.01.",
    )
    span_eps: PositiveFloat = Field(
        1e-6, description="Smoothing of the root in the span loss, for span_relation hadamard."
    )
    policy: NonNegativeFloat = Field(
        0.0,
        description="Weight of the policy gradient of the reverse KL, from the tokens as written alone; it needs "
        "student text (generation.mode on_policy without SCRG, or teacher_mixed) at temperature 1.",
    )
    policy_reward: Literal["token", "return"] = Field(
        "token",
        description="What rewards a token. token: its own log p - log q (on-policy distillation); return: the mean of "
        "those of all later tokens of its row (MiniLLM).",
    )
    policy_clip: OpenUnitInterval = Field(
        0.2,
        description="For generation.mode teacher_mixed and policy_reward return: the policy gradient follows "
        "importance weights no further than 1 -/+ this (PPO).",
    )
    taid: TaidSection = Field(
        default_factory=TaidSection, description="A teacher between the student and the teacher (TAID)."
    )
    adakd: AdakdSection = Field(
        default_factory=AdakdSection, description="Tokens chosen by how hard they are, with temperatures (AdaKD)."
    )

    divergence_teacher_text: TokenLoss | None = Field(
        None,
        description="For generation.mode contrast: the divergence on the teacher's text; null: loss.divergence, as on "
        "the student's.",
    )
    adaptive_skew: bool = Field(
        False,
        description="For generation.mode contrast and skewed divergences: each row has its own skew, from 0.01 for "
        "rows on which the models nearly agree to loss.skew (DistiLLM-2).",
    )
    student_text_weight: Annotated[float, Field(gt=0, lt=2)] = Field(
        1.0,
        description="For generation.mode contrast: weight of the student's text from the middle of the run on, which "
        "is 1 at first; the teacher's is 2 minus that.",
    )

    if not TYPE_CHECKING:  # type checkers and editors see the fields as keywords

        def __init__(self, **settings: Any) -> None:
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise ConfigError(_first_problem(error, settings)) from None

        # pydantic builds a section inside a whole configuration without calling this, as it does with BaseModel's own.
        __init__.__pydantic_base_init__ = True

    @property
    def is_clipped(self) -> bool:
        """Whether a mask is computed at all."""
        return self.dac_kl > 0 and self.divergence == "dac_kl" and self.clip != "off"

    @property
    def is_skewed(self) -> bool:
        """Whether the divergence compares with a mixture of which ``skew`` is one side's share."""
        return self.divergence in SKEWED

    @property
    def uses_teacher(self) -> bool:
        """Whether a term compares student and teacher."""
        return self.dac_kl > 0 or self.span > 0 or self.policy > 0

    @property
    def pairs_neighbors(self) -> bool:
        """Whether the span loss compares pairs of neighboring distributions, rather than whole spans as written."""
        return self.span > 0 and self.span_relation == "hadamard"

    @property
    def compares_written(self) -> bool:
        """Whether the span loss compares the probabilities of whole spans as written."""
        return self.span > 0 and self.span_relation != "hadamard"

    @property
    def reads_labels(self) -> bool:
        """Whether a term needs the teacher's probabilities of the labels."""
        return self.compares_written or self.policy > 0

    @property
    def uses_gate(self) -> bool:
        """Whether the mask's quantiles come from the gate."""
        return self.is_clipped and self.clip == "gate"

    @property
    def looks_ahead(self) -> bool:
        """Whether the gate learns from a virtual step of the student's head on the references."""
        return self.uses_gate and self.gate_objective == "student"

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked like a new one.

        Raises:
            ConfigError: As for ``LossConfig`` itself.
        """
        return type(self)(**(dict(self) | changes))

    @field_validator("clip", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        # YAML reads a bare ``off`` as false.
        return "off" if value is False else value

    @field_validator("remainder", "gate_objective", mode="before")
    @classmethod
    def _respelled(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str) or value not in _RESPELLED:
            return value
        message = f"loss.{info.field_name}={value} is now spelled {_RESPELLED[value]}; the old spelling still works"
        warnings.warn(message, FutureWarning, stacklevel=1)
        return _RESPELLED[value]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for low, high in (("lower", "upper"), ("lower_max", "upper_min")):
            low_value, high_value = getattr(self, low), getattr(self, high)
            require_combination(
                low_value < high_value,
                f"loss.{low}={low_value:g} must be less than loss.{high}={high_value:g}",
                (f"loss.{low}", f"loss.{high}"),
            )
        require_combination(
            self.ab_alpha + self.ab_beta > 0,
            "loss.ab_alpha=0 and loss.ab_beta=0 leave no divergence: one of them must be positive",
            ("loss.ab_alpha", "loss.ab_beta"),
        )
        return self

    @model_validator(mode="after")
    def _policy(self) -> Self:
        require_combination(
            self.policy == 0 or self.temperature == 1,
            f"loss.policy={self.policy:g} with loss.temperature={self.temperature:g}: the policy gradient is about the "
            "distribution that the text was drawn from; set loss.temperature to 1",
            ("loss.policy", "loss.temperature"),
        )
        require_combination(
            self.policy > 0 or self.policy_reward == "token",
            f"loss.policy_reward={self.policy_reward} has no effect with loss.policy=0",
            ("loss.policy", "loss.policy_reward"),
        )
        require_combination(
            self.policy > 0 or self.policy_clip == type(self).model_fields["policy_clip"].default,
            f"loss.policy_clip={self.policy_clip:g} has no effect with loss.policy=0",
            ("loss.policy", "loss.policy_clip"),
        )
        return self

    @model_validator(mode="after")
    def _adaptive(self) -> Self:
        check_taid(self.taid, dac_kl=self.dac_kl, policy=self.policy)
        check_adakd(
            self.adakd, dac_kl=self.dac_kl, span=self.span, policy=self.policy, average=self.average,
            is_clipped=self.is_clipped,
        )  # fmt: skip
        return self


def _first_problem(error: ValidationError, settings: dict[str, Any]) -> str:
    """What is wrong with settings given from Python, in one line."""
    problem = error.errors()[0]
    if not problem["loc"]:
        return str(problem["ctx"]["error"])
    name, *inner = (str(part) for part in problem["loc"])
    section: type[Section] = LossConfig
    where, value = "loss", settings[name]
    nested = section_type(LossConfig.model_fields[name]) if inner else None
    if nested is not None:
        where, section, name, value = f"loss.{name}", nested, inner[0], problem["input"]
    if problem["type"] == "extra_forbidden":
        close = nearest(name, section.model_fields)
        hint = f"did you mean {where}.{close}?" if close else f"keys are {', '.join(section.model_fields)}"
        return f"{where}.{name}: unknown key; {hint}"
    return f"{where}.{name}={value!r}: must be {allowed(section.model_fields[name])}"
