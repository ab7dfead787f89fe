"""Adapters of a student: gradients and merged weights on every layout against peft in one process, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.engines import (
    V,
    fill_adapters,
    make_student,
    masters,
    on_grid,
    random_adapters,
    train_step,
    write_config,
)
from tests.support.preload import preload
from tests.support.runs import FAMILY_CONFIGS
from tests.support.spawn import run_ranks

LORA = {"r": 3, "alpha": 5.0}
PASSES = 2


def _frozen(student: Any) -> list[torch.Tensor]:
    """What this rank keeps of the base."""
    frozen = [parameter for parameter in student.module.parameters() if not parameter.requires_grad]
    return [getattr(parameter, "ds_tensor", parameter).detach().clone() for parameter in frozen]


def _on_layout(rank: int, paths: list[Path], tp_size: int, stages: list[int], options: dict[str, Any]) -> list[Any]:
    """Of each family and stage: updates of this rank's runs, and how far what each layer's weight is in writing."""
    from megadistill.models.lora import adapted_layers

    context, results = on_grid(rank, tp_size), []
    for path in paths:
        for stage in stages:
            student = make_student(
                path, context, dtype="fp32", micro_batches=PASSES, zero_stage=stage, lora=LORA, **options
            )
            fill_adapters(student)
            names = {name for name, parameter in student.module.named_parameters() if parameter.requires_grad}
            assert names == set(student.loaded.lora.names) and set(masters(student)) <= names
            layers = list(adapted_layers([student.module]))
            bases = {name for name in student.loaded.shapes if ".base_layer.weight" in name}
            assert len(bases) == len(layers) == len(names) // 2
            before = masters(student)
            with student.decoder():
                written = [layer.base_weight.detach().clone() for layer in layers]
            is_merged = student._plan is not None  # else it writes by its own forward pass, which adds the adapters
            kept = _frozen(student)
            train_step(student, PASSES)
            after = masters(student)
            assert all(map(torch.equal, kept, _frozen(student))), "the base has changed"
            updates = {name: (start, after[name][1] - run) for name, (start, run) in before.items()}
            specs = {name: student.shard_specs[name] for name in (*names, *bases)}
            results.append(
                (updates, specs, dict(zip(sorted_layers(student), written, strict=True)), is_merged, student.grad_norm)
            )
            student.engine.destroy()
    return results


def sorted_layers(student: Any) -> list[str]:
    """Names of the layers with adapters, in the model's order."""
    from megadistill.models.lora import LoraLinear

    return [name for name, module in student.module.named_modules() if isinstance(module, LoraLinear)]


def _oracle(path: Path, dp_size: int) -> tuple[dict[str, torch.Tensor], dict[str, Any], float]:
    """By peft in float64: parameter -> update, layer -> (weight, merged weight), norm of the gradient."""
    from peft import LoraConfig, inject_adapter_in_model

    from megadistill.models.loading import load_model, whole_model

    loaded = load_model(str(path), dtype="fp32", vocab_size=V, seed=0, attention="sdpa", where="student")
    whole_model(loaded, torch.device("cpu"))
    model: Any = loaded.model.double()
    family = loaded.family
    targets = [*family.column_parallel, *family.row_parallel]
    config = LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=targets, lora_dropout=0.0)  # type: ignore[arg-type]
    inject_adapter_in_model(config, model)
    ours = {name.replace(".default.", "."): p for name, p in model.named_parameters() if ".lora_" in name}
    made = random_adapters({name: tuple(p.shape) for name, p in ours.items()}, list(ours))
    for name, parameter in ours.items():
        parameter.data = made[name].double()
    for dp_rank in range(dp_size):
        tokens = torch.randint(0, V, (PASSES, 9), generator=torch.Generator().manual_seed(dp_rank))
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        logits = F.linear(hidden, model.get_output_embeddings().weight)
        target = 4 * F.one_hot(tokens.roll(-1, 1), V)
        ((logits - target).square().sum() / (V * PASSES * dp_size)).backward()
    gradients = {name: p.grad for name, p in ours.items()}
    merged = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.base_layer.weight
            merged[name] = (weight, weight + module.get_delta_weight("default"))
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return {name: -g / (g.abs() + 1) for name, g in gradients.items()}, merged, float(norm)


@pytest.mark.parametrize(
    ("tp_size", "dp_size", "families", "stages"),
    [
        (1, 2, ["llama", "qwen3"], [0, 1, 2, 3]),
        (2, 1, list(FAMILY_CONFIGS), [3]),
        (2, 2, ["qwen2", "gpt2"], [0, 1, 2, 3]),
        (4, 1, ["llama", "gpt_neox", "opt"], [3]),
    ],
)
def test_updates_and_merged_weights(
    tmp_path: Path, tp_size: int, dp_size: int, families: list[str], stages: list[int]
) -> None:
    preload()
    paths = [write_config(tmp_path / family, family) for family in families]
    large = {"gradient_checkpointing": True} if tp_size == dp_size == 2 else {}
    ranks = run_ranks(_on_layout, tp_size * dp_size, paths, tp_size, stages, large)
    for index, path in enumerate(path for path in paths for _ in stages):
        updates, merged, norm = _oracle(path, dp_size)
        for rank, results in enumerate(ranks):
            found, specs, written, is_merged, grad_norm = results[index]
            tp_rank = rank % tp_size
            assert abs(grad_norm - norm) < 1e-4 * norm
            for name, (start, run) in found.items():
                expected = specs[name].shard(updates[name], tp_rank).reshape(-1)[start : start + len(run)]
                assert torch.allclose(run.double(), expected, atol=2e-5), (path, name)
            for name, weight in written.items():
                expected = specs[f"{name}.base_layer.weight"].shard(merged[name][is_merged], tp_rank)
                assert torch.allclose(weight.double(), expected, atol=1e-6), (path, name)
        held = {(rank % tp_size, name) for rank, results in enumerate(ranks) for name in results[index][0]}
        assert {name for _, name in held} == set(updates)
