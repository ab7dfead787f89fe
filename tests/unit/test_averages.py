"""``loss.average`` and what divides the terms: a micro-batch's losses against plain means, however rows are split."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.data.sample import Sample
from megadistill.losses import LossConfig
from megadistill.parallel import VocabShard
from megadistill.parallel.output_head import OutputHead
from megadistill.training.micro_batch import GlobalCounts, MicroBatchLoss, build_micro_batch

V, H, CPU = 13, 6, torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


EMBEDDING, STUDENT, TEACHER = normal(V, H), normal(V, H), normal(V, H)
# Of very different lengths; the second has no reference, the third is its reference.
SHARED = (7, 8)
ROWS = [
    Sample(0, (5, 6), "", (7, 8, 9), (10, 11, 12, 4, 5, 6, 7, 8), None, normal(8, H), (True, True, *[False] * 6)),
    Sample(1, (5,), "", None, (12,), None, normal(1, H), (False,)),
    Sample(2, (3, 4), "", SHARED, SHARED, None, normal(2, H), (True, False)),
]  # fmt: skip
COUNTS = GlobalCounts(num_sft=5.0, num_kd=11.0, num_pairs=3.0, num_spans=2.0, sft_rows=2.0, kd_rows=3.0)


def student_logits(prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """A model without memory: a token's hidden state is its embedding."""
    return F.linear(EMBEDDING[[prompt[-1], *response[:-1]]], STUDENT)


def losses(config: LossConfig, split: Sequence[Sequence[int]]) -> dict[str, float]:
    """The sum of all micro-batches' shares."""
    total: dict[str, float] = {}
    for indices in split:
        micro = build_micro_batch([ROWS[i] for i in indices], pad_id=0, device=CPU, padding_free=True)
        loss = MicroBatchLoss(micro, COUNTS, config, None, OutputHead(TEACHER, None, VocabShard(0, V, V)))
        value = loss(EMBEDDING[micro.batch.input_ids], OutputHead(STUDENT, None, VocabShard(0, V, V)))
        for name, number in {"loss": value, **loss.metrics}.items():
            total[name] = total.get(name, 0.0) + float(number)
    return total


@pytest.mark.parametrize("average", ["token", "row"])
@pytest.mark.parametrize("relation", ["hadamard", "log"])
def test_the_terms_are_these_means(average: str, relation: str) -> None:
    config = LossConfig(clip="off", average=average, span_relation=relation, sft=0.5, dac_kl=2.0, span=3.0)
    kl, sft, spans = [], [], []
    for row in ROWS:
        assert row.response_ids is not None and row.teacher_hidden is not None
        log_q = student_logits(row.prompt_ids, row.response_ids).log_softmax(-1)
        log_p = F.linear(row.teacher_hidden, TEACHER).log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        if row.reference_ids is not None:
            logits = student_logits(row.prompt_ids, row.reference_ids)
            sft.append(F.cross_entropy(logits, torch.tensor(row.reference_ids), reduction="none"))
        gap = (log_q - log_p).gather(-1, torch.tensor(row.response_ids).unsqueeze(-1)).squeeze(-1)
        if row.sequence_id == 0:
            spans.append(gap[:3].sum() ** 2 / 3)
        if row.sequence_id == 2:
            spans.append(gap.sum() ** 2 / 2)

    def mean(values: list[Tensor]) -> float:
        return float(torch.cat(values).mean() if average == "token" else torch.stack([v.mean() for v in values]).mean())

    whole = losses(config, [[0, 1, 2]])
    assert whole["loss/sft"] == pytest.approx(mean(sft), rel=1e-12)
    assert whole["loss/dac_kl"] == pytest.approx(mean(kl), rel=1e-12)
    if relation == "log":
        assert whole["loss/span"] == pytest.approx(float(torch.stack(spans).mean()), rel=1e-12)
    # The third row alone is read once for all its losses.
    for split in ([[0], [1], [2]], [[2, 1], [0]]):
        assert losses(config, split) == pytest.approx(whole, rel=1e-12)
