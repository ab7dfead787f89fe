"""Where student and teacher disagree in student text, and what the teacher would have written.

Shapes: B examples, N response positions, T scored response tokens of all examples, H hidden size, H_T the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megadistill.config.loss import Backend
from megadistill.data.sample import TokenIds
from megadistill.decoding.protocols import TextModel
from megadistill.decoding.sampling import Sampling, draw_tokens, sampling_numbers
from megadistill.losses import Head, label_nats, label_scores, token_kl
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.rng import Stream
from megadistill.parallel.vocab import VocabShard


class TextScores(NamedTuple):
    """What the teacher thinks of the tokens that were written, right-padded to N columns.

    Attributes:
        log_p: [B, N] their log-probabilities, in nats.
        regret: [B, N] what its best token has more.
        rank: [B, N] int64, how many tokens are better.
    """

    log_p: torch.Tensor
    regret: torch.Tensor
    rank: torch.Tensor


class TeacherScores(NamedTuple):
    """The teacher's view of responses, right-padded to N columns.

    Attributes:
        kl_map: [B, N] float, KL(teacher || student) in nats at every response position.
        teacher_tokens: [B, N] int64, the teacher's own token there.
        mask: [B, N] bool, positions that were scored.
        text: Its view of the written tokens; None where it is not wanted.
    """

    kl_map: torch.Tensor
    teacher_tokens: torch.Tensor
    mask: torch.Tensor
    text: TextScores | None = None


def score_responses(
    lengths: Sequence[int],
    starts: Sequence[int],
    sequence_ids: Sequence[int],
    *,
    student_hidden: Sequence[torch.Tensor],
    student_head: OutputHead,
    teacher_hidden: Sequence[torch.Tensor],
    teacher: TextModel,
    seed: int = 0,
    stream: int = Stream.TEACHER_TOKEN,
    sampling: Sampling | None = None,
    texts: Sequence[TokenIds] | None = None,
    backend: Backend = "auto",
) -> TeacherScores:
    """KL map and teacher tokens of every response position from ``starts[i]`` on (method.md section 1).

    Gathers the teacher's head once over the data-parallel group. Communicates over the tensor-parallel group as
    ``token_kl`` does, for sampled teacher tokens as ``draw_tokens`` does, and for ``texts`` as ``label_scores`` does.

    Args:
        lengths: Response lengths.
        starts: First position of each response that is scored.
        sequence_ids: Key the random numbers of the teacher's tokens.
        student_hidden: [length - start, H] of each example.
        student_head: The student's head.
        teacher_hidden: [length - start, H_T] of each example.
        teacher: The model whose head is used.
        seed: Keys the random numbers, with ``stream``.
        stream: Names the random numbers.
        sampling: How the teacher's tokens are drawn; None: its most likely ones.
        texts: The responses, where the teacher's view of their tokens is wanted.
        backend: What runs the losses.
    """
    shard, device = student_head.shard, student_head.weight.device
    length = torch.tensor(list(lengths), device=device)
    columns = torch.arange(int(length.max()), device=device)
    first = torch.tensor(list(starts), device=device)
    mask = (columns[None] >= first[:, None]) & (columns[None] < length[:, None])
    example, column = mask.nonzero(as_tuple=True)
    ids = torch.tensor(list(sequence_ids), device=device)[example]
    numbers = None if sampling is None else sampling_numbers(seed, ids, column, stream=stream)
    view = _View(shard, numbers, sampling or Sampling(), None if texts is None else padded_tokens(texts, mask)[mask])
    with teacher.head() as teacher_head:
        kl, top1 = token_kl(
            Head.of(concatenated(student_hidden, student_head.weight), student_head),
            Head.of(concatenated(teacher_hidden, teacher_head.weight), teacher_head),
            shard,
            backend=backend,
            visit=view if sampling is not None or texts is not None else None,
        )

    def padded(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask.shape, dtype=values.dtype, device=device).masked_scatter(mask, values)

    tokens = top1 if sampling is None else view.tokens(top1)
    text = None if texts is None else TextScores(*map(padded, view.text(kl)))
    return TeacherScores(padded(kl), padded(tokens), mask, text)


class _View:
    """What else is read off the teacher's logits while the KL is computed, chunk by chunk.

    Args:
        shard: This rank's slice of the vocabulary.
        numbers: Random numbers of the tokens that are drawn; None: none are.
        sampling: How they are drawn.
        written: The tokens that it has a view of; None: none.
    """

    def __init__(
        self, shard: VocabShard, numbers: torch.Tensor | None, sampling: Sampling, written: torch.Tensor | None
    ) -> None:
        self._shard, self._numbers, self._sampling, self._written = shard, numbers, sampling, written
        self._tokens: list[torch.Tensor] = []
        self._text: list[tuple[torch.Tensor, ...]] = []

    def __call__(self, chunk: slice, logits: torch.Tensor) -> None:
        if self._numbers is not None:
            self._tokens.append(draw_tokens(logits, self._shard, self._numbers[chunk], self._sampling))
        if self._written is not None:
            self._text.append(label_scores(logits, self._written[chunk], self._shard))

    def tokens(self, like: torch.Tensor) -> torch.Tensor:
        """The tokens that were drawn."""
        return torch.cat([like[:0], *self._tokens])

    def text(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Log-probability, regret and rank of each written token."""
        empty = [like[:0].double(), like[:0].double(), like[:0].long()]
        return [torch.cat(parts) for parts in zip(empty, *self._text, strict=True)]


def mean_probabilities(
    texts: Sequence[TokenIds], hidden: Sequence[torch.Tensor], head: OutputHead, *, backend: Backend = "auto"
) -> list[float]:
    """Geometric mean of a model's probabilities of the tokens of each text; 1 for a text without tokens.

    Communicates over the tensor-parallel group as ``label_nats`` does.

    Args:
        texts: The tokens.
        hidden: [length, H] of each text, the hidden states that predict its tokens.
        head: The model's head.
        backend: What runs the losses.
    """
    labels = torch.tensor([token for text in texts for token in text], dtype=torch.int64, device=head.weight.device)
    nats = label_nats(Head.of(concatenated(hidden, head.weight), head), labels, head.shard, backend=backend)
    parts = nats.split([len(text) for text in texts])
    return torch.stack([part.sum() / max(1, len(part)) for part in parts]).neg().exp().tolist()


def padded_tokens(responses: Sequence[TokenIds], mask: torch.Tensor) -> torch.Tensor:
    """The responses as int64 of the shape and on the device of ``mask`` [B, N]."""
    padded = [[*response, *[0] * (mask.shape[1] - len(response))] for response in responses]
    return torch.tensor(padded, dtype=torch.int64, device=mask.device).reshape(mask.shape)


def concatenated(hidden: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """[T, H] of all examples; [0, H] where there are no tokens."""
    present = [states for states in hidden if len(states)]
    return torch.cat(present) if present else weight.new_zeros(0, weight.shape[1])
