"""The student's head after a virtual step on a step's references, from which the gate learns (docs/method.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megadistill.data.sample import Sample
from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.losses import Head, virtual_step
from megadistill.parallel.output_head import OutputHead
from megadistill.training.components import Components


def look_ahead(samples: Sequence[Sample], components: Components) -> OutputHead | None:
    """This rank's slice of the head after one step on the references of all data-parallel ranks and passes.

    Reads the references once with the student, before the step's passes; rows without one have no part in it.
    Communicates the same on every rank, whatever the samples are.

    Args:
        samples: This rank's samples.
        components: What the run is made of.

    Returns:
        The head; None unless a gate learns by ``loss.gate_objective`` student.
    """
    config, student, context = components.loss, components.student, components.context
    if components.gate is None or not config.looks_ahead:
        return None
    references = [sample.reference_ids or () for sample in samples]
    chunks = [
        PrefillChunk(i, 0, (*sample.prompt_ids, *reference[:-1]))
        for i, (sample, reference) in enumerate(zip(samples, references, strict=True))
    ]
    prefiller = student.prefiller(components.config.train.micro_batch_size)
    hidden = torch.cat([
        states[len(states) - len(reference) :]
        for states, reference in zip(prefiller.read(chunks), references, strict=True)
    ])  # fmt: skip
    labels = torch.tensor([token for reference in references for token in reference], dtype=torch.int64)
    with student.head() as head:
        return virtual_step(
            Head.of(hidden, head),
            labels.to(context.device),
            head.shard,
            context.dp_group,
            chunk_tokens=config.chunk_tokens,
            backend=config.backend,
        )
