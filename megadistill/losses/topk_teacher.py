"""A teacher of which only the top classes are known: cached on disk, or behind a network.

The classes that are not listed form one class, the rest. Its teacher probability is the teacher's tail, its student
probability the sum of the student's. Every formula of the token level is the usual one on these L + 1 classes; the mask
never keeps the rest. That problem is small and the same on every rank, so it needs no second exchange.
Suffixes: C tokens of one chunk, Vs this rank's classes, L listed classes, M = L + 1, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megadistill.config.loss import LossConfig
from megadistill.errors import ConfigError, DataError
from megadistill.losses.dense_teacher import local_statistics, span_sums
from megadistill.losses.divergences import divergence_of
from megadistill.losses.statistics import TokenStatistics, local_target, log_total
from megadistill.losses.tiles import EdgeNodes, GradientWeights, LogNormalizers, MaskBounds, SpanPairs, TileSpec
from megadistill.losses.torch_kernels import TorchKernels, add_labels
from megadistill.parallel.collectives import all_gather_rows
from megadistill.parallel.vocab import VocabShard

_ABSENT = -1e6  # log-probability of an absent class, so small that it times exp(-80) is still nothing
_MAX_EXCESS = 0.02  # half-precision caches are off by less


@dataclass(frozen=True)
class TeacherTopK:
    """The teacher's top classes at each position, the same on every tensor-parallel rank.

    For tokens that count, probabilities and tail add up to one. A tail of 0 with classes that are not listed means that
    the teacher excludes them, which makes ``reverse_kl`` infinite.

    Attributes:
        ids: [T, L] int64 classes, none twice for one token.
        log_probs: [T, L] their log-probabilities, in any order.
        log_tail: [T] log of the probability of all other classes, -inf for none.
        temperature: The temperature at which they were taken: tempering later needs all classes.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    temperature: float = 1.0

    @classmethod
    def from_logits(cls, logits: Tensor, num_listed: int, temperature: float = 1.0) -> TeacherTopK:
        """The ``num_listed`` top classes of whole logits [T, V]."""
        log_probs = (logits.detach().to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
        values, ids = log_probs.topk(num_listed, -1)
        return cls(ids, values, log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1), temperature)

    def check(self, num_tokens: int, config: LossConfig) -> None:
        """Raises ValueError for shapes that do not fit and ConfigError for another temperature than the loss's."""
        if self.ids.dim() != 2 or self.ids.shape != self.log_probs.shape or self.ids.shape[0] != num_tokens:
            raise ValueError(
                f"teacher.ids and teacher.log_probs have shapes {tuple(self.ids.shape)} and "
                f"{tuple(self.log_probs.shape)}, expected [{num_tokens}, L] twice"
            )
        if self.ids.shape[1] < 1 or self.ids.dtype != torch.int64 or self.log_tail.shape != (num_tokens,):
            raise ValueError(
                f"teacher.ids must be int64 with at least one column and teacher.log_tail of shape ({num_tokens},); "
                f"got {self.ids.dtype} {tuple(self.ids.shape)} and {tuple(self.log_tail.shape)}"
            )
        if self.temperature != config.temperature:
            raise ConfigError(
                f"the teacher's top classes were taken at temperature {self.temperature}, and loss.temperature="
                f"{config.temperature} needs others: take them again at that temperature"
            )


class TopKTeacher:
    """What ``DenseTeacher`` is, for a ``TeacherTopK``."""

    def __init__(
        self,
        top: TeacherTopK,
        positions: Tensor,
        dtype: torch.dtype,
        *,
        spec: TileSpec,
        kernels: TorchKernels,
        shard: VocabShard,
        config: LossConfig,
    ) -> None:
        self.spec, self.kernels, self.shard, self.dtype = spec, kernels, shard, dtype
        self.top_k, self._has_label_p = config.top_k if config.is_clipped else 0, config.reads_labels
        self._ids = top.ids[positions]
        log_probs = torch.cat([top.log_probs[positions], top.log_tail[positions].unsqueeze(-1)], -1)
        if len(self._ids):
            _check_distributions(self._ids, log_probs, config, shard.total)
        self._log_probs = log_probs.to(dtype).clamp_min(_ABSENT)
        self._small_spec = replace(spec, temperature=1.0, has_untempered=False, has_bucket=spec.is_clipped)
        self._small_kernels = TorchKernels()

    def statistics(self, chunk: slice, student_CVs: Tensor, labels: Tensor) -> TokenStatistics:
        """Reads a chunk; one all-gather of 3 + L floats per token (4 + L when tempered)."""
        self._chunk = self._ids[chunk], self._log_probs[chunk]
        ids_CL = self._chunk[0]
        here = (ids_CL >= self.shard.start) & (ids_CL < self.shard.stop)
        token, place = torch.nonzero(here, as_tuple=True)
        column = ids_CL[token, place] - self.shard.start
        self._here = token, place, column
        self._label_place = _places(ids_CL, labels) if self._has_label_p else None
        target = local_target(student_CVs, labels, self.shard)
        listed_CL = student_CVs.new_zeros(ids_CL.shape)
        listed_CL[token, place] = student_CVs[token, column]
        # Without the listed classes, in place and back: a masked copy would be as large as the tile.
        student_CVs[token, column] = _ABSENT
        local = local_statistics(self.spec, self.kernels, student_CVs, None)
        student_CVs[token, column] = listed_CL[token, place]
        is_none = local.student_max <= 0.5 * _ABSENT
        columns = [local.student_max.masked_fill(is_none, -torch.inf), local.student_sum.masked_fill(is_none, 0.0)]
        columns.append(target)
        if local.untempered_sum is not None:
            columns.append(local.untempered_sum.masked_fill(is_none, 0.0))
        gathered = all_gather_rows(torch.cat([torch.stack(columns, -1), listed_CL], -1), self.shard.group)
        width = len(columns)
        return self._merge(gathered[..., :width].double(), gathered[..., width:].sum(0).double())

    def edge_masses(self, norms: LogNormalizers, top1: Tensor, nodes: EdgeNodes, is_wide: bool) -> Tensor:
        """``tile_math.edge_masses`` of the listed classes and the rest."""
        spec = replace(self._small_spec, is_wide=is_wide)
        zeros = torch.zeros_like(norms.student_max)
        small_norms = LogNormalizers(zeros, zeros, None, zeros, zeros)
        return self._small_kernels.edge_masses(spec, self._chunk[1], small_norms, self._top_place, nodes)

    def sums(
        self, student_CVs: Tensor, norms: LogNormalizers, bounds: MaskBounds | None, is_pair: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Sums over classes [1, C, num_sums] and, in one all-gather, merged span sums [C, 2].

        In a span's product the teacher's probability of a class that is not listed counts as 0.
        """
        zeros = torch.zeros_like(norms.student_max)
        self._small_norms = LogNormalizers(zeros, zeros, None, zeros, zeros, norms.share)
        self._small_bounds = None if bounds is None else bounds._replace(top_column=self._top_place)
        sums = self._small_kernels.sums(
            self._small_spec, self._log_q_CM, self._chunk[1], self._small_norms, self._small_bounds
        ).unsqueeze(0)
        if is_pair is None:
            return sums, None
        token, place, column = self._here
        self._tile_CVs = torch.full_like(student_CVs, _ABSENT)
        self._tile_CVs[token, column] = self._chunk[1][token, place] * self.spec.temperature
        pairs = SpanPairs(is_pair, is_kept=False)
        local = span_sums(self.spec, self.kernels, student_CVs, self._tile_CVs, self._span_norms(norms), pairs)
        return sums, all_gather_rows(local, self.shard.group).sum(0)

    def is_in_place(self, device: torch.device) -> bool:
        """Never: the student's tile is read again after the first pass."""
        return False

    def gradient(
        self,
        student_CVs: Tensor,
        norms: LogNormalizers,
        bounds: MaskBounds | None,
        weights: GradientWeights,
        out_CVs: Tensor,
        of_label: Tensor | None = None,
    ) -> None:
        """Writes the derivative by the student's logits; ``of_label`` [C] is what terms of the labels take off them.

        The derivative by the rest's logit is spread over its classes by their shares of the rest.
        """
        small_CM = torch.empty_like(self._log_q_CM)
        of_token = GradientWeights(weights.student, weights.teacher, weights.bucket_coef, weights.log_norm)
        self._small_kernels.gradient(
            self._small_spec, self._log_q_CM, self._chunk[1], self._small_norms, self._small_bounds, of_token, small_CM
        )
        if of_label is not None:
            assert self._label_place is not None
            small_CM.scatter_add_(-1, self._label_place, -of_label.unsqueeze(-1))
        if student_CVs.shape[1] == 0:
            return
        spread = GradientWeights(small_CM[:, -1].contiguous(), untempered=weights.untempered)
        spec = replace(self.spec, is_clipped=False, formula=None)
        self.kernels.gradient(spec, student_CVs, None, self._rest, None, spread, out_CVs)
        token, place, column = self._here
        listed = small_CM[token, place]
        if weights.untempered is not None:
            assert norms.untempered_log is not None
            log_q = (student_CVs[token, column] - norms.student_max[token]) - norms.untempered_log[token]
            listed = listed + weights.untempered[token] * log_q.exp()
        out_CVs[token, column] = listed.to(out_CVs.dtype)
        if weights.span_pair is not None:
            self.kernels.add_span(self.spec, student_CVs, self._tile_CVs, self._span_norms(norms), weights, out_CVs)
        add_labels(weights, out_CVs)

    def _merge(self, rest: Tensor, listed_CL: Tensor) -> TokenStatistics:
        """Statistics from the shards' rests [R, C, .] and the student's logits of the listed classes."""
        temperature, dtype = self.spec.temperature, self.dtype
        ids_CL, log_p_CM = self._chunk
        rest_max, rest_sum, target = rest[..., 0], rest[..., 1], rest[..., 2]
        largest = rest_max.amax(0)
        has_rest = largest > -torch.inf
        base = torch.where(has_rest, largest, 0.0)
        student_max = torch.maximum(largest, listed_CL.amax(-1))

        def log_sums(total: Tensor, tau: float) -> tuple[Tensor, Tensor]:
            """Of the rest relative to ``base``, of everything relative to ``student_max``."""
            log_rest = log_total(rest_max, total, base, tau)
            gaps = (listed_CL - student_max.unsqueeze(-1)) / tau
            return log_rest, torch.logaddexp(log_rest + (base - student_max) / tau, gaps.logsumexp(-1))

        rest_log, student_log = log_sums(rest_sum, temperature)
        untempered_log = log_sums(rest[..., 3], 1.0)[1] if self.spec.has_untempered else student_log
        if temperature != 1.0 and not self.spec.has_untempered:
            label_nats = torch.zeros_like(untempered_log)  # no cross-entropy is wanted
        else:
            label_nats = untempered_log + (student_max - target.sum(0))
        gaps = torch.cat([listed_CL, base.unsqueeze(-1)], -1) - student_max.unsqueeze(-1)
        log_q = gaps / temperature - student_log.unsqueeze(-1)
        log_q[:, -1] += rest_log
        self._log_q_CM = log_q.to(dtype).clamp_min(_ABSENT)
        label_logs = None
        if self._label_place is not None:
            log_p, log_q = (logs.gather(-1, self._label_place).squeeze(-1) for logs in (log_p_CM, self._log_q_CM))
            label_logs = log_p.double(), log_q.double()
        # Without a rest, its factor is 0 and its base any number.
        rest_log = torch.where(has_rest, rest_log, 0.0)
        self._rest = LogNormalizers(
            base.to(dtype), rest_log.to(dtype), (untempered_log + (student_max - base)).to(dtype)
        )
        return TokenStatistics(
            LogNormalizers(student_max.to(dtype), student_log.to(dtype), untempered_log.to(dtype)),
            label_nats,
            *self._top(ids_CL, log_p_CM),
            label_logs,
        )

    def _top(self, ids_CL: Tensor, log_p_CM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Top class, top log-probabilities and the log of the probability of all others."""
        log_p_CL = log_p_CM[:, :-1]
        is_best = log_p_CL == log_p_CL.amax(-1, keepdim=True)
        top1 = torch.where(is_best, ids_CL, self.shard.total).amin(-1)
        self._top_place = (ids_CL == top1.unsqueeze(-1)).to(torch.int32).argmax(-1)
        ordered = log_p_CL.sort(-1, descending=True)[0]
        tail = torch.cat([ordered[:, self.top_k :], log_p_CM[:, -1:]], -1).double().logsumexp(-1)
        log_tail = torch.where(tail <= 0.5 * _ABSENT, -torch.inf, tail)
        return top1.clamp_max(self.shard.total - 1), ordered[:, : self.top_k], log_tail.to(self.dtype)

    def _span_norms(self, norms: LogNormalizers) -> LogNormalizers:
        zeros = torch.zeros_like(norms.student_max)
        return LogNormalizers(norms.student_max, norms.student_log, None, zeros, zeros)


def _places(ids_CL: Tensor, labels: Tensor) -> Tensor:
    """Each label's place [C, 1] in the list; one that is not listed is one of the rest, the last column."""
    is_label = ids_CL == labels.unsqueeze(-1)
    place = is_label.to(torch.int32).argmax(-1, keepdim=True)
    return torch.where(is_label.any(-1, keepdim=True), place, ids_CL.shape[1])


def _check_distributions(ids: Tensor, log_probs: Tensor, config: LossConfig, num_classes: int) -> None:
    """Raises DataError where tokens that count have no distribution over classes of the vocabulary."""
    if not 0 <= int(ids.min()) <= int(ids.max()) < num_classes:
        raise DataError(f"teacher.ids holds a class outside 0 to {num_classes - 1}")
    ordered = ids.sort(-1)[0]
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise DataError("teacher.ids holds a class twice at one position")
    total = log_probs.double().exp().sum(-1)
    if not bool((total - 1.0).abs().max() < _MAX_EXCESS):  # NaN is not below it either
        worst = float(total[(total - 1.0).abs().argmax()])
        raise DataError(
            f"probabilities of teacher.log_probs and teacher.log_tail add up to {worst:.4g} at one position, not to 1: "
            "both are natural logarithms, the tail that of the sum of all other classes"
        )
    possible = log_probs if ids.shape[1] < num_classes else log_probs[:, :-1]
    infinite = f"loss.divergence={config.divergence}" if divergence_of(config).needs_support(config) else ""
    if config.compares_written and config.span_relation == "log":
        infinite = infinite or "loss.span_relation=log"
    if config.policy > 0:
        infinite = infinite or "loss.policy"
    if infinite and bool(torch.isneginf(possible).any()):
        raise DataError(
            f"{infinite} is infinite where the teacher excludes classes: teacher.log_tail or teacher.log_probs is -inf"
        )
