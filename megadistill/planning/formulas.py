"""One rank's step by closed formulas: at once, for any layout, from the configuration alone."""

from __future__ import annotations

from megadistill.planning.case import Case
from megadistill.planning.memory import peaks, resident
from megadistill.planning.use import PHASES, PhaseUse, StepUse
from megadistill.planning.work import Work, decode_steps, work


def step_use(case: Case) -> StepUse:
    """What rank 0 uses in a step with student text (in the other modes: in any step).

    Args:
        case: The run and the machines.
    """
    memory, done = peaks(case), work(case)
    phases = tuple(_phase(name, memory[name], done[name]) for name in PHASES if name in memory)
    return StepUse(
        source="formulas",
        rank=0,
        world_size=case.world_size,
        tp_size=case.tp_size,
        zero_stage=case.zero_stage,
        resident=resident(case),
        phases=phases,
        decode_steps=decode_steps(case),
        assumptions=assumptions(case),
    )


def _phase(name: str, owners: dict[str, int], done: Work) -> PhaseUse:
    return PhaseUse(name, sum(owners.values()), owners, round(done.flops), round(done.operations), done.traffic)


def assumptions(case: Case) -> tuple[str, ...]:
    """What the formulas take for granted about the text."""
    mode, lines = case.config.generation.mode, []
    lines.append(
        f"every prompt has {case.prompt_tokens} tokens and every response and reference {case.response_tokens}; no "
        "response ends early"
    )
    if case.rounds:
        lines.append("every response is corrected once a round, at places spread evenly over its length")
    scrg = case.config.generation.scrg
    if mode == "skd":
        lines.append("generation.mode=skd: one round is counted; it makes as many as the teacher has objections")
    elif case.rounds and scrg.after != "regenerate":
        lines.append(f"generation.scrg.after={scrg.after}: what the student would write anew is counted")
    if mode == "contrast":
        lines.append("generation.mode=contrast: the teacher's text, a second row of every prompt, is not counted")
    elif case.writes and mode not in ("on_policy", "skd", "teacher_mixed"):
        lines.append(f"generation.mode={mode}: this is a step with student text; steps with other text use less")
    if case.config.loss.adakd.enabled:
        lines.append("the student's reading of all responses before they are trained on (loss.adakd) is not counted")
    lines.append(f"the vocabulary has the {case.models.vocab_size} rows that the models share (no tokenizer is read)")
    return tuple(lines)
