"""Every way to get the text of a step, on several layouts: the same tokens and losses, and no rank waits forever."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.runs import (
    ROOT,
    free_port,
    join_deepspeed,
    losses,
    run_layout,
    samples,
    settings,
    weights,
)
from tests.support.spawn import RankError, run_ranks

STEPS = 6
OFF_POLICY = ("generation.mode=off_policy", "generation.off_policy.initial_phi=1",
              "generation.off_policy.replay_batches=1", "generation.off_policy.eps=0",
              "train.eval_every=3")  # fmt: skip
MODES: dict[str, tuple[str, ...]] = {
    "off_policy": OFF_POLICY,
    "mixed": ("generation.mode=mixed", "generation.student_ratio=0.5"),
    "dataset": ("generation.mode=dataset",),
    "teacher": ("generation.mode=teacher",),
    "teacher, sampled": ("generation.mode=teacher", "generation.teacher_temperature=0.7"),
    "without correction": ("generation.scrg.enabled=false",),
    "three rounds": ("generation.scrg.rounds=3",),
    "five rounds, greedy teacher": ("generation.scrg.rounds=5", "generation.scrg.teacher_token=greedy"),
    "skd": ("generation.mode=skd", "generation.skd.top_k=3", "generation.scrg.teacher_top_p=0.9"),
    "teacher_mixed": (
        "generation.mode=teacher_mixed",
        "generation.teacher_share=0.4",
        "loss.policy=1",
        "loss.policy_reward=return",
        "loss.divergence=reverse_kl",
    ),
    "contrast": (
        "generation.mode=contrast",
        "generation.teacher_temperature=0.8",
        "generation.scrg.enabled=false",
        "loss.divergence=skewed_reverse_kl",
        "loss.divergence_teacher_text=skewed_forward_kl",
        "loss.adaptive_skew=true",
        "loss.student_text_weight=1.5",
        "loss.average=row",
    ),
    "mixed by row": ("generation.mode=mixed", "generation.mixed_by=row", "loss.average=row", "loss.span_relation=log"),
    "first, kept": ("generation.scrg.error=first", "generation.scrg.after=keep", "generation.scrg.competence=0.001"),
    "taid": ("generation.mode=dataset", "loss.taid.enabled=true", "loss.taid.alpha=0.9", "loss.clip=off"),
    "adakd": (
        "loss.adakd.enabled=true",
        "loss.adakd.share_step=0.4",
        "loss.adakd.tolerance=0.001",
        "loss.adakd.beta=0",
        "loss.adakd.warmup=0",
        "loss.divergence=reverse_kl",
        "loss.span=0",
    ),
    "text": ("generation.mode=teacher", "loss.sft_text=text", "loss.dac_kl=0", "loss.span=0"),
    "one token": ("generation.max_new_tokens=1",),
    "nucleus": ("generation.top_k=20", "generation.top_p=0.9", "generation.sampling_temperature=0.8"),
    # Cache for one example of the student and none of the teacher: four decode batches per rank, all text read again.
    "narrow": ("generation.max_cache_bytes=40000", "generation.scrg.rounds=3"),
}


@pytest.fixture(scope="module")
def assets(assets: Path) -> Path:
    """With a family that has no decoder of the project's own: its own forward pass writes and reads."""
    folder = assets
    for role, hidden in (("teacher", 48), ("student", 32)):
        tree = json.loads((assets_of(folder, "gpt2", role) / "config.json").read_text(encoding="utf-8"))
        model = assets_of(folder, "gpt2_scaled", role)
        model.mkdir(parents=True)
        assert tree["n_embd"] == hidden
        (model / "config.json").write_text(
            json.dumps(tree | {"scale_attn_by_inverse_layer_idx": True}), encoding="utf-8"
        )
    return folder


def assets_of(folder: Path, family: str, role: str) -> Path:
    return folder / family / role


def _runs(assets: Path, out: Path, *more: str) -> list[tuple[str, list[str]]]:
    common = (f"train.max_steps={STEPS}", f"data.valid_path={assets / 'data' / 'valid.jsonl'}", "train.eval_rows=6")
    return [
        *((str(out / mode), settings(assets, "llama", *common, *those, *more)) for mode, those in MODES.items()),
        (str(out / "forward"), settings(assets, "gpt2_scaled", *common, "generation.scrg.rounds=2", *more)),
    ]


@pytest.fixture(scope="module")
def reference(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one_process")
    run_layout(1, _runs(assets, out), more_ends=True)
    return out


def _texts(run_dir: Path) -> list[dict[str, object]]:
    return samples(run_dir) if (run_dir / "samples.jsonl").exists() else []


def test_every_mode_on_another_layout(assets: Path, reference: Path, tmp_path: Path) -> None:
    _assert_same(tmp_path, reference, 2, 2, _runs(assets, tmp_path, "parallel.tp_size=2"))
    for mode in ("teacher", "teacher, sampled"):
        ours, theirs = (
            (out / mode / "teacher_text.jsonl").read_text(encoding="utf-8") for out in (tmp_path, reference)
        )
        assert sorted(ours.splitlines()) == sorted(theirs.splitlines())


@pytest.mark.parametrize(
    ("tp_size", "dp_size", "modes"),
    [(4, 1, ("narrow", "skd", "teacher_mixed")), (1, 4, ("off_policy", "narrow", "mixed by row", "contrast"))],
)
def test_some_modes_on_more_layouts(
    assets: Path, reference: Path, tmp_path: Path, tp_size: int, dp_size: int, modes: tuple[str, ...]
) -> None:
    """Those that choose tokens from what all ranks of a model hold, and those that give ranks unlike rows."""
    runs = _runs(assets, tmp_path, f"parallel.tp_size={tp_size}")
    _assert_same(tmp_path, reference, tp_size, dp_size, [run for run in runs if Path(run[0]).name in modes])


def _assert_same(out: Path, reference: Path, tp_size: int, dp_size: int, runs: list[tuple[str, list[str]]]) -> None:
    run_layout(tp_size * dp_size, runs, more_ends=True)
    for mode in [Path(run_dir).name for run_dir, _ in runs]:
        assert _texts(out / mode) == _texts(reference / mode), mode
        for key in ("loss", "loss/dac_kl", "loss/span", "grad_norm", "phi"):
            assert losses(out / mode, key) == pytest.approx(losses(reference / mode, key), rel=1e-4), (mode, key)
    if "teacher_mixed" in [Path(run_dir).name for run_dir, _ in runs]:  # gains cancel
        ours, theirs = (losses(folder / "teacher_mixed", "loss/policy") for folder in (out, reference))
        assert ours == pytest.approx(theirs, abs=1e-5) and any(ours)


def test_the_modes_do_what_they_say(reference: Path) -> None:
    written = {mode: {sample["step"] for sample in _texts(reference / mode)} for mode in MODES}
    # In the dataset steps of mixed, too, rows without a reference are written.
    always = [
        "adakd",
        "teacher_mixed",
        "contrast",
        "without correction",
        "three rounds",
        "one token",
        "nucleus",
        "narrow",
        "skd",
        "mixed",
        "mixed by row",
    ]
    for mode in always:
        assert written[mode] == set(range(1, STEPS + 1)), mode
    assert written["dataset"] == written["taid"] == written["teacher"] == written["text"] == set()
    assert 0 < sum(losses(reference / "mixed", "text/dataset")) < STEPS and 0 < len(written["off_policy"]) < STEPS
    assert losses(reference / "mixed by row", "text/mixed") == [1.0] * STEPS
    rises = losses(reference / "taid", "taid/t")
    assert rises[:2] == pytest.approx([0.4, 0.4 + 0.6 / STEPS]) and rises[2] > 0.4 + 0.6 * 2 / STEPS + 0.1
    shares = losses(reference / "adakd", "adakd/share")
    assert shares[:2] == [1, 1] and len(set(shares)) > 1
    assert losses(reference / "text") == losses(reference / "text", "loss/sft")
    assert max(losses(reference / "skd", "scrg/corrections_mean")) > 1
    assert sum(losses(reference / "off_policy", "text/replay")) > 0
    assert max(losses(reference / "off_policy", "replay/rows")) == 4
    positions = [sample["error_position"] for sample in _texts(reference / "without correction")]
    assert set(positions) == {-1}
    assert {sample["error_position"] for sample in _texts(reference / "one token")} <= {0, -1}
    # The same text whether all rows are written together and read once, or one at a time and read again.
    assert _texts(reference / "narrow") == _texts(reference / "three rounds")
    assert losses(reference / "narrow") == pytest.approx(losses(reference / "three rounds"), rel=1e-4)
    words = [len(str(sample["student"])) for sample in _texts(reference / "three rounds")]
    assert min(words) < max(words) / 3, "rows end early"


RESUMED = {
    "gate": ("loss.gate_objective=student",),
    "shares": ("loss.taid.enabled=true", "loss.taid.alpha=0.3", "loss.adakd.enabled=true", "loss.adakd.warmup=0",
               "loss.adakd.tolerance=0.001", "loss.adakd.beta=0", "loss.divergence=forward_kl", "loss.span=0"),
}  # fmt: skip


@pytest.mark.parametrize("more", RESUMED.values(), ids=RESUMED)
def test_off_policy_resumes_bit_for_bit(assets: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """Buffer, phi, t, share and gate of a run that was stopped are those of the undisturbed one, at tp 1 x dp 2."""
    more = (*OFF_POLICY, *more, f"data.valid_path={assets / 'data' / 'valid.jsonl'}", "train.eval_rows=6",
            "train.max_steps=12", "train.save_every=6", "parallel.tp_size=1")  # fmt: skip
    run_layout(2, [(str(tmp_path / "whole"), settings(assets, "llama", *more))])
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_6"
    again = settings(assets, "llama", *more, f"train.resume={checkpoint}")
    run_layout(2, [(str(tmp_path / "resumed"), again)])
    for key in ("loss", "phi", "replay/rows", "text/replay", "eval/nll", "taid/t", "adakd/share"):
        whole, resumed = (_every(tmp_path / name, key) for name in ("whole", "resumed"))
        assert resumed == whole[6:], key
    ours, theirs = weights(tmp_path / "resumed", 12), weights(tmp_path / "whole", 12)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)["off_policy"]
    assert state["schedule"]["phi"] == _every(tmp_path / "whole", "phi")[6]
    if "loss.gate_objective=student" not in more:
        return
    at_6, ours, theirs = (
        torch.load(folder / "trainer.pt", weights_only=True)["gate"]["gate"]
        for folder in (checkpoint, *(tmp_path / name / "checkpoints" / "step_12" for name in ("resumed", "whole")))
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(torch.equal(at_6[name], theirs[name]) for name in theirs), "the gate did not learn"


def test_text_without_a_state_resumes_bit_for_bit(assets: Path, tmp_path: Path) -> None:
    """teacher_mixed with the policy term, and contrast with its skews and weights, at tp 1 x dp 2."""
    runs = []
    for mode in ("teacher_mixed", "contrast"):
        more = (*MODES[mode], "train.max_steps=4", "train.save_every=2", "parallel.tp_size=1")
        whole, resumed = tmp_path / mode / "whole", tmp_path / mode / "resumed"
        again = (*more, f"train.resume={whole / 'checkpoints' / 'step_2'}")
        runs += [(str(out), settings(assets, "llama", *those)) for out, those in ((whole, more), (resumed, again))]
    run_layout(2, runs)
    for mode in ("teacher_mixed", "contrast"):
        whole, resumed = tmp_path / mode / "whole", tmp_path / mode / "resumed"
        for key in ("loss", "loss/policy", "contrast/teacher_skew", "contrast/student_weight", "grad_norm"):
            assert _every(resumed, key) == _every(whole, key)[2:], (mode, key)
        ours, theirs = weights(resumed, 4), weights(whole, 4)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), mode
    assert _every(tmp_path / "contrast" / "whole", "contrast/student_weight") == [1.0, 1.25, 1.5, 1.5]


def _every(run_dir: Path, key: str) -> list[float | None]:
    return [json.loads(line).get(key) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_teachers_text_is_written_once(assets: Path, tmp_path: Path) -> None:
    """A second run reads the file; an incomplete one is completed; other settings are refused."""
    cache = tmp_path / "cache" / "text.jsonl"
    more = ("generation.mode=teacher", "train.max_steps=2", f"generation.teacher_cache={cache}")
    run_layout(1, [(str(tmp_path / "first"), settings(assets, "llama", *more))])
    whole, wrote = cache.read_text(encoding="utf-8"), cache.stat().st_mtime_ns
    run_layout(1, [(str(tmp_path / "second"), settings(assets, "llama", *more))])
    assert cache.stat().st_mtime_ns == wrote and losses(tmp_path / "second") == losses(tmp_path / "first")
    lines = whole.splitlines(keepends=True)
    cache.write_text("".join(lines[:9]) + lines[9][:20], encoding="utf-8")
    run_layout(2, [(str(tmp_path / "third"), settings(assets, "llama", *more, "parallel.tp_size=1"))])
    assert sorted(cache.read_text(encoding="utf-8").splitlines()) == sorted(whole.splitlines())
    with pytest.raises(RankError, match="max_new_tokens=8 there, 6 here"):
        other = settings(assets, "llama", *more, "generation.max_new_tokens=6")
        run_layout(2, [(str(tmp_path / "fourth"), other)])
    cache.write_text(lines[0] + "{}\n", encoding="utf-8")
    with pytest.raises(RankError, match="is damaged"):
        run_layout(2, [(str(tmp_path / "fifth"), settings(assets, "llama", *more))])


def test_another_teacher_in_the_same_place_is_noticed(assets: Path, tmp_path: Path) -> None:
    """Also by a checkpoint of random weights, which depend on the seed; and a file of the user's is never touched."""
    cache = tmp_path / "text.jsonl"
    more = ("generation.mode=teacher", "train.max_steps=1", f"generation.teacher_cache={cache}")
    run_layout(1, [(str(tmp_path / "first"), settings(assets, "llama", *more))])
    with pytest.raises(RankError, match="seed=0 there, 3 here"):
        run_layout(1, [(str(tmp_path / "second"), settings(assets, "llama", *more, "run.seed=3"))])
    trained = f"model.teacher.path={tmp_path / 'first' / 'checkpoints' / 'step_1' / 'hf'}"
    with pytest.raises(RankError, match="other settings"):
        run_layout(1, [(str(tmp_path / "third"), settings(assets, "llama", *more, trained))])
    for content in ('{"instruction": "x", "output": "y"}', "a\nb", '{"a": 1}\n{"b"'):
        cache.write_text(content, encoding="utf-8")
        with pytest.raises(RankError, match="is not a megadistill teacher cache"):
            run_layout(2, [(str(tmp_path / "fourth"), settings(assets, "llama", *more))])
        assert cache.read_text(encoding="utf-8") == content


def test_one_run_a_folder(assets: Path, tmp_path: Path) -> None:
    from megadistill.observability.lock import exclusive_lock

    run = [(str(tmp_path / "run"), settings(assets, "llama", "train.max_steps=1"))]
    with (
        exclusive_lock(tmp_path / "run" / ".lock", "x"),
        pytest.raises(RankError, match="is being written by another run"),
    ):
        run_layout(2, run)
    run_layout(1, run)


def test_off_policy_resumes_from_a_checkpoint_of_another_mode(assets: Path, tmp_path: Path) -> None:
    run_layout(1, [(str(tmp_path / "on"), settings(assets, "llama", "train.max_steps=2"))])
    more = (*OFF_POLICY, f"data.valid_path={assets / 'data' / 'valid.jsonl'}", "train.max_steps=4",
            f"train.resume={tmp_path / 'on' / 'checkpoints' / 'step_2'}")  # fmt: skip
    run_layout(1, [(str(tmp_path / "off"), settings(assets, "llama", *more))])
    assert _every(tmp_path / "off", "replay/rows")[0] == 4.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("generation.mode=mixed",), "no row has a reference.*generation.mode=mixed"),
        (("loss.gate_objective=student",), "no row has a reference.*loss.gate_objective=student.*need none"),
        (
            (*OFF_POLICY, "generation.off_policy.initial_phi=0.5"),
            "no row has a reference.*generation.mode=off_policy",
        ),
        (
            ("generation.mode=off_policy", "train.eval_every=1", "data.train_path=REFERENCES"),
            "waits for their likelihood",
        ),
    ],
)
def test_runs_that_could_train_on_nothing_are_refused(
    assets: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    from megadistill.config.load import load_config
    from megadistill.errors import DataError
    from megadistill.training.data import load_training_data
    from megadistill.training.setup import run_tokenizer

    prompts = assets / "data" / "prompts.jsonl"
    overrides = settings(assets, "llama", f"data.train_path={prompts}", f"data.valid_path={prompts}", *more)
    overrides = [text.replace("REFERENCES", str(assets / "data" / "train.jsonl")) for text in overrides]
    config = load_config(ROOT / "configs" / "base.yaml", [f"run.dir={tmp_path}", *overrides])
    with pytest.raises(DataError, match=message):
        load_training_data(config, *run_tokenizer(config))


def test_rotary_frequencies_stay_float32(assets: Path) -> None:
    """DeepSpeed casts a bf16 model's buffers; angles at position 1,500 would be off by several per cent."""
    import deepspeed  # noqa: F401  imported once, before the forks

    def body(rank: int) -> list[str]:
        from megadistill.engines.partitioned import frozen_model
        from megadistill.models.loading import load_model
        from megadistill.parallel.context import ParallelContext

        join_deepspeed(rank)
        context = ParallelContext.build(2, 60, torch.device("cpu"))
        path = str(assets / "llama" / "teacher" / "config.json")
        loaded = load_model(path, dtype="bf16", vocab_size=403, seed=1, attention="sdpa", where="x")
        exact = loaded.model.model.rotary_emb.inv_freq.clone()
        model = frozen_model(loaded, context, zero_stage=3, dtype="bf16")
        assert torch.equal(model.module.model.rotary_emb.inv_freq, exact)
        return [str(exact.dtype), str(model.module.model.norm.weight.dtype)]

    assert run_ranks(body, 2) == [["torch.float32", "torch.bfloat16"]] * 2


FAILING = """
import os, sys
from megadistill.decoding.rollout import RolloutState
append, calls = RolloutState._append, [0]
def failing(*arguments):
    calls[0] += 1
    if os.environ["RANK"] == "1" and calls[0] == 12:
        raise RuntimeError("injected into the decoding")
    return append(*arguments)
RolloutState._append = failing
from megadistill.cli.main import main
sys.exit(main(sys.argv[2:]))  # deepspeed puts --local_rank first
"""


def test_a_rank_that_fails_while_decoding_ends_the_job(assets: Path, tmp_path: Path) -> None:
    """With its error, and long before the run's timeout of half an hour."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING, encoding="utf-8")
    run = [f"run.dir={tmp_path / 'run'}", "parallel.tp_size=2", *settings(assets, "llama", "train.max_steps=4")]
    command = ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), str(script), "train"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, "--config", str(ROOT / "configs" / "base.yaml"), *run], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode != 0
    assert "RuntimeError: injected into the decoding" in ended.stdout + ended.stderr
