"""How many examples are written at a time: as many as the cache may hold."""

from __future__ import annotations

from dataclasses import dataclass

from megadistill.errors import ConfigError


@dataclass(frozen=True)
class DecodeBatchPlan:
    """How a rank's examples of a step are written.

    Attributes:
        batch_size: Examples that are written together.
        keeps_teacher_cache: Whether the teacher's cache is kept beside the student's.
        max_batch_size: Examples that fit without a teacher's cache (validation).
    """

    batch_size: int
    keeps_teacher_cache: bool
    max_batch_size: int


def plan_decode_batches(
    *,
    examples_per_rank: int,
    columns: int,
    example_columns: int,
    decoder_bytes: int,
    prefiller_bytes: int,
    max_cache_bytes: int,
) -> DecodeBatchPlan:
    """Splits a rank's examples of a step into decode batches.

    The teacher's cache is kept (a correction is then read from its position on) only where all examples fit together:
    wide decoding saves more than reading an example twice costs. A function of the configuration, so all ranks agree.

    Args:
        examples_per_rank: Examples to write.
        columns: Longest prompt plus longest response of a batch, which may come from two examples.
        example_columns: Longest prompt plus response of one example.
        decoder_bytes: Bytes of one token in the cache of the model that writes (the student).
        prefiller_bytes: Bytes of one token in the cache of the model that reads (the teacher).
        max_cache_bytes: Bytes that all of them together may take.

    Raises:
        ConfigError: Not even one example fits.
    """
    decoder, prefiller = columns * decoder_bytes, columns * prefiller_bytes
    smallest = example_columns * decoder_bytes
    if smallest > max_cache_bytes:
        raise ConfigError(
            f"a key-value cache of {max_cache_bytes} bytes is too small: one example of {example_columns} tokens needs "
            f"{smallest} on this layout; raise it, or shorten prompts or responses",
            setting="generation.max_cache_bytes, data.max_prompt_tokens, generation.max_new_tokens",
        )
    max_batch_size = max(1, max_cache_bytes // max(decoder, 1))
    if examples_per_rank * (decoder + prefiller) <= max_cache_bytes:
        return DecodeBatchPlan(examples_per_rank, True, max_batch_size)
    widest = min(examples_per_rank, max_batch_size)
    # Equal batches: a last one of a few examples would cost nearly as much as a full one.
    num_batches = -(-examples_per_rank // widest)
    return DecodeBatchPlan(-(-examples_per_rank // num_batches), False, max_batch_size)
