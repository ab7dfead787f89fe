"""The configuration tree: one frozen, typed section per part of a run; docs/configuration.md is generated from it."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megadistill.config.checkpoint import CheckpointSection
from megadistill.config.contrast import check_contrast
from megadistill.config.data import DataSection
from megadistill.config.deepspeed import PASSED, owned_key, unknown_key
from megadistill.config.gate import check_gate
from megadistill.config.lora import check_lora
from megadistill.config.loss import LossConfig
from megadistill.config.model import ModelSection
from megadistill.config.optim import OptimSection
from megadistill.config.parallel import ParallelSection
from megadistill.config.policy import check_policy
from megadistill.config.sampling import SamplingOptions
from megadistill.config.section import (
    BelowOne,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    Section,
    TopP,
    UnitInterval,
    require_combination,
)
from megadistill.config.train import TrainSection
from megadistill.files import did_you_mean

TrackerName = Literal["wandb", "trackio", "mlflow"]


class RunSection(Section):
    """Section ``run``."""

    dir: NonEmptyStr = Field(description="Folder of this run: resolved.yaml, metrics, samples, checkpoints.")
    seed: Annotated[int, Field(ge=0, le=2**40)] = Field(
        0, description="Seed of everything random: data order, sampling, gate, random weights."
    )
    prepare: Literal["none", "demo", "smoke"] = Field(
        "none", description="Built-in corpus, tokenizer and models to create on first use; none: nothing."
    )
    trackers: tuple[TrackerName, ...] = Field(
        (), strict=False, description="What the run reports to beside its own files; each needs its extra."
    )
    project: NonEmptyStr = Field("megadistill", description="What trackers group runs by (MLflow: experiment).")


class ScrgSection(Section):
    """Section ``generation.scrg``."""

    enabled: bool = Field(True, description="Correct the student's text before training on it (paper, Eq. 3-4).")
    rounds: PositiveInt = Field(1, description="Corrections per response, each to the right of the one before.")
    error: Literal["kl", "regret", "first"] = Field(
        "kl",
        description="Which disagreement is corrected. kl: that of the largest KL (paper); regret: where the written "
        "token is the least likely one against the teacher's best; first: the first one whose KL is above threshold.",
    )
    threshold: NonNegativeFloat = Field(0.1, description="For error first: KL in nats.")
    competence: BelowOne = Field(
        0.0,
        description="Correct only where the geometric mean of the teacher's probabilities of the text before (since "
        "the last correction) is at least this, where it still follows the text; 0: everywhere.",
    )
    after: Literal["regenerate", "keep", "cut"] = Field(
        "regenerate",
        description="What follows a correction: the student's new text (paper), what it had written, or nothing.",
    )
    teacher_token: Literal["sample", "greedy"] = Field(
        "sample",
        description="The token that replaces an error: a sample of the teacher (paper), or its most likely token. "
        "This and the next two also hold for generation.mode skd, which uses nothing else of this section.",
    )
    teacher_temperature: PositiveFloat = Field(1.0, description="Temperature of the teacher's sample.")
    teacher_top_p: TopP = Field(
        1.0, description="Sample from the teacher's most likely tokens that together have this probability; 1: all."
    )


class SkdSection(Section):
    """Section ``generation.skd``."""

    top_k: PositiveInt = Field(
        25, description="The student's token stays where it is among this many best ones of the teacher."
    )


class OffPolicySection(Section):
    """Section ``generation.off_policy``."""

    initial_phi: UnitInterval = Field(0.0, description="First value of phi: probability of student text at a step.")
    eps: NonNegativeFloat = Field(
        0.1, description="phi rises by 0.1 when the validation loss has risen by more than this, in nats."
    )
    replay_batches: PositiveInt = Field(64, description="Size of the replay buffer, in global batches.")


class GenerationSection(SamplingOptions):
    """Section ``generation``."""

    mode: Literal["on_policy", "off_policy", "mixed", "dataset", "teacher", "skd", "teacher_mixed", "contrast"] = Field(
        "on_policy",
        description="Source of the responses for the token and span losses. on_policy: the student generates them; "
        "off_policy: references first, then more and more student text, new or replayed (DistiLLM); "
        "mixed: student text in a random share of the steps, references in the others; "
        "dataset: the references; teacher: the teacher generates them once, before training (SeqKD); "
        "skd: the student writes, and the teacher replaces every token that it would hardly write (speculative KD); "
        "teacher_mixed: each token is drawn from a mixture of teacher and student (MiniLLM); "
        "contrast: that of on_policy and that of teacher, two rows of every prompt (DistiLLM-2).",
    )
    source: NonEmptyStr | None = Field(
        None, description="MODULE:CLASS of a text source of your own, in place of that of generation.mode."
    )
    student_ratio: UnitInterval = Field(0.5, description="For mode mixed: probability of student text.")
    mixed_by: Literal["step", "row"] = Field(
        "step", description="For mode mixed: whether a whole step or each row for itself takes student text."
    )
    skd: SkdSection = Field(default_factory=SkdSection, description="For mode skd.")
    off_policy: OffPolicySection = Field(default_factory=OffPolicySection, description="For mode off_policy.")
    teacher_temperature: NonNegativeFloat = Field(
        0.0, description="For modes teacher and contrast: sampling temperature of the teacher; 0: greedy."
    )
    teacher_cache: NonEmptyStr | None = Field(
        None,
        description="For modes teacher and contrast: file of the teacher's responses, written once; null: "
        "RUN/teacher_text.jsonl.",
    )
    teacher_share: OpenUnitInterval = Field(
        0.2, description="For mode teacher_mixed: alpha, the teacher's share of the mixture."
    )
    max_new_tokens: PositiveInt = Field(
        256, description="Longest generated response, in tokens; data.max_tokens limits prompt and response together."
    )
    sampling_temperature: NonNegativeFloat = Field(1.0, description="Sampling temperature of the student; 0: greedy.")
    max_cache_bytes: PositiveInt = Field(
        2**33,
        description="Memory per process for keys and values. It limits how many responses are generated at a time.",
    )
    cpu_products: Literal["auto", "packed", "plain"] = Field(
        "auto",
        description="float32 on CPUs: products by oneDNN (packed), torch (plain), or the faster one (measured once).",
    )
    cuda_graphs: bool = Field(
        True,
        description="On GPUs: record a decoding step as a CUDA graph, one launch for each token (not in mode "
        "teacher_mixed).",
    )
    scrg: ScrgSection = Field(default_factory=ScrgSection, description="Sequence correction and re-generation (SCRG).")

    @property
    def share_of_teacher(self) -> float:
        """The teacher's share in the distribution that the student's text is drawn from."""
        return self.teacher_share if self.mode == "teacher_mixed" else 0.0


class EvalSection(SamplingOptions):
    """Section ``eval``."""

    path: NonEmptyStr | None = Field(None, description="Evaluation rows, in the formats of data.train_path.")
    seeds: tuple[NonNegativeInt, ...] = Field(
        (10, 20, 30, 40, 50),
        strict=False,
        description="One sampled evaluation per seed; mean and standard deviation are reported.",
    )
    max_new_tokens: PositiveInt = Field(256, description="Longest answer, in tokens.")
    temperature: NonNegativeFloat = Field(1.0, description="Sampling temperature of the sampled evaluations.")
    greedy: bool = Field(True, description="Also evaluate greedy answers.")
    batch_size: PositiveInt = Field(16, description="Answers generated at a time on one data-parallel rank.")
    max_rows: PositiveInt | None = Field(None, description="Evaluate only the first rows; null: all rows.")


class RunConfig(Section):
    """Everything that defines a run. Build it with ``load_config``."""

    run: RunSection = Field(description="Folder and seed of the run.")
    model: ModelSection = Field(description="Teacher, student and tokenizer.")
    parallel: ParallelSection = Field(default_factory=ParallelSection, description="How models are partitioned.")
    data: DataSection = Field(default_factory=DataSection, description="Rows, limits and spans.")
    generation: GenerationSection = Field(
        default_factory=GenerationSection, description="Responses to train on: their source, sampling and correction."
    )
    loss: LossConfig = Field(default_factory=LossConfig, description="The three terms and the gate.")
    optim: OptimSection = Field(default_factory=OptimSection, description="AdamW and its schedule.")
    train: TrainSection = Field(default_factory=TrainSection, description="Steps, batch sizes, intervals.")
    eval: EvalSection = Field(default_factory=EvalSection, description="The evaluation protocol.")
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection, description="What is kept on disk.")
    deepspeed: dict[str, Any] = Field(
        {},
        description="Passed through to DeepSpeed's configuration of both engines, merged over the generated one: "
        "zero_optimization (what parallel.zero does not have), comms_logger, flops_profiler ...",
    )

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss compares with the teacher, or is on text that it may write or correct; False for plain SFT."""
        return self.loss.uses_teacher or (self.loss.sft_text == "text" and self.generation.mode != "dataset")

    def with_template(self, name: str, **variables: Any) -> "RunConfig":
        """The same with another ``data.template``, and perhaps other ``data.chat_template*``."""
        return self.model_copy(update={"data": self.data.model_copy(update={"template": name, **variables})})

    @model_validator(mode="after")
    def _deepspeed_keys(self) -> "RunConfig":
        if (owned := owned_key(self.deepspeed)) is not None:
            require_combination(False, f"deepspeed.{owned[0]} is decided by {owned[1]}", ("deepspeed",))
        if (unknown := unknown_key(self.deepspeed)) is not None:
            hint = did_you_mean(unknown, PASSED)
            require_combination(
                False, f"deepspeed.{unknown}: not passed on{hint or '; allowed: ' + ', '.join(PASSED)}", ("deepspeed",)
            )
        return self

    @model_validator(mode="after")
    def _engine_combinations(self) -> "RunConfig":
        parallel = self.parallel
        require_combination(
            self.optim.gradient_dtype == "fp32" or self.model.student.dtype == "bf16",
            "optim.gradient_dtype=bf16 needs model.student.dtype=bf16: gradients have at least the type of the weights",
            ("optim.gradient_dtype", "model.student.dtype"),
        )
        require_combination(
            self.needs_teacher or not parallel.offloads_teacher,
            f"parallel.offload={parallel.offload}: this run has no teacher (loss.dac_kl=0 loss.span=0); use optimizer "
            "or none",
            ("parallel.offload", "loss.dac_kl", "loss.span"),
        )
        return self

    @model_validator(mode="after")
    def _data_combinations(self) -> "RunConfig":
        data = self.data
        require_combination(
            data.max_tokens > data.max_prompt_tokens,
            f"data.max_tokens={data.max_tokens} must be more than data.max_prompt_tokens={data.max_prompt_tokens}: "
            "otherwise no token is left for a response",
            ("data.max_tokens", "data.max_prompt_tokens"),
        )
        require_combination(
            data.prompts_path is not None or data.prompts_ratio == 0,
            f"data.prompts_ratio={data.prompts_ratio:g} needs data.prompts_path",
            ("data.prompts_ratio", "data.prompts_path"),
        )
        require_combination(
            data.prompts_path is None or data.prompts_ratio > 0,
            f"data.prompts_path is set, but data.prompts_ratio={data.prompts_ratio:g}: none of its rows would be used",
            ("data.prompts_ratio", "data.prompts_path"),
        )
        require_combination(
            data.train_on == "last" or self.generation.mode != "off_policy",
            "data.train_on=all: replayed student text (generation.mode=off_policy) does not keep the earlier turns of "
            "its chat",
            ("data.train_on", "generation.mode"),
        )
        return self

    @model_validator(mode="after")
    def _combinations(self) -> "RunConfig":
        train, data, loss = self.train, self.data, self.loss
        require_combination(
            train.micro_batch_tokens is not None or train.global_batch_size % train.micro_batch_size == 0,
            f"train.global_batch_size={train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={train.micro_batch_size}",
            ("train.global_batch_size", "train.micro_batch_size"),
        )
        require_combination(
            loss.sft > 0 or loss.uses_teacher,
            "loss.sft, loss.dac_kl, loss.span and loss.policy are all 0; at least one must be positive",
            ("loss.sft", "loss.dac_kl", "loss.span", "loss.policy"),
        )
        require_combination(
            self.model.teacher.path is not None or not self.needs_teacher,
            f"model.teacher.path is missing, and loss.dac_kl={loss.dac_kl:g} loss.span={loss.span:g} "
            f"loss.sft_text={loss.sft_text} need a teacher; plain SFT is loss.dac_kl=0 loss.span=0 "
            "generation.mode=dataset",
            ("model.teacher.path",),
        )
        require_combination(
            not loss.uses_gate or 0 < loss.lower < loss.upper,
            f"loss.lower={loss.lower:g} loss.upper={loss.upper:g}: the gate starts there, and learns nothing from 0; "
            "loss.clip=fixed takes 0, too",
            ("loss.lower", "loss.upper"),
        )
        require_combination(
            data.valid_path is not None or train.eval_every == 0,
            f"train.eval_every={train.eval_every} needs data.valid_path",
            ("train.eval_every", "data.valid_path"),
        )
        profile = train.profile_steps
        require_combination(
            profile is None or profile[0] <= profile[1],
            f"train.profile_steps={list(profile or ())} must not end before it begins",
            ("train.profile_steps",),
        )
        require_combination(
            bool(self.eval.seeds) or self.eval.greedy,
            "eval.seeds is empty and eval.greedy is false: nothing would be evaluated",
            ("eval.seeds", "eval.greedy"),
        )
        return self

    @model_validator(mode="after")
    def _corrections(self) -> "RunConfig":
        scrg = self.generation.scrg
        require_combination(
            scrg.after == "regenerate" or scrg.rounds == 1,
            f"generation.scrg.after={scrg.after} with rounds={scrg.rounds}: the student writes nothing after a "
            "correction that a second round could look at; set rounds to 1",
            ("generation.scrg.after", "generation.scrg.rounds"),
        )
        require_combination(
            scrg.teacher_token == "sample" or (scrg.teacher_top_p == 1 and scrg.teacher_temperature == 1),
            f"generation.scrg.teacher_token=greedy draws nothing: teacher_top_p={scrg.teacher_top_p:g} and "
            f"teacher_temperature={scrg.teacher_temperature:g} need teacher_token=sample",
            ("generation.scrg.teacher_token", "generation.scrg.teacher_top_p", "generation.scrg.teacher_temperature"),
        )
        return self

    @model_validator(mode="after")
    def _gate_and_policy(self) -> "RunConfig":
        check_policy(self)
        check_contrast(self)
        check_gate(self)
        check_lora(self)
        return self

    @model_validator(mode="after")
    def _length(self) -> "RunConfig":
        train, keep_best = self.train, self.checkpoint.keep_best
        require_combination(
            train.max_steps is None or train.epochs is None,
            f"train.epochs={train.epochs or 0:g} and train.max_steps={train.max_steps} are both set, and only one can "
            "decide the length of the run; set the other one to null",
            ("train.epochs", "train.max_steps"),
        )
        require_combination(
            keep_best is None or train.eval_every > 0,
            f"checkpoint.keep_best={keep_best} needs validations: set train.eval_every",
            ("checkpoint.keep_best", "train.eval_every"),
        )
        require_combination(
            train.early_stopping == 0 or keep_best is not None,
            f"train.early_stopping={train.early_stopping} needs checkpoint.keep_best: the metric that must improve",
            ("train.early_stopping", "checkpoint.keep_best"),
        )
        return self
