"""The objective inside a ZeRO-3 engine: the head is gathered once for a global batch, not for a chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import runs
from tests.support.runs import LARGE_MODEL, losses, settings, weights, write_assets
from tests.support.spawn import run_ranks


def _watch_head(engine_module: torch.nn.Module, events: list[str]) -> None:
    """Notes every gathering of a partitioned model's head, whichever parameter it is requested through."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    head = engine_module.get_output_embeddings().weight
    for parameter in engine_module.parameters():
        for name in ("all_gather", "all_gather_coalesced"):
            gather = getattr(parameter, name)

            def noted(*arguments: Any, own=parameter, gather=gather, **options: Any) -> Any:
                asked = arguments[0] if arguments and arguments[0] is not None else options.get("param_list") or [own]
                if any(one is head for one in asked) and head.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                    events.append("gather")
                return gather(*arguments, **options)

            setattr(parameter, name, noted)


def _places(events: list[str], what: str) -> list[int]:
    return [i for i, event in enumerate(events) if event == what]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_head_is_gathered_once_a_batch(family: str, tmp_path: Path) -> None:
    """Two data-parallel ranks with unlike numbers of chunks (one or two rows each), four micro-batches, two steps."""
    write_assets(tmp_path)

    def body(rank: int) -> tuple[list[str], list[int]]:
        from megadistill.losses import objective
        from megadistill.training import step

        accumulate = step.accumulate_gradients
        events: list[str] = []
        chunks: list[int] = []

        def watched(samples: Any, passes: Any, counts: Any, components: Any, *more: Any, **named: Any) -> Any:
            student = components.student
            if not events:
                _watch_head(student.module, events)
                forward, backward = student.forward, student.backward
                student.forward = lambda *given, **named: (events.append("forward"), forward(*given, **named))[1]
                student.backward = lambda loss: (events.append("backward"), backward(loss))[1]
            events.append("step")
            found = accumulate(samples, passes, counts, components, *more, **named)
            events.append("end")
            return found

        make = objective._FusedPass.__init__

        def counted(self: Any, *given: Any, **named: Any) -> None:
            make(self, *given, **named)
            chunks.append(len(self.chunks))

        step.accumulate_gradients = watched
        fused: Any = objective._FusedPass
        fused.__init__ = counted
        more = ("train.max_steps=2", "train.global_batch_size=8", "loss.chunk_tokens=2", "parallel.tp_size=1")
        run = (str(tmp_path / "run"), settings(tmp_path, family, *more, *LARGE_MODEL))
        runs.train_all(rank, [run], runs.ROOT / "configs" / "base.yaml")
        return events, chunks

    import deepspeed  # noqa: F401  imported once, before the forks

    results = run_ranks(body, 2, timeout_s=400.0)
    assert results[0][1] != results[1][1] and max(results[0][1]) > 2, "the ranks were to have unlike numbers of chunks"
    for events, _ in results:
        steps = [events[i:j] for i, j in zip(_places(events, "step"), _places(events, "end"), strict=True)]
        assert len(steps) == 2
        for found in steps:
            assert found.count("forward") == found.count("backward") == 4
            assert found.count("gather") == 1
    # And everything partitioned trains as one process does.
    alone = settings(tmp_path, family, "train.max_steps=2", "train.global_batch_size=8", "parallel.zero_stage=0")
    runs.run_layout(1, [(str(tmp_path / "alone"), alone)])
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    ours, theirs = weights(tmp_path / "run", 2), weights(tmp_path / "alone", 2)
    assert all((ours[name] - tensor).abs().max() <= 2e-5 for name, tensor in theirs.items())
