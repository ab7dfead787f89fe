"""Which tokens may be drawn: the options that generation, evaluation and ``megadistill generate`` share.

To add one: a field here, and what it does in ``decoding/sampling.py``.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field

from megadistill.config.section import NonNegativeInt, Section, TopP


class SamplingOptions(Section):
    """Options beside seed and temperature. The defaults keep every token."""

    top_k: NonNegativeInt = Field(0, description="Sample from the top_k most likely tokens; 0: from all.")
    top_p: TopP = Field(
        1.0, description="Sample from the most likely tokens that together have this probability; 1: from all."
    )

    @classmethod
    def of(cls, source: object) -> Self:
        """The options among the attributes of a section or of parsed arguments."""
        return cls(**{name: getattr(source, name) for name in cls.model_fields})
