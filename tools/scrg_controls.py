#!/usr/bin/env python3
"""Trains with a control in place of SCRG's rule: what correcting helps beyond it, if it does.

usage: python tools/scrg_controls.py random --config configs/demo.yaml
       python tools/scrg_controls.py resample --config configs/demo.yaml run.dir=runs/resample

random: the teacher's token goes in at a disagreement drawn at random, not where the KL is the largest.
resample: the student writes anew from the position of the largest KL on, without the teacher's token. (A response
whose first token has the largest KL stays as it is: what is kept must have a last token to continue from.)

Everything after the control is that of megadistill train. In several processes: mpirun or torchrun with this file.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megadistill.cli.main import main as megadistill
from megadistill.data.sample import NO_ERROR, TokenIds
from megadistill.decoding.rollout import Correction
from megadistill.generation.scoring import TeacherScores, padded_tokens
from megadistill.generation.scrg import ErrorRule, error_positions
from megadistill.generation.sources.base import SourceInputs
from megadistill.parallel.rng import uniform
from megadistill.training import setup

Control = Callable[[Sequence[TokenIds], TeacherScores, ErrorRule], list[Correction]]


def random_disagreement(responses: Sequence[TokenIds], scores: TeacherScores, rule: ErrorRule) -> list[Correction]:
    """The teacher's token at a disagreement drawn by the text itself, so alike on every layout."""
    tokens = padded_tokens(responses, scores.mask)
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    ids = (tokens * (columns + 1) * 2_654_435_761).sum(1, keepdim=True).expand(tokens.shape)
    numbers = uniform(0, ids.flatten(), columns.flatten()).view(tokens.shape)
    positions = error_positions(scores._replace(kl_map=numbers), tokens, ErrorRule()).tolist()
    return [
        Correction(i, position, int(scores.teacher_tokens[i, position]))
        for i, position in enumerate(positions)
        if position != NO_ERROR
    ]


def resample(responses: Sequence[TokenIds], scores: TeacherScores, rule: ErrorRule) -> list[Correction]:
    """The student's own token before the rule's position, from which it continues."""
    positions = error_positions(scores, padded_tokens(responses, scores.mask), rule).tolist()
    return [Correction(i, at - 1, responses[i][at - 1]) for i, at in enumerate(positions) if at > 0]


CONTROLS: dict[str, Control] = {"random": random_disagreement, "resample": resample}


def main(arguments: Sequence[str]) -> int:
    """Trains with the control; returns the exit code."""
    control, *rest = arguments or ["--help"]
    if control in ("-h", "--help"):
        print(__doc__)
        return 0
    if control not in CONTROLS:
        print(f"scrg_controls.py: unknown control '{control}'; allowed: {', '.join(CONTROLS)}", file=sys.stderr)
        return 2
    inputs = functools.partial(SourceInputs, find_corrections=CONTROLS[control])
    with mock.patch.object(setup, "SourceInputs", inputs):
        return megadistill(["train", *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
