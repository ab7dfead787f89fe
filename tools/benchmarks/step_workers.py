"""The contenders of the step benchmark: what runs in the process of each, and the files that all read."""

from __future__ import annotations

import json
import os
import random
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.measure import clock

WARM_UP = 2  # steps that fill caches and compile
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SPECIAL = ("<pad>", "<eos>", "<unk>")
# Hidden size, width of the MLP, layers, heads and key-value heads of student and teacher. At V = 8192 the small ones
# have 5M and 21M parameters; the medium and large ones have the shapes of Qwen2.5's 0.5B, 1.5B and 7B.
_HALF, _ONE_AND_HALF, _SEVEN = (896, 4864, 24, 14, 2), (1536, 8960, 28, 12, 2), (3584, 18944, 28, 28, 4)
MODELS = {
    "tiny": ((32, 64, 1, 2, 2), (48, 96, 1, 2, 2)),
    "small": ((192, 512, 8, 6, 6), (384, 1024, 10, 12, 12)),
    "medium": (_HALF, _ONE_AND_HALF),
    "large": (_ONE_AND_HALF, _SEVEN),
}


@dataclass(frozen=True)
class Sizes:
    """One problem size."""

    vocab: int
    rows: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    models: str = "small"
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def steps(self) -> int:
        return self.rounds + WARM_UP


@dataclass(frozen=True)
class Contender:
    """A trainer.

    ``settings``: of ours, over those that all of ours share; ``student_dtype`` bf16: ours also keeps float32 weights,
    TRL does not.
    """

    name: str
    teacher_dtype: str = "fp32"
    student_dtype: str = "fp32"
    is_trl: bool = False
    has_autocast: bool = False
    has_references: bool = False
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step of a worker: its seconds (``measure.clock``), those of its phases, and other numbers of it."""

    seconds: float
    phases: dict[str, float]
    facts: dict[str, float]


@dataclass(frozen=True)
class Failure:
    """Why a worker has ended: in a line, and in full."""

    reason: str
    details: str = ""


class Turns:
    """The worker's side: ``wait`` for the parent, then ``done`` with the step."""

    def __init__(self, pipe: Any, now: Callable[[], float]) -> None:
        self._pipe, self._begin, self.now = pipe, 0.0, now

    def wait(self) -> bool:
        """Whether another step is wanted."""
        is_wanted = bool(self._pipe.recv())
        self._begin = self.now()
        return is_wanted

    def seconds(self) -> float:
        return self.now() - self._begin

    def done(self, step: Step) -> None:
        self._pipe.send(step)


def work(contender: Contender, sizes: Sizes, folder: Path, pipe: Any) -> None:
    """A contender's process from beginning to end."""
    torch.set_num_threads(1)
    # What libraries print does not belong into the table.
    with (folder / f"{os.getpid()}.log").open("w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        (_run_trl if contender.is_trl else _run_ours)(
            contender, sizes, folder, Turns(pipe, clock(torch.device(sizes.device)))
        )
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        pipe.send(Failure(f"{type(error).__name__}: {reason[0]}", traceback.format_exc()))


def _run_trl(contender: Contender, sizes: Sizes, folder: Path, turns: Turns) -> None:
    """TRL owns the loop; callbacks wait for the parent between its steps."""
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import trl.trainer.distillation_trainer as trainer_module
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    def load(role: str, dtype: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / role, dtype=_DTYPES[dtype])

    student, teacher = load("student", contender.student_dtype), load("teacher", contender.teacher_dtype)
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["instruction"] for line in lines]
    phases, is_cpu = Phases(turns.now), sizes.device == "cpu"

    class Wait(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            phases.begin()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            phases.end("optimizer")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = turns.seconds()
            lengths = trainer._metrics["train"]["completions/mean_length"]
            turns.done(Step(seconds, phases.take(), {"length": lengths[-1]} if lengths else {}))
            if not turns.wait():
                control.should_training_stop = True

    arguments = DistillationConfig(
        output_dir=str(folder / f"trl_{os.getpid()}"), per_device_train_batch_size=sizes.rows,
        max_steps=sizes.steps, learning_rate=1e-5, max_completion_length=sizes.new_tokens, beta=0.0, temperature=1.0,
        generation_kwargs={"eos_token_id": None},
        optim="adamw_torch_fused", gradient_checkpointing=False, bf16=contender.has_autocast, use_cpu=is_cpu,
        dataloader_pin_memory=not is_cpu,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left"),
        callbacks=[Wait()],
    )
    student.generate = phases.of("rollout", student.generate)
    trainer.accelerator.backward = phases.of("backward", trainer.accelerator.backward)
    student.model.register_forward_pre_hook(lambda *_: phases.begin() if torch.is_grad_enabled() else None)
    student.model.register_forward_hook(lambda *_: phases.end("forward") if torch.is_grad_enabled() else None)
    teacher.model.register_forward_pre_hook(lambda *_: phases.begin())
    teacher.model.register_forward_hook(lambda *_: phases.end("teacher"))
    if hasattr(trainer_module, "_chunked_divergence_loss"):  # its own; without it the time is in the rest
        trainer_module._chunked_divergence_loss = phases.of("loss", trainer_module._chunked_divergence_loss)
    trainer.train()


class Phases:
    """Seconds by name."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._begin, self._now = 0.0, now

    def begin(self) -> None:
        self._begin = self._now()

    def end(self, name: str) -> None:
        self._seconds[name] += self._now() - self._begin

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            self.begin()
            result = function(*arguments, **options)
            self.end(name)
            return result

        return timed

    def take(self) -> dict[str, float]:
        """All seconds since the last call."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


def _run_ours(contender: Contender, sizes: Sizes, folder: Path, turns: Turns) -> None:
    """What ``megadistill train`` does on one process, without its checkpoints and files."""
    from megadistill.config.schema import RunConfig
    from megadistill.launch.world import distributed
    from megadistill.observability.timers import Timers
    from megadistill.parallel.context import ParallelContext
    from megadistill.training.data import load_training_data, make_sampler
    from megadistill.training.length import RunLength
    from megadistill.training.setup import build_components, check_models, run_tokenizer
    from megadistill.training.step import distillation_step

    # The same clock for the phases: on CPUs other programs share the cores.
    Timers._now = lambda self: turns.now()  # type: ignore[method-assign]
    config = RunConfig.model_validate(_settings(contender, sizes, folder))
    tp_size = check_models(config, 1)
    tokenizer, vocab_size = run_tokenizer(config)
    data = load_training_data(config, tokenizer, vocab_size)
    sampler = make_sampler(config, data)
    with distributed(config.parallel.timeout_s) as device:
        context = ParallelContext.build(tp_size, config.parallel.timeout_s, device)
        components = build_components(config, context, tokenizer, vocab_size, data, RunLength.of(config, data))
        number = 0
        while turns.wait():
            result = distillation_step(number, data.batch(sampler, number), components)
            seconds = turns.seconds()
            metrics = result.metrics
            phases = {name[5:].removesuffix("_s"): metrics[name] for name in metrics if name.startswith("time/")}
            facts = {"length": metrics["num_tokens"] / sizes.rows}
            if config.generation.scrg.enabled:
                texts = {
                    "student": [components.decode(sample.rollout_ids or ()) for sample in result.samples],
                    "corrected": [components.decode(sample.response_ids or ()) for sample in result.samples],
                }
                facts |= _scrg_facts(metrics, texts)
            turns.done(Step(seconds, phases, facts))
            number += 1


def _settings(contender: Contender, sizes: Sizes, folder: Path) -> dict[str, dict[str, Any]]:
    """The tree of the run's configuration."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run")},
        "model": {
            "teacher": {"path": str(folder / "teacher"), "dtype": contender.teacher_dtype},
            "student": {"path": str(folder / "student"), "dtype": contender.student_dtype},
            "tokenizer": str(folder / "tokenizer"),
        },
        "parallel": {"zero_stage": 0},
        "data": {
            "train_path": str(folder / ("references.jsonl" if contender.has_references else "prompts.jsonl")),
            "template": "plain",
            "max_prompt_tokens": sizes.prompt_tokens,
            "max_tokens": sizes.prompt_tokens + sizes.new_tokens,
        },
        "generation": {"max_new_tokens": sizes.new_tokens},
        "optim": {"lr": 1e-5, "schedule": "constant", "warmup_steps": 0},
        "train": {
            "max_steps": sizes.steps,
            "global_batch_size": sizes.rows,
            "micro_batch_size": sizes.rows,
            "samples_every": 1,
            "samples_rows": sizes.rows,
        },
    }
    for section, values in contender.settings.items():
        tree[section] = tree.get(section, {}) | values
    return tree


def _scrg_facts(metrics: Mapping[str, float], texts: Mapping[str, list[str]]) -> dict[str, float]:
    facts = {"corrected_fraction": metrics["scrg/corrected_fraction"]}
    if metrics["scrg/corrected_fraction"]:
        facts["error_position"] = metrics["scrg/error_position_mean"]
    for name, written in texts.items():
        words = [text.split() for text in written]
        for length in (1, 2, 3):
            grams = [tuple(text[i : i + length]) for text in words for i in range(len(text) - length + 1)]
            if grams:
                facts[f"distinct_{length}_{name}"] = len(set(grams)) / len(grams)
    return facts


def write_assets(folder: Path, sizes: Sizes) -> None:
    """Tokenizer, rows with and without references, and both models with random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    chooser = random.Random(0)
    words = _words(sizes.vocab - len(_SPECIAL), chooser)
    ids = {word: i for i, word in enumerate([*_SPECIAL, *("▁" + word for word in words)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    names = dict(zip(("pad_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "tokenizer")

    def text(length: int) -> str:
        return " ".join(chooser.choices(words, k=length))

    rows = [(text(sizes.prompt_tokens), text(sizes.new_tokens)) for _ in range(sizes.rows * sizes.steps)]
    prompts = [json.dumps({"instruction": prompt}) for prompt, _ in rows]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    references = [json.dumps({"instruction": prompt, "output": reference}) for prompt, reference in rows]
    (folder / "references.jsonl").write_text("\n".join(references) + "\n", encoding="utf-8")
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        with torch.device(sizes.device):
            model = LlamaForCausalLM(model_config(role, sizes)).to(getattr(torch, sizes.dtype))
        _never_ends(model)
        model.save_pretrained(folder / role)


def model_config(role: str, sizes: Sizes) -> Any:
    """Of "student" or "teacher"."""
    from transformers import LlamaConfig

    hidden, inner, layers, heads, kv_heads = MODELS[sizes.models][role == "teacher"]
    return LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
        max_position_embeddings=max(2048, sizes.prompt_tokens + sizes.new_tokens),
    )  # fmt: skip


def num_parameters(role: str, sizes: Sizes) -> int:
    """Of "student" or "teacher", a tied head counted once."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LlamaForCausalLM(model_config(role, sizes)).parameters())


def _words(count: int, chooser: random.Random) -> list[str]:
    """English words, so that texts have phrases for the chunker to find; where there are too few, numbered ones."""
    from textblob.en import parser

    known = [word for word in parser.lexicon if word.isascii() and word.isalpha() and word.islower()]
    chooser.shuffle(known)
    return (known + [f"word{i}" for i in range(count - len(known))])[:count]


@torch.no_grad()
def _never_ends(model: Any) -> None:
    """Makes special tokens impossible: the first hidden feature is a constant that lowers only their logits."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    embedding = model.get_input_embeddings().weight
    embedding[:, 0] = 0.5
    embedding[: len(_SPECIAL), 0] = -50.0
