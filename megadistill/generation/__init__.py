"""Training text: where it comes from, and how a teacher corrects a student's."""

from megadistill.decoding.sampling import sample_tokens
from megadistill.generation.scrg import find_error_positions

__all__ = ["find_error_positions", "sample_tokens"]
