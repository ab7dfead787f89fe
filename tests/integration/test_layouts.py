"""Every layout against one process: weights after an update, tokens and losses of a run, for every family."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.runs import FAMILY_CONFIGS, LARGE_MODEL, losses, run_layout, samples, settings, weights

LAYOUTS = [(2, 1), (1, 2), (2, 2), (4, 1)]
ON_TWO = ("llama", "gpt2", "gemma2")  # on two processes; four run every family
RELEASING = [(1, 2), (2, 2)]  # ZeRO-3 as with a large model; in the others it releases nothing during a step
STEPS = 20
# Which token has the largest KL is a discrete choice: layouts agree on KL to 1e-6 of its value, so a run in which two
# positions of one row come closer than that may go either way. In this seed's run they do not.
SEED = "run.seed=1"
# Two examples fit or not, so data-parallel ranks need unlike numbers of passes.
BUDGET = "train.micro_batch_tokens=150"


def _runs(assets: Path, out: Path, *more: str, families: Iterable[str] = FAMILY_CONFIGS) -> list[tuple[str, list[str]]]:
    """One update of each family, and twenty steps of one."""
    one_step = [(str(out / family), settings(assets, family, "train.max_steps=1", *more)) for family in families]
    return [*one_step, (str(out / "long"), settings(assets, "llama", f"train.max_steps={STEPS}", SEED, *more))]


@pytest.fixture(scope="module")
def reference(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, ZeRO-3, and in "wide" another split of the same global batch, with padding."""
    out = tmp_path_factory.mktemp("one_process")
    wide = settings(assets, "llama", f"train.max_steps={STEPS}", SEED, "train.micro_batch_size=4",
                    "train.padding_free=false")  # fmt: skip
    run_layout(1, [*_runs(assets, out), (str(out / "wide"), wide)])
    return out


def _assert_same_weights(found: Path, expected: Path, step: int = 1) -> None:
    ours, theirs = weights(found, step), weights(expected, step)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        assert (ours[name] - tensor).abs().max() <= 1e-5, name


def _assert_same_run(found: Path, expected: Path) -> None:
    assert len(samples(expected)) == 4 * STEPS
    assert samples(found) == samples(expected)
    for key in ("loss", "loss/sft", "loss/dac_kl", "loss/span", "grad_norm", "kept_mass"):
        assert losses(found, key) == pytest.approx(losses(expected, key), rel=1e-4), key


@pytest.mark.parametrize(("tp_size", "dp_size"), LAYOUTS)
def test_layout_equals_one_process(assets: Path, reference: Path, tmp_path: Path, tp_size: int, dp_size: int) -> None:
    regime = LARGE_MODEL if (tp_size, dp_size) in RELEASING else ()
    families = FAMILY_CONFIGS if tp_size * dp_size > 2 else ON_TWO
    more = (f"parallel.tp_size={tp_size}", BUDGET, *regime)
    run_layout(tp_size * dp_size, _runs(assets, tmp_path, *more, families=families))
    for family in families:
        _assert_same_weights(tmp_path / family, reference / family)
        assert samples(tmp_path / family) == samples(reference / family)
    _assert_same_run(tmp_path / "long", reference / "long")


def test_micro_batches_do_not_matter(reference: Path) -> None:
    _assert_same_run(reference / "wide", reference / "long")
    assert min(losses(reference / "wide", "padding")) > 0 == max(losses(reference / "long", "padding"))


def test_one_update_moves_every_weight(assets: Path, reference: Path) -> None:
    """The comparison above would hold for a program that trains nothing."""
    for family in FAMILY_CONFIGS:
        before = weights(reference / family, 1)
        assert all(float(tensor.abs().max()) > 0 for tensor in before.values())
    moved, start = weights(reference / "long", STEPS), weights(reference / "llama", 1)
    assert all(float((moved[name] - start[name]).abs().max()) > 1e-4 for name in moved)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_exports_are_the_familys_own(assets: Path, reference: Path, family: str) -> None:
    """Names, shapes and layout: plain transformers finds every weight, the padded rows, and the same tokens."""
    from transformers import AutoModelForCausalLM

    from megadistill.data.tokenize import load_tokenizer, vocabulary_size

    folder = reference / family / "checkpoints" / "step_1" / "hf"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = load_tokenizer(folder)
    assert model.get_output_embeddings().weight.shape[0] == vocabulary_size(tokenizer) + 2
    text = "The young driver opened the brown kettle outside the museum."
    assert tokenizer(text)["input_ids"] == load_tokenizer(assets / "tokenizer")(text)["input_ids"]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_zero_stages_equal_one_process(assets: Path, reference: Path, tmp_path: Path, zero_stage: int) -> None:
    more = ("parallel.tp_size=2", f"parallel.zero_stage={zero_stage}", "train.max_steps=1", BUDGET)
    families = ("llama", "gpt2")
    run_layout(4, [(str(tmp_path / family), settings(assets, family, *more)) for family in families])
    for family in families:
        _assert_same_weights(tmp_path / family, reference / family)


def test_clipping_is_the_same_everywhere(assets: Path, tmp_path: Path) -> None:
    """Adam's first step hides the scale of a gradient; with a large epsilon it does not."""
    common = ("train.max_steps=2", "optim.eps=1", "optim.lr=0.5", "optim.gradient_clipping=0.5")
    unclipped = (*common[:-1], "optim.gradient_clipping=0")
    run_layout(
        1,
        [
            (str(tmp_path / "one"), settings(assets, "llama", *common)),
            (str(tmp_path / "free"), settings(assets, "llama", *unclipped)),
        ],
    )
    stages = [(str(tmp_path / f"z{stage}"), settings(assets, "llama", *common, "parallel.tp_size=2",
               f"parallel.zero_stage={stage}")) for stage in (0, 2, 3)]  # fmt: skip
    run_layout(4, stages)
    for run_dir, _ in stages:
        _assert_same_weights(Path(run_dir), tmp_path / "one", step=2)
        assert losses(Path(run_dir), "grad_norm") == pytest.approx(losses(tmp_path / "one", "grad_norm"), rel=1e-4)
    one, free = weights(tmp_path / "one", 2), weights(tmp_path / "free", 2)
    assert max(float((one[name] - free[name]).abs().max()) for name in one) > 1e-2


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_bf16_stays_close_to_fp32(assets: Path, reference: Path, tmp_path: Path, zero_stage: int) -> None:
    more = ("model.teacher.dtype=bf16", "model.student.dtype=bf16", "parallel.tp_size=2", "train.max_steps=3",
            "generation.mode=dataset", "data.prompts_path=null", "data.prompts_ratio=0")  # fmt: skip
    plain = [setting for setting in more if "bf16" not in setting]
    run_layout(2, [(str(tmp_path / "bf16"), settings(assets, "llama", *more, f"parallel.zero_stage={zero_stage}")),
                   (str(tmp_path / "fp32"), settings(assets, "llama", *plain))])  # fmt: skip
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=3e-2)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
