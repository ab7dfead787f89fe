"""How many rows are written at a time: as many as the cache may hold."""

from __future__ import annotations

from dataclasses import dataclass

from megadistill.errors import ConfigError


@dataclass(frozen=True)
class DecodeBatchPlan:
    """``num_rows`` of a step are written together; ``keeps_teacher`` says whether the teacher's cache is kept beside
    the student's; ``most_rows`` is what fits of rows that are only written (validation)."""

    num_rows: int
    keeps_teacher: bool
    most_rows: int


def plan_decode_batches(
    *, rows_per_rank: int, columns: int, one_row: int, writer_bytes: int, reader_bytes: int, max_cache_bytes: int
) -> DecodeBatchPlan:
    """Splits a rank's rows of a step.

    ``columns``: of a wave, whose longest prompt and longest response may be of two rows; ``one_row``: of one row alone.
    ``writer_bytes`` and ``reader_bytes`` are those of one token in the cache of the model that writes (the student) and
    of the one that reads (the teacher).

    The teacher's cache is kept (a correction is then read from its position on) only where all rows fit together: wide
    decoding saves more than reading a row twice costs. A function of the configuration, so ranks agree. Raises
    ConfigError when not even one row fits.
    """
    writer, reader = columns * writer_bytes, columns * reader_bytes
    alone = one_row * writer_bytes
    if alone > max_cache_bytes:
        raise ConfigError(
            f"generation.max_cache_bytes={max_cache_bytes} is less than one row of {one_row} tokens needs on this "
            f"layout: {alone}; shorten data.max_prompt_tokens or generation.max_new_tokens, or allow more"
        )
    most_rows = max(1, max_cache_bytes // max(writer, 1))
    if rows_per_rank * (writer + reader) <= max_cache_bytes:
        return DecodeBatchPlan(rows_per_rank, True, most_rows)
    widest = min(rows_per_rank, most_rows)
    # Equal waves: the last one of a few rows would cost nearly as much as a full one.
    num_waves = -(-rows_per_rank // widest)
    return DecodeBatchPlan(-(-rows_per_rank // num_waves), False, most_rows)
