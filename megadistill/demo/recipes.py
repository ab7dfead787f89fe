"""What ``run.prepare`` makes: corpus sizes, tokenizer, model configurations, settings of the fine-tuning runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelRecipe:
    """A model of a recipe.

    Attributes:
        config: Its transformers configuration.
        sft: Settings of its fine-tuning run, training file included; None: random weights.
    """

    config: dict[str, Any]
    sft: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything below ``runs/assets/NAME_SEED``.

    Attributes:
        sizes: The arguments of CorpusSizes, without importing it: a rank that only looks whether everything exists
            starts sooner.
        vocab_size: Largest size of the tokenizer.
        models: Name of a model -> its recipe.
        common: Settings of all fine-tuning runs.
    """

    sizes: dict[str, int]
    vocab_size: int
    models: dict[str, ModelRecipe]
    common: tuple[str, ...] = field(default=())


def _llama(hidden: int, layers: int, heads: int, intermediate: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
    }


_SFT = (
    "parallel.zero_stage=0",
    "data.template=plain",
    "data.max_prompt_tokens=64",
    "data.max_tokens=104",
    "generation.mode=dataset",
    "loss.dac_kl=0",
    "loss.span=0",
    "optim.weight_decay=0.0",
    "train.samples_every=0",
    "train.log_every=20",
    "checkpoint.keep_last=1",
)

RECIPES: dict[str, Recipe] = {
    # Plumbing: seconds, random models, nothing is learned.
    "smoke": Recipe(
        sizes={"teacher": 200, "references": 48, "prompts": 120, "valid": 24, "test": 24},
        vocab_size=400,
        models={
            "teacher": ModelRecipe(_llama(64, 2, 4, 128, tied=False)),
            "student": ModelRecipe(_llama(32, 2, 4, 64, tied=True)),
        },
    ),
    # The setting was fixed on the validation split (docs/log.md); test rows are touched by the final evaluation alone.
    "demo": Recipe(
        sizes={"teacher": 8000, "references": 128, "prompts": 6000, "valid": 128, "test": 160},
        vocab_size=896,
        common=_SFT,
        models={
            "teacher": ModelRecipe(
                {**_llama(160, 3, 4, 448, tied=False), "initializer_range": 0.05},
                sft=(
                    "data.train_path={data}/teacher_train.jsonl",
                    "optim.lr=4e-3",
                    "train.max_steps=320",
                    "train.global_batch_size=32",
                    "train.micro_batch_size=32",
                ),
            ),
            "student": ModelRecipe(
                _llama(128, 2, 4, 256, tied=True),
                sft=(
                    "data.train_path={data}/train.jsonl",
                    "optim.lr=3e-3",
                    "train.max_steps=200",
                    "train.global_batch_size=16",
                    "train.micro_batch_size=16",
                ),
            ),
        },
    ),
}
