"""What is planned: a run's settings on some machines, with the models' shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from megadistill.config.lora import LoraSection
from megadistill.config.schema import RunConfig
from megadistill.config.section import Section
from megadistill.decoding.batch_plan import DecodeBatchPlan, plan_decode_batches
from megadistill.engines.ds_config import needs_wide_gradients, student_config
from megadistill.errors import ConfigError
from megadistill.generation.sources import source_class
from megadistill.models.families import head_counts
from megadistill.models.loading import DTYPES, load_model_config
from megadistill.models.positions import check_positions
from megadistill.parallel.topology import check_hpz_size, gradient_accumulation_steps, resolve_tp_size
from megadistill.planning.shape import ModelOutline, ModelShape

S = TypeVar("S", bound=Section)
# DeepSpeed's own value (deepspeed/runtime/zero/config.py) of what the project does not set.
_ZERO_DEFAULTS: Mapping[str, Any] = {"sub_group_size": 1_000_000_000}
STUDENT_TEXT = frozenset({"on_policy", "off_policy", "mixed", "skd", "teacher_mixed", "contrast"})


@dataclass(frozen=True)
class Models:
    """Both models of a run, whole.

    Attributes:
        student: The model that is trained.
        teacher: The teacher; None for plain SFT.
        on_rank0: Tensor-parallel size -> both models on rank 0, once they have been asked for.
    """

    student: ModelOutline
    teacher: ModelOutline | None
    on_rank0: dict[int, tuple[ModelShape, ModelShape | None]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, config: RunConfig) -> Models:
        """Reads both configurations.

        Raises:
            ConfigError: There is none, or the family is not supported.
        """

        def outline(path: str, key: str, lora: LoraSection | None = None) -> ModelOutline:
            model_config = load_model_config(path, key)
            check_positions(model_config, config.data.max_tokens, "data.max_tokens", f"{key} ({path})")
            return ModelOutline.of(model_config, key, lora)

        teacher = config.model.teacher.path if config.needs_teacher else None
        return cls(
            outline(config.model.student.path, "model.student.path", config.model.student.lora),
            None if teacher is None else outline(teacher, "model.teacher.path"),
        )

    @property
    def vocab_size(self) -> int:
        """V: the rows that both models have; tokenizers, which may have fewer tokens, are not read."""
        return min(self.student.rows, self.teacher.rows if self.teacher is not None else self.student.rows)

    def shapes(self, tp_size: int) -> tuple[ModelShape, ModelShape | None]:
        """Student and teacher on rank 0 of ``tp_size``."""
        if tp_size not in self.on_rank0:
            size = self.vocab_size
            teacher = None if self.teacher is None else self.teacher.on_rank0(tp_size, size)
            self.on_rank0[tp_size] = self.student.on_rank0(tp_size, size), teacher
        return self.on_rank0[tp_size]

    def head_counts(self) -> dict[str, int]:
        """Counts of heads that the tensor-parallel size must divide."""
        counts = head_counts(self.student.config, "model.student.path")
        return counts if self.teacher is None else counts | head_counts(self.teacher.config, "model.teacher.path")


@dataclass(frozen=True)
class Case:
    """A run on some machines.

    Attributes:
        config: Its settings; ``parallel.tp_size`` is a number.
        models: Its models.
        nodes: Machines.
        gpus_per_node: GPUs of a machine, each with one process.
        prompt_tokens: Length of every prompt.
        response_tokens: Length of every response and reference.
        gpu_memory: Bytes of a GPU.
        like_gpu: What the code chooses on a GPU; otherwise what it chooses on a CPU.
    """

    config: RunConfig
    models: Models
    nodes: int
    gpus_per_node: int
    prompt_tokens: int
    response_tokens: int
    gpu_memory: int
    like_gpu: bool = True

    @classmethod
    def of(
        cls,
        config: RunConfig,
        models: Models,
        *,
        nodes: int,
        gpus_per_node: int,
        gpu_memory: int,
        prompt_tokens: int | None = None,
        response_tokens: int | None = None,
        like_gpu: bool = True,
        is_checked: bool = True,
    ) -> Case:
        """Checks settings as a run does, and resolves what they leave open.

        Args:
            config: The settings.
            models: From ``Models.of``.
            nodes: Machines.
            gpus_per_node: GPUs of a machine.
            gpu_memory: Bytes of a GPU.
            prompt_tokens: Length of every prompt; None: the longest that is allowed.
            response_tokens: Length of every response and reference; None: the longest that is allowed.
            like_gpu: Plan what the code chooses on a GPU.
            is_checked: Whether the layout must be a possible one; otherwise it only stands for what others share.

        Raises:
            ConfigError: Settings do not fit together.
            TopologyError: The processes cannot be divided like that.
        """
        source_class(config).check(config)
        asked = config.parallel.tp_size if is_checked else "auto"
        tp_size = resolve_tp_size(asked, nodes * gpus_per_node, models.head_counts())
        data = config.data
        _check_lengths(config, prompt_tokens, response_tokens)
        prompt = data.max_prompt_tokens if prompt_tokens is None else prompt_tokens
        limit = config.generation.max_new_tokens if config.generation.mode in STUDENT_TEXT else data.max_tokens
        response = min(limit, data.max_tokens - prompt) if response_tokens is None else response_tokens
        case = cls(
            changed(config, {"parallel.tp_size": tp_size}), models, nodes, gpus_per_node, prompt, max(1, response),
            gpu_memory, like_gpu,
        )  # fmt: skip
        if is_checked:
            case.check()
        return case

    def check(self) -> None:
        """Raises TopologyError or ConfigError where examples cannot be shared or one does not fit its cache."""
        train = self.config.train
        rows = train.micro_batch_size if train.micro_batch_tokens is None else 1
        gradient_accumulation_steps(train.global_batch_size, rows, self.dp_size)
        check_hpz_size(self.hpz_size, self.dp_size)
        self.decode_plan  # noqa: B018  raises

    def with_settings(self, settings: Mapping[str, Any], nodes: int | None = None) -> Case:
        """The same with other settings (dotted keys) or another number of machines; not checked."""
        return replace(self, config=changed(self.config, settings), nodes=self.nodes if nodes is None else nodes)

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * self.gpus_per_node

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size."""
        assert isinstance(self.config.parallel.tp_size, int)
        return self.config.parallel.tp_size

    @property
    def dp_size(self) -> int:
        """Data-parallel size."""
        return self.world_size // self.tp_size

    @property
    def zero_stage(self) -> int:
        """ZeRO stage."""
        return self.config.parallel.zero_stage

    @property
    def hpz_size(self) -> int:
        """Data-parallel ranks that together keep the weights once more; 1: none do."""
        return self.config.parallel.zero.hpz_partition_size if self.zero_stage == 3 else 1

    @property
    def examples(self) -> int:
        """Examples of a rank in a step."""
        return self.config.train.global_batch_size // self.dp_size

    @property
    def rows(self) -> int:
        """Examples of a pass of training (training/passes.py), all of them being as long as can be."""
        budget = self.config.train.micro_batch_tokens
        if budget is None:
            return self.config.train.micro_batch_size
        return min(self.examples, max(1, budget // (self.columns * self.sequences_of_example)))

    @property
    def passes(self) -> int:
        """Forward and backward passes of a rank in a step."""
        return -(-self.examples // self.rows)

    @property
    def writes(self) -> bool:
        """Whether the planned step's text is the student's, written in it."""
        return self.models.teacher is not None and self.config.generation.mode in STUDENT_TEXT

    @property
    def both_write(self) -> bool:
        """Whether the teacher writes the text of a step beside the student (generation/sources/teacher_mixed.py)."""
        return self.writes and self.config.generation.mode == "teacher_mixed"

    @property
    def compared(self) -> ModelShape | None:
        """The teacher where a loss compares with it; elsewhere it only writes or corrects."""
        return self.teacher if self.config.loss.uses_teacher else None

    @property
    def rounds(self) -> int:
        """Rounds of correction; mode skd, which goes on until nothing is left, is planned with one."""
        generation = self.config.generation
        if not self.writes or self.both_write:
            return 0
        return 1 if generation.mode == "skd" else generation.scrg.rounds * generation.scrg.enabled

    @property
    def looks_ahead(self) -> bool:
        """Whether the gate learns from a virtual step of the student's head."""
        return self.models.teacher is not None and self.config.loss.looks_ahead

    @property
    def columns(self) -> int:
        """Tokens of a prompt and a response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def sequences_of_example(self) -> int:
        """A reference, and a response that is not the reference."""
        has_both = self.models.teacher is not None and self.config.generation.mode != "dataset"
        return 2 if has_both and self.config.loss.sft_text == "reference" else 1

    @property
    def references(self) -> int:
        """Examples of a rank in a step that have a reference; those of ``data.prompts_path`` have none."""
        return self.examples - int(self.examples * self.config.data.prompts_ratio)

    @property
    def trained_sequences(self) -> int:
        """Sequences of a rank in a step that the student is trained on."""
        if self.models.teacher is not None and self.config.loss.sft_text == "text":
            return self.examples
        return self.references + (self.examples if self.sequences_of_example == 2 else 0)

    @property
    def sequences(self) -> int:
        """Sequences of a pass of training."""
        return self.rows * self.sequences_of_example

    @property
    def student_bytes(self) -> int:
        """Bytes of a number of the student."""
        return DTYPES[self.config.model.student.dtype].itemsize

    @property
    def teacher_bytes(self) -> int:
        """Bytes of a number of the teacher."""
        return DTYPES[self.config.model.teacher.dtype].itemsize

    @property
    def student(self) -> ModelShape:
        """The student on rank 0."""
        return self.models.shapes(self.tp_size)[0]

    @property
    def teacher(self) -> ModelShape | None:
        """The teacher on rank 0."""
        return self.models.shapes(self.tp_size)[1]

    @cached_property
    def deepspeed(self) -> Mapping[str, Any]:
        """The configuration of the student's engine, as the engine gets it."""
        config = self.config
        return student_config(
            config.optim,
            config.train,
            zero_stage=self.zero_stage,
            tp_size=self.tp_size,
            dp_size=self.dp_size,
            dtype=config.model.student.dtype,
            family=self.models.student.family,
            zero=config.parallel.zero,
            device_type="cuda" if self.like_gpu else "cpu",
            num_elements=self.models.shapes(1)[0].num_trained,
            passed=config.deepspeed,
        )

    def zero(self, key: str) -> Any:
        """A setting of DeepSpeed's ``zero_optimization``."""
        return self.deepspeed["zero_optimization"].get(key, _ZERO_DEFAULTS.get(key))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a number of the accumulated gradient."""
        is_wide = needs_wide_gradients(self.config.model.student.dtype, self.config.optim)
        return 4 if is_wide else self.student_bytes

    @cached_property
    def decode_plan(self) -> DecodeBatchPlan:
        """How many examples are written at a time, as ``training/setup.py`` plans it."""
        data, generation = self.config.data, self.config.generation
        longest = data.max_prompt_tokens + min(generation.max_new_tokens, data.max_tokens - 1)
        of_teacher = self.teacher.kv_bytes(self.teacher_bytes) if self.writes and self.teacher else 0
        is_beside = source_class(self.config).cache_needs().is_written_by_both
        return plan_decode_batches(
            examples_per_rank=self.examples,
            columns=longest,
            example_columns=min(longest, data.max_tokens),
            decoder_bytes=(self.student.kv_bytes(self.student_bytes) if self.writes else 0) + of_teacher * is_beside,
            prefiller_bytes=of_teacher * (not is_beside),
            max_cache_bytes=generation.max_cache_bytes,
        )

    @property
    def records_steps(self) -> bool:
        """Whether decoding steps are recorded as CUDA graphs (decoding/static_step.py: ``stepping_on``)."""
        return self.like_gpu and self.config.generation.cuda_graphs and not self.both_write

    @property
    def keeps_teacher_cache(self) -> bool:
        """Whether the teacher's keys and values are kept between its readings."""
        return self.rounds > 0 and self.decode_plan.keeps_teacher_cache


def _check_lengths(config: RunConfig, prompt: int | None, response: int | None) -> None:
    """Refuses lengths that a run's limits do not let occur."""
    data, generation = config.data, config.generation
    if prompt is not None and prompt > data.max_prompt_tokens:
        raise ConfigError(f"prompts of {prompt} tokens are more than data.max_prompt_tokens={data.max_prompt_tokens}")
    if response is None:
        return
    if config.needs_teacher and generation.mode in STUDENT_TEXT and response > generation.max_new_tokens:
        raise ConfigError(
            f"responses of {response} tokens are more than generation.max_new_tokens={generation.max_new_tokens}"
        )
    longest = data.max_prompt_tokens if prompt is None else prompt
    if longest + response > data.max_tokens:
        raise ConfigError(
            f"{longest} prompt and {response} response tokens are more than data.max_tokens={data.max_tokens} together"
        )


def changed(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """A configuration with other values under dotted keys; they are not validated."""
    for key, value in settings.items():
        config = _changed(config, key.split("."), value)
    return config


def _changed(section: S, path: Sequence[str], value: Any) -> S:
    name, *rest = path
    inner = _changed(getattr(section, name), rest, value) if rest else value
    return section.model_copy(update={name: inner})
