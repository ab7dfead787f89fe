"""Section ``train`` of the configuration."""

from typing import Any, Literal

from pydantic import Field, model_validator

from megadistill.config.section import NonEmptyStr, NonNegativeInt, PositiveFloat, PositiveInt, Section

_DEFAULT_STEPS = 1000


class TrainSection(Section):
    """Section ``train``."""

    max_steps: PositiveInt | None = Field(
        None, description="Optimizer updates; null: train.epochs decides, and 1000 where that is null too."
    )
    epochs: PositiveFloat | None = Field(
        None, description="Passes over data.train_path, instead of train.max_steps; a part of one is allowed: 0.5."
    )
    global_batch_size: PositiveInt = Field(16, description="Examples per step, over all processes.")
    micro_batch_size: PositiveInt = Field(
        4,
        description="Examples per forward and backward pass on one data-parallel rank; with train.micro_batch_tokens "
        "only of what a teacher without a decoder plan (sliding windows) reads at once.",
    )
    micro_batch_tokens: PositiveInt | None = Field(
        None,
        description="Tokens per forward and backward pass on one data-parallel rank, padding included, in place of "
        "train.micro_batch_size: as many examples as fit, and at least one.",
    )
    padding_free: bool = Field(
        True,
        description="The sequences of a pass follow one another in one row (losses and gradients are the same); false: "
        "they are padded to the longest, and sorted by length first.",
    )
    save_every: NonNegativeInt = Field(
        0, description="Steps between checkpoints; 0: only at the end, so that a crash loses the whole run."
    )
    eval_every: NonNegativeInt = Field(0, description="Steps between validations on data.valid_path; 0: never.")
    eval_rows: PositiveInt = Field(64, description="Rows of data.valid_path used in a validation.")
    early_stopping: NonNegativeInt = Field(
        0,
        description="End the run after this many validations in a row that were no better than the best one by "
        "checkpoint.keep_best; 0: never.",
    )
    profile_steps: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        strict=False,
        description="First and last step, counted from 1, of a torch trace in RUN/profile; null: none.",
    )
    diagnose_every: NonNegativeInt = Field(
        0,
        description="Steps between measurements of what each loss term contributes to the gradient (gradient_share/*), "
        "for which the losses are computed once more, term by term; 0: never.",
    )
    log_every: PositiveInt = Field(
        1,
        description="Steps between updates of the numbers in the progress bar, which are means over these steps; "
        "metrics.jsonl has every step.",
    )
    samples_every: NonNegativeInt = Field(
        10, description="Steps between entries in samples.jsonl, made in steps with student text; 0: none."
    )
    samples_rows: PositiveInt = Field(4, description="Examples per entry in samples.jsonl.")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="After a step with a non-finite loss or gradient, or student text from non-finite logits: stop the "
        "run, or skip the step. The step changes nothing, and its batch is written to RUN/nonfinite/.",
    )
    max_nonfinite: PositiveInt = Field(
        10, description="With on_nonfinite skip: stop the run after this many consecutive skipped steps."
    )
    stop_grace_s: PositiveInt = Field(
        120,
        description="Seconds to finish a step and save it after the launcher has died; then the process exits.",
    )
    resume: NonEmptyStr = Field(
        "auto",
        description="auto: from the last checkpoint of run.dir, if any; never: a new run; or a checkpoint's path.",
    )
    resume_on_other_data: bool = Field(
        False, description="Resume even where rows, tokenizer, or teacher are not those of the checkpoint."
    )

    @model_validator(mode="before")
    @classmethod
    def _length(cls, settings: Any) -> Any:
        # Written down as a number, so that resolved.yaml repeats the run whatever the default will be.
        if isinstance(settings, dict) and settings.get("max_steps") is None and settings.get("epochs") is None:
            return {**settings, "max_steps": _DEFAULT_STEPS}
        return settings
