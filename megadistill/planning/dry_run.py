"""The real step of any rank of any world in one CPU process: no weights, no data, no other ranks.

``python -m megadistill.planning.dry_run`` does one that it reads as JSON from its standard input: a dry run pretends to
be a rank, which a process can do once.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from megadistill.config.schema import RunConfig
from megadistill.errors import MegadistillError, TopologyError, first_line
from megadistill.parallel.context import ParallelContext, Shapes
from megadistill.parallel.vocab import VocabShard
from megadistill.planning.counter import Counter
from megadistill.planning.ghost_mode import Ghost
from megadistill.planning.pretend_cuda import pretend_cuda
from megadistill.planning.use import PhaseUse, StepUse, Traffic

if TYPE_CHECKING:
    from megadistill.training.components import Components

T = TypeVar("T")
_OVERHEAD = (
    "memory is what torch.cuda.memory_allocated counts: NCCL's buffers (about 1 GB), the CUDA context (0.5 GB) and "
    "what the allocator cannot reuse (take a tenth) come on top"
)


class DryContext(ParallelContext):
    """The place of a rank whose world is not there: what others would say is what this rank would."""

    def run_on_rank0(self, action: Callable[[], T], writes: Path | None = None) -> T:
        """Runs ``action`` here."""
        return action()

    def gather_objects_over_dp(self, item: T) -> list[T]:
        """The item of every rank: this rank's."""
        return [item] * self.dp_size

    def gather_objects_over_tp(self, item: T) -> list[T]:
        """The item of every rank: this rank's."""
        return [item] * self.tp_size

    def gather_objects(self, item: T) -> list[T]:
        """The item of every rank: this rank's."""
        return [item] * self.world_size

    def gather_shapes_over_tp(self, ours: Shapes, wholes: Shapes) -> list[Shapes]:
        """Shards are as equal as can be, larger ones first.

        Raises:
            TopologyError: This rank's shard is not as that rule says.
        """
        ranks: list[dict[str, tuple[int, ...]]] = [{} for _ in range(self.tp_size)]
        for name, shape in ours.items():
            whole = wholes[name]
            for rank, shapes in enumerate(ranks):
                shapes[name] = tuple(
                    size if size == total else VocabShard.split(total, self.tp_size, rank).size
                    for size, total in zip(shape, whole, strict=True)
                )
            if ranks[self.tp_rank][name] != shape:
                raise TopologyError(f"{name} of shape {whole} is sharded into {shape}: no rule of a dry run's")
        return list(ranks)


def dry_run(
    config: RunConfig,
    *,
    rank: int,
    world_size: int,
    like_gpu: bool,
    gpu_memory: int,
    prompt_tokens: int,
    response_tokens: int,
    progress: Callable[[str], None] | None = None,
    skips_decoding: bool = True,
    inspect: Callable[[Components], None] | None = None,
) -> StepUse:
    """Counts a step of one rank, from configurations alone.

    Meanwhile this process is a rank of a world that is not there, and some patches of DeepSpeed stay: use
    ``dry_run_in_process`` in a process that goes on.

    Args:
        config: The configuration of the run; ``parallel.tp_size`` is a number.
        rank: Which rank.
        world_size: Processes in all.
        like_gpu: Choose as on a GPU, not as on a CPU.
        gpu_memory: Bytes of that GPU.
        prompt_tokens: Tokens of every prompt.
        response_tokens: Tokens of every reference and of what the student writes.
        progress: Told what begins.
        skips_decoding: Count most decoding steps from a few of them, which gives the same numbers.
        inspect: Gets the run after the step.

    Raises:
        ConfigError: A model cannot be used.
        TopologyError: The processes cannot be divided like that, or there is no such rank.
        MegadistillError: The rows do not fit the configuration.
    """
    if not 0 <= rank < world_size:
        raise TopologyError(f"rank {rank} does not exist among {world_size} processes")
    from megadistill.launch.dry_world import dry_world
    from megadistill.planning.counted_step import Lengths, counted_step, models_as_files, plannable, vocabulary
    from megadistill.training.setup import check_models

    torch.set_num_threads(1)
    with ExitStack() as stack:
        config = models_as_files(config, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        tp_size = check_models(config, world_size)
        vocab_size = vocabulary(config)
        config, notes = plannable(config)
        counter = Counter()
        stack.enter_context(dry_world(rank, world_size))
        device = stack.enter_context(pretend_cuda(counter, gpu_memory)) if like_gpu else torch.device("cpu")
        stack.enter_context(Ghost(counter))
        context = DryContext.build(tp_size, config.parallel.timeout_s, device)
        use = counted_step(
            config, context, counter, Lengths(prompt_tokens, response_tokens), source="dry run",
            vocab_size=vocab_size, skips_decoding=skips_decoding, progress=progress or (lambda line: None),
            inspect=inspect,
        )  # fmt: skip
    lengths = f"every prompt has {prompt_tokens} tokens, every reference and response {response_tokens}"
    return replace(use, assumptions=(lengths, *notes, *([_OVERHEAD] if like_gpu else [])))


def dry_run_in_process(
    config: RunConfig, *, progress: Callable[[str], None] | None = None, **arguments: Any
) -> StepUse:
    """``dry_run`` in a process of its own.

    Args:
        config: As ``dry_run``'s.
        progress: Told what begins.
        arguments: The others of ``dry_run``.

    Raises:
        MegadistillError: What ``dry_run`` raised, or that its process died.
    """
    order = json.dumps({"config": config.model_dump(mode="json"), "arguments": arguments})
    # Its own world, whatever launcher this process belongs to; one thread, because nothing is computed.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", "megadistill.planning.dry_run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        encoding="utf-8",
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(order)
        process.stdin.close()
        answer, said = None, deque[str](maxlen=1)
        for line in process.stdout:
            if line.startswith(_MARK):
                kind, answer = json.loads(line.removeprefix(_MARK))
                if kind == "progress" and progress is not None:
                    progress(answer)
            elif line.strip():
                said.append(line.strip())
    if answer is None or process.returncode:
        cause = said[0] if said else f"its process ended with {process.returncode}"
        raise MegadistillError(f"the dry run failed: {cause}")
    if kind == "error":
        raise MegadistillError(answer["message"], setting=answer["setting"])
    return step_use(answer)


def step_use(tree: dict[str, Any]) -> StepUse:
    """The record that ``StepUse.as_dict`` wrote."""
    phases = tuple(
        PhaseUse(**phase | {"traffic": tuple(Traffic(**call) for call in phase["traffic"])}) for phase in tree["phases"]
    )
    given = {name: value for name, value in tree.items() if name != "peak"}
    return StepUse(**given | {"phases": phases, "assumptions": tuple(tree["assumptions"])})


_MARK = "megadistill dry run: "


def main() -> None:
    """The process of ``dry_run_in_process``."""

    def say(kind: str, content: Any) -> None:
        print(_MARK + json.dumps([kind, content]), flush=True)

    logging.disable(logging.WARNING)  # weights are random, and so on: true, and of no use here
    order = json.load(sys.stdin)
    try:
        use = dry_run(
            RunConfig.model_validate(order["config"]), progress=lambda line: say("progress", line), **order["arguments"]
        )
    except MegadistillError as error:
        say("error", {"message": first_line(error), "setting": error.setting})
    else:
        say("use", use.as_dict())


if __name__ == "__main__":
    main()
