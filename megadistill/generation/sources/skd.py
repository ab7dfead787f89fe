"""Mode ``skd``: the student writes, and the teacher replaces every token that is not among its best ones.

Speculative knowledge distillation (Xu et al., arXiv 2410.11325): y_t from the student; where it is not among the
teacher's K best, y_t from the teacher. Here the student writes to the end, the teacher reads all of it at once, and the
student continues from the first token that was replaced, until nothing is left to look at.
"""

from __future__ import annotations

import torch

from megadistill.generation.scrg import ErrorRule
from megadistill.generation.sources.on_policy import OnPolicy
from megadistill.parallel.rng import Stream


class Skd(OnPolicy):
    """Student text with the teacher's tokens in it; ``generation.scrg`` only says how the teacher's are drawn."""

    @property
    def rule(self) -> ErrorRule:
        """The first token that the teacher ranks below its ``generation.skd.top_k`` best."""
        return ErrorRule("rank", self._inputs.config.generation.skd.top_k)

    def goes_on(self, round_index: int, has_text: bool) -> bool:
        """As long as any rank has text to look at (one all-reduce of a number)."""
        context = self._inputs.context
        return bool(context.max_over_world(torch.tensor(int(has_text), device=context.device)))

    def streams(self, round_index: int) -> tuple[int, int]:
        """The same in all rounds: what is right of the first replaced token has decided nothing that is kept.

        So the text is the one that is drawn token by token, with two numbers at each position.
        """
        return Stream.TEACHER_TOKEN, Stream.ROLLOUT

    @property
    def after(self) -> str:
        """New text of the student."""
        return "regenerate"


SOURCE = Skd
