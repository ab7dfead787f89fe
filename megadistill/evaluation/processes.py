"""The processes that a model is evaluated or decoded with: those of a launcher, or this one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from megadistill.config.parallel import ParallelSection
from megadistill.launch.heartbeat import lost_ranks_reported
from megadistill.launch.ranks import set_rank_variables
from megadistill.launch.world import default_device, distributed, name_accelerator
from megadistill.models.families import head_counts
from megadistill.models.loading import load_model_config
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.topology import resolve_tp_size


@contextmanager
def inference_context(parallel: ParallelSection, models: Mapping[str, str]) -> Iterator[ParallelContext]:
    """The process grid for inference (collective: every rank of the launcher enters it).

    Args:
        parallel: Tensor-parallel size and timeout.
        models: What a model is called in messages -> its path. The size must divide the heads of all of them.

    Raises:
        ConfigError: A model has no readable configuration.
        TopologyError: The tensor-parallel size does not fit.
    """
    name_accelerator()
    num_ranks = set_rank_variables()
    counts: dict[str, int] = {}
    for name, path in models.items():
        counts |= head_counts(load_model_config(path, name), name)
    tp_size = resolve_tp_size(parallel.tp_size, num_ranks, counts)
    if num_ranks == 1:
        yield ParallelContext.single(default_device())
        return
    with distributed(parallel.timeout_s) as device:
        context = ParallelContext.build(tp_size, parallel.timeout_s, device)
        with lost_ranks_reported(context):
            yield context
