"""The whole objective in one pass over chunks of tokens: L = w_sft L_SFT + w_dac L_DAC-KL + ...

Paper: section 3 and Eq. 6-10; docs/method.md decides what it leaves open. A chunk takes three matrix products of the
student and one of the teacher: nothing is recomputed, and no tensor is as large as the logits of all tokens. The
kernels of ``backends.py`` do the work between the products.
Suffixes: T tokens of the call, C tokens of one chunk (a halo token of the previous chunk included), Vs this rank's
classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megadistill.config.loss import LossConfig
from megadistill.losses.backends import make_kernels
from megadistill.losses.call import Call
from megadistill.losses.clipping import ClipTerms, MergedClip
from megadistill.losses.dense_teacher import DenseTeacher
from megadistill.losses.fused import (
    Normalizer,
    StudentGradients,
    bias_shifts,
    chunk_size,
    chunks,
    inverse_count,
    keep_for_backward,
    needs_gradient,
    scaled_gradients,
    valid_positions,
    weights_of,
)
from megadistill.losses.gate_objective import LookAhead, gate_gradients
from megadistill.losses.head import Head, LogitsProjector, loss_dtype
from megadistill.losses.mask import Mask, find_mask
from megadistill.losses.output import PER_PAIR, SCALAR_NAMES, TERMS, DistillOutput
from megadistill.losses.policy import PolicyTerm
from megadistill.losses.quantile_gate import learning_parameters
from megadistill.losses.span import WrittenSpans, span_value
from megadistill.losses.statistics import TokenStatistics
from megadistill.losses.tiles import DivergenceSum, EdgeNodes, GradientWeights, MaskBounds, SpanSum, TileSpec
from megadistill.losses.topk_teacher import TeacherTopK, TopKTeacher
from megadistill.parallel.output_head import LogitMap, OutputHead
from megadistill.parallel.vocab import VocabShard

_FEW_CLASSES = 1.5  # below, the mask leaves the top class alone


def distill_loss(
    student: Head,
    teacher: Head | TeacherTopK,
    labels: Tensor,
    pair_mask: Tensor,
    gate: nn.Module | None,
    config: LossConfig,
    shard: VocabShard,
    *,
    num_tokens: Normalizer,
    num_pairs: Normalizer,
    token_weights: Tensor | None = None,
    rows: Tensor | None = None,
    teacher_share: float = 0.0,
    skews: Tensor | None = None,
    ahead: OutputHead | None = None,
    interpolation: float = 1.0,
    temperatures: Tensor | None = None,
) -> DistillOutput:
    """Weighted sum of the terms, differentiable in the student's head and the gate.

    Gradients are computed here and scaled by ``loss.backward()``, which works once. The gate's gradients follow
    ``config.gate_objective`` and include the coverage penalty, which is not part of the value; they are the same on
    every tensor-parallel rank. The teacher gets none.

    Communicates over ``shard.group``: two all-gathers per chunk (at most 8 + K and 17 floats per token; with a
    ``TeacherTopK`` of L classes 4 + L and, for the span term, 2; one more with the policy term; all this twice where
    the gate looks ahead), with a mask one more for each round of the search for its thresholds (7 or 14 floats), and
    one all-reduce of the hidden gradient; per call one more all-reduce of a number for each head with a bias, and one
    with chunk_tokens="auto". Their number follows from ``labels``, ``config`` and which heads have a bias.

    Args:
        student: Hidden states [T, H] and head shard.
        teacher: The same, or its top classes.
        labels: [T] int64; all terms ignore a token with label -100, whatever it contains.
        pair_mask: [T] bool: positions t and t + 1, neither ignored, are one span pair. A span is a longest run of them.
        gate: Needed where ``config.uses_gate``; called with (sorted_log_probs [C, K], log_tail [C]).
        config: The three terms and their options.
        shard: This rank's slice of the vocabulary.
        num_tokens: Global count that divides the sums over tokens. Averaging over data-parallel ranks is the caller's.
        num_pairs: The same of the sum over pairs (``span_relation`` joint and log: spans); for 0 the span term is 0.
        token_weights: [T] factors of the tokens in the sums over tokens; None: 1. The span term has none.
        rows: [T] int64, not falling: the row of each token, for ``policy_reward`` return; None: all are one row.
        teacher_share: The teacher's share in what the labels were drawn from, for the policy term.
        skews: [T] each token's own ``config.skew``, for a skewed divergence.
        ahead: The student's head after the virtual step (``virtual_step``), for ``config.gate_objective`` student.
        interpolation: t, the teacher is softmax((1 - t) student's logits + t teacher's) without a gradient (TAID).
        temperatures: [T] in place of ``config.temperature`` (AdaKD), for a token loss without a mask that is alone.

    Raises:
        ConfigError: The gate, ``ahead``, the backend, or settings do not fit.
        ValueError: Shapes do not fit.
        DataError: A label is not a class.
    """
    call = Call(
        teacher, labels, pair_mask, gate, config, shard, num_tokens, num_pairs, token_weights, rows, teacher_share,
        skews, ahead, interpolation, temperatures,
    )  # fmt: skip
    call.check(student)
    return _distilled(student, call)


def _distilled(student: Head, call: Call) -> DistillOutput:
    gate, config = call.gate, call.config
    parameters = learning_parameters(gate, config, looks_ahead=call.ahead is not None)
    needs = needs_gradient(student, torch.is_grad_enabled())
    loss, kl_map, teacher_top1, *scalars = _Distill.apply(
        call, needs, student.logit_map, student.hidden, student.weight, student.bias, *parameters
    )
    named = dict(zip(SCALAR_NAMES, scalars, strict=True))
    return DistillOutput(loss=loss, kl_map=kl_map, teacher_top1=teacher_top1, **named)


@dataclass(frozen=True)
class _TokenTerms:
    """Per token [C]: KL(p || q), the token loss, the sum of its slopes (divergences) and the mask's terms."""

    kl: Tensor
    value: Tensor
    slope: Tensor | None
    clip: ClipTerms | None


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, needs: tuple[bool, bool, bool], logit_map: LogitMap, *tensors: Any
    ) -> tuple[Tensor, ...]:
        hidden, weight, bias, *parameters = tensors
        head = Head(hidden, weight, bias, logit_map)
        with torch.autocast(hidden.device.type, enabled=False):
            fused = _FusedPass(call, head, needs, parameters)
            for chunk, num_halo in fused.chunks:
                fused.step(chunk, num_halo)
            fused.gradients.reduce(call.shard.group)
        keep_for_backward(ctx, head, fused.positions, fused.gradients, fused.gate_gradients)
        loss, *reported = fused.outputs()
        ctx.mark_non_differentiable(*reported)
        return loss, *reported

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *scaled_gradients(ctx, upstream)


class _FusedPass:
    """State of one call: the tokens that count, running totals and running gradients."""

    def __init__(self, call: Call, head: Head, needs: tuple[bool, bool, bool], parameters: list[Tensor]) -> None:
        self.call, self.shard, self.parameters = call, call.shard, parameters
        config = self.config = call.config
        device = self.device = head.hidden.device
        self.dtype = loss_dtype(head, call.teacher)
        # Ignored tokens are removed before any product: they cost nothing, and what they contain cannot leak.
        self.positions = valid_positions(call.labels, call.shard.total)
        self.labels = call.labels[self.positions]
        follows = torch.zeros_like(call.pair_mask[self.positions])
        follows[:-1] = self.positions[1:] == self.positions[:-1] + 1
        self.is_pair = call.pair_mask[self.positions] & follows
        self.token_weights = weights_of(call.token_weights, self.positions, self.dtype)
        self.skews = weights_of(call.skews, self.positions, self.dtype)
        self.inv_num_tokens = inverse_count(call.num_tokens, device)
        self.inv_num_pairs = inverse_count(call.num_pairs, device)
        self.spec = TileSpec.of(config, has_edges=bool(parameters) and config.uses_gate)
        self.kernels = make_kernels(config.backend, call.shard, device)
        self.chunk_size = chunk_size(config.chunk_tokens, call.shard, device)
        heads = [head, call.teacher] if isinstance(call.teacher, Head) else [head]
        looks_ahead = bool(parameters) and config.looks_ahead
        if looks_ahead and call.ahead is not None:
            heads.append(Head.of(head.hidden, call.ahead))
        shifts = bias_shifts(heads, call.shard.group)
        self.temperatures = weights_of(call.temperatures, self.positions, self.dtype)
        # The kernels know one temperature: logits are scaled to it.
        scale = None if self.temperatures is None else config.temperature / self.temperatures
        self.student = LogitsProjector(head, self.positions, self.dtype, shifts[0], scale)
        self.gradients = StudentGradients(self.student, needs)
        self.written = WrittenSpans(self.is_pair, config) if config.compares_written else None
        if self.written is not None:
            self.chunks = self.written.chunks(self.chunk_size)
        else:  # each with a halo token where span pairs may cross the border between two
            self.chunks = list(chunks(len(self.positions), self.chunk_size, halo=int(config.pairs_neighbors)))
        self.policy = PolicyTerm(config, call.rows, call.teacher_share, self.positions) if config.policy > 0 else None
        if self.policy is not None:
            self.chunks.reverse()
        max_tokens = max((chunk.stop - chunk.start for chunk, _ in self.chunks), default=0)
        self.logits_buffer = self.student.new_buffer(max_tokens)
        self.ahead = LookAhead(heads[-1], self.positions, self.dtype, shifts[-1], max_tokens) if looks_ahead else None
        self.teacher: DenseTeacher | TopKTeacher
        if isinstance(call.teacher, Head):
            projector = LogitsProjector(call.teacher, self.positions, self.dtype, shifts[1], scale)
            top_k = config.top_k if config.is_clipped else 0
            self.teacher = DenseTeacher(
                projector, self.spec, self.kernels, call.shard, top_k, max_tokens, config.reads_labels,
                call.interpolation,
            )  # fmt: skip
        else:
            self.teacher = TopKTeacher(
                call.teacher, self.positions, self.dtype, spec=self.spec, kernels=self.kernels, shard=call.shard,
                config=config,
            )  # fmt: skip
        self.gradient_buffer: Tensor | None = None  # the student's tile takes its own derivative
        if self.gradients.is_wanted and not self.teacher.is_in_place(device):
            dtype = self.kernels.gradient_dtype(self.student.hidden_TH.dtype, self.dtype)
            self.gradient_buffer = self.student.new_buffer(max_tokens, dtype)
        self.totals = {name: torch.zeros((), dtype=torch.float64, device=device) for name in SCALAR_NAMES}
        self.kl_map = torch.zeros(len(self.positions), dtype=self.dtype, device=device)
        self.top1 = torch.zeros(len(self.positions), dtype=torch.int64, device=device)
        self.gate_gradients = [torch.zeros_like(parameter) for parameter in parameters]

    def step(self, chunk: slice, num_halo: int) -> None:
        """Adds one chunk to the totals and gradients; halo tokens take part in span pairs only."""
        config, labels = self.config, self.labels[chunk]
        if self.token_weights is None:
            is_own = torch.ones(len(labels), dtype=self.dtype, device=self.device)
        else:
            is_own = self.token_weights[chunk].clone()
        is_own[:num_halo] = 0.0
        bounds = mask = ahead = None
        if self.ahead is not None:  # before the present student, whose statistics the teacher keeps
            ahead_CVs = self.ahead.logits(chunk)
            stats = self.teacher.statistics(chunk, ahead_CVs, labels)
            mask, bounds = self._mask(stats, is_own)
            ahead = MergedClip(self.spec, self.teacher.sums(ahead_CVs, stats.norms, bounds, None)[0])
        student_CVs = self.student.logits(chunk, self.logits_buffer)
        stats = self.teacher.statistics(chunk, student_CVs, labels)
        if self.skews is not None:
            stats = replace(stats, norms=stats.norms._replace(share=self.skews[chunk]))
        if config.is_clipped and mask is None:
            mask, bounds = self._mask(stats, is_own)
        is_pair = self.is_pair[chunk] if config.pairs_neighbors else None
        sums, span_sums = self.teacher.sums(student_CVs, stats.norms, bounds, is_pair)
        terms = self._terms(sums)
        if self.parameters and mask is not None:
            assert terms.clip is not None
            merged, weight = MergedClip(self.spec, sums), is_own * self.inv_num_tokens
            gradients = gate_gradients(config, self.parameters, merged, ahead, terms.clip, mask, weight)
            for total, gradient in zip(self.gate_gradients, gradients, strict=False):  # none: without influence
                if gradient is not None:
                    total += gradient
        tau = config.temperature if self.temperatures is None else self.temperatures[chunk]
        self._add_totals(stats, terms, is_own, tau)
        self.kl_map[chunk.start + num_halo : chunk.stop] = terms.kl[num_halo:].clamp_min(0.0)
        self.top1[chunk] = stats.teacher_top1
        weights = self._weights(terms, labels, is_own, tau)
        if span_sums is not None:
            pair, inner = self._span(span_sums, chunk)
            weights = weights._replace(span_pair=pair, span_inner=inner)
        of_label: Tensor | None = None
        if self.written is not None:
            value, of_label = self.written.term(stats, chunk, self.inv_num_pairs)
            self.totals["span"] += value
        if self.policy is not None:
            assert stats.label_logs is not None
            value, of_policy = self.policy.term(stats.label_logs, chunk, num_halo, is_own, self.inv_num_tokens)
            self.totals["policy"] += value
            of_label = of_policy if of_label is None else of_label + of_policy
        if of_label is not None:
            weights = weights._replace(student=weights.student + of_label, label_column=labels - self.shard.start)
        if not self.gradients.is_wanted:
            return
        gradient_CVs = student_CVs if self.gradient_buffer is None else self.gradient_buffer[: len(labels)]
        self.teacher.gradient(student_CVs, stats.norms, bounds, weights, gradient_CVs, of_label)
        self.gradients.add(chunk, gradient_CVs)

    def outputs(self) -> tuple[Tensor, ...]:
        """The loss, kl_map, teacher_top1 and the scalars in the order of ``SCALAR_NAMES``."""
        config = self.config
        scalars = {
            name: total * (self.inv_num_pairs if name in PER_PAIR else self.inv_num_tokens)
            for name, total in self.totals.items()
        }
        loss = sum((getattr(config, name) * scalars[name] for name in TERMS), torch.zeros_like(self.inv_num_tokens))
        kl_map = torch.zeros(len(self.call.labels), dtype=self.dtype, device=self.device)
        top1 = torch.full_like(self.call.labels, -1)
        kl_map[self.positions], top1[self.positions] = self.kl_map, self.top1
        return loss.to(self.dtype), kl_map, top1, *(scalars[name].to(self.dtype) for name in SCALAR_NAMES)

    def _mask(self, stats: TokenStatistics, is_own: Tensor) -> tuple[Mask, MaskBounds]:
        """Where the mask ends, with the quantiles' graph back to the gate."""

        def masses_at(lower: Tensor, upper: Tensor | None, is_wide: bool) -> Tensor:
            nodes = EdgeNodes(lower.to(self.dtype), None if upper is None else upper.to(self.dtype))
            return self.teacher.edge_masses(stats.norms, stats.teacher_top1, nodes, is_wide)

        with torch.set_grad_enabled(bool(self.parameters)):
            mask = find_mask(self.config, self.call.gate, stats, masses_at, self.shard.total)
        lower = torch.sigmoid(mask.lambda_l.detach())
        self._add("mean_lower", lower, is_own)
        self._add("square_lower", lower.double() ** 2, is_own)
        upper = torch.ones_like(is_own) if mask.lambda_u is None else torch.sigmoid(mask.lambda_u.detach())
        self._add("mean_upper", upper, is_own)
        theta_l, theta_u = (theta.to(self.dtype) for theta in (mask.place.theta_l, mask.place.theta_u))
        return mask, MaskBounds(theta_l, theta_u, top_column=stats.teacher_top1 - self.shard.start)

    def _terms(self, sums: Tensor) -> _TokenTerms:
        """Loss and slope of each token from the shards' sums [R, C, num_sums]."""
        kl = sums[..., DivergenceSum.KL].sum(0)  # the first column of either layout
        if self.spec.is_clipped:
            clip = MergedClip(self.spec, sums).terms()
            return _TokenTerms(kl, clip.value, None, clip)
        if self.spec.formula is None:
            return _TokenTerms(kl, kl, None, None)
        value, slope = sums[..., DivergenceSum.VALUE].sum(0), sums[..., DivergenceSum.SLOPE].sum(0)
        return _TokenTerms(kl, value, slope, None)

    def _weights(self, terms: _TokenTerms, labels: Tensor, is_own: Tensor, tau: float | Tensor) -> GradientWeights:
        """Factors of the parts of the derivative by the untempered logits, the span's left out."""
        config = self.config
        weights = GradientWeights(torch.zeros_like(is_own))
        if config.sft > 0:
            reference = is_own * (config.sft * self.inv_num_tokens)
            name = "untempered" if self.spec.has_untempered else "student"
            weights = weights._replace(label=reference, label_column=labels - self.shard.start, **{name: reference})
        if config.dac_kl == 0:
            return weights
        weight = is_own * (config.dac_kl * tau * self.inv_num_tokens)  # temperature^2, and 1/temperature
        clip = terms.clip
        if clip is None:
            of_slope = weight if terms.slope is None else -weight * terms.slope
            return weights._replace(student=weights.student + of_slope, teacher=weight)
        of_student, of_teacher, of_bucket = clip.weights
        if of_student is not None:
            weights = weights._replace(student=weights.student + weight * of_student)
        if of_bucket is not None:
            weights = weights._replace(bucket_coef=weight * of_bucket, log_norm=clip.log_norm)
        return weights._replace(teacher=weight * of_teacher)

    def _add_totals(self, stats: TokenStatistics, terms: _TokenTerms, is_own: Tensor, tau: float | Tensor) -> None:
        config = self.config
        if config.sft > 0:
            self._add("sft", stats.label_nats, is_own)
        if config.dac_kl > 0:
            self._add("dac_kl", tau**2 * terms.value, is_own)
        if terms.clip is None:
            for name in ("kept_mass", "mean_upper"):
                self.totals[name] += is_own.sum(dtype=torch.float64)
            return
        self._add("kept_mass", terms.clip.kept_mass, is_own)
        self._add("classes", terms.clip.classes, is_own)
        self._add("few_classes", (terms.clip.classes < _FEW_CLASSES).to(is_own.dtype), is_own)

    def _span(self, sums: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        """Adds the chunk's span pairs; returns (weight over root, merged inner product), both [C]."""
        weight = self.is_pair[chunk].to(self.dtype)
        weight[-1] = 0.0  # that pair's second token is in the next chunk, which sees it through its halo
        value, root = span_value(sums[:, SpanSum.SQUARE], self.config.span_eps)
        self._add("span", value, weight)
        # Over the temperature: the derivative is by the untempered logits.
        factor = self.config.span * self.inv_num_pairs / self.config.temperature
        return weight / root * factor, sums[:, SpanSum.INNER]

    def _add(self, name: str, value: Tensor, weight: Tensor) -> None:
        self.totals[name] += (value * weight).sum(dtype=torch.float64)
