"""The teacher's own text for mode ``teacher`` (SeqKD): written once before training, kept in a file, then only read.

The file is JSON lines: the settings that decide the text, then a prompt (checksum of its tokens) and a response on each
line. A run that is stopped while the teacher writes continues after the last whole line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from megadistill.config.schema import RunConfig
from megadistill.data.hub import split_revision
from megadistill.data.sample import Sample, TokenIds
from megadistill.data.tokenize import response_limit
from megadistill.decoding.nonfinite import logits_error
from megadistill.decoding.protocols import TextModel
from megadistill.decoding.rollout import rollout
from megadistill.decoding.sampling import Sampling
from megadistill.errors import ConfigError, DataError
from megadistill.files import os_errors_as, write_atomically
from megadistill.models.fingerprint import model_fingerprint
from megadistill.models.folder_checks import has_weights
from megadistill.observability.lock import exclusive_lock
from megadistill.observability.log import get_logger
from megadistill.observability.progress import progress_bar
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.rng import Stream

_FORMAT = "megadistill teacher text 1"


def teacher_responses(
    config: RunConfig,
    prompts: Sequence[TokenIds],
    teacher: TextModel,
    folder: str,
    context: ParallelContext,
    *,
    eos_ids: frozenset[int],
    batch_size: int,
    name_of: Callable[[TokenIds], str],
) -> dict[TokenIds, TokenIds]:
    """Prompt -> the teacher's response, from the file; missing ones are written and added to it.

    Collective over the world. The teacher's parameters are gathered once. Rank 0 alone touches the file and broadcasts
    what is in it.

    Args:
        config: Names the file (``generation.teacher_cache``) and what decides the text.
        prompts: All prompts that the run trains on; repeated ones count once.
        teacher: Writes what is missing.
        folder: Where the teacher was loaded from.
        context: The grid of processes.
        eos_ids: Tokens that end a response of the teacher.
        batch_size: Examples that a data-parallel rank writes at a time.
        name_of: What the user calls a prompt, for errors.

    Raises:
        ConfigError: On every rank, for a file made with other settings or one that is not ours.
        DataError: On every rank, for a damaged file.
        DivergenceError: On every rank, where the teacher's logits are not finite; that block is not written.
    """
    path = Path(config.generation.teacher_cache or Path(config.run.dir) / "teacher_text.jsonl")
    prompts = list(dict.fromkeys(prompts))
    with ExitStack() as held:

        def begin() -> dict[str, TokenIds]:
            with _clear_errors(path):
                held.enter_context(
                    exclusive_lock(path.with_name(path.name + ".lock"), f"generation.teacher_cache={path}")
                )
                # Files of a version that knew one end token, the tokenizer's, do not name it.
                is_plain = len(eos_ids) == 1 and config.model.eos_tokens is None
                may_lack = {"commit", "eos_ids"} if is_plain else {"commit"}
                return _open(path, _settings(config, teacher, folder, eos_ids), may_lack)

        known: dict[str, TokenIds] = context.run_on_rank0(begin)
        missing = [prompt for prompt in prompts if _key(prompt) not in known]
        if missing:
            log = get_logger(context.rank, "teacher")
            log.info(f"the teacher writes {len(missing)} of {len(prompts)} responses to {path}")
            known |= _write_missing(path, config, missing, teacher, context, eos_ids, batch_size, name_of)
    return {prompt: known[_key(prompt)] for prompt in prompts}


def _write_missing(
    path: Path,
    config: RunConfig,
    prompts: Sequence[TokenIds],
    teacher: TextModel,
    context: ParallelContext,
    eos_ids: frozenset[int],
    batch_size: int,
    name_of: Callable[[TokenIds], str],
) -> dict[str, TokenIds]:
    """Writes block by block, each block shared by the data-parallel ranks and kept before the next begins."""
    generation = config.generation
    written: dict[str, TokenIds] = {}
    sampling = Sampling(config.run.seed, generation.teacher_temperature)
    block = batch_size * context.dp_size
    with (
        teacher.decoder() as decoder,
        progress_bar(description="teacher text", total=len(prompts), unit="row", rank=context.rank) as bar,
    ):
        for start in range(0, len(prompts), block):
            part = prompts[start : start + block]
            # A prompt's checksum is its sequence id, so its text does not depend on what else is written.
            mine = [Sample(int(_key(prompt), 16) >> 65, prompt) for prompt in part[context.dp_rank :: context.dp_size]]
            limits = [
                response_limit(
                    len(sample.prompt_ids), max_new_tokens=generation.max_new_tokens, max_tokens=config.data.max_tokens
                )
                for sample in mine
            ]
            broken: dict[int, int] = {}
            responses = rollout(
                decoder, mine, limits=limits, eos_ids=eos_ids, sampling=sampling, stream=Stream.TEACHER_TEXT,
                max_examples=batch_size, on_nonfinite=broken.__setitem__,
            )  # fmt: skip
            errors = [logits_error(f"teacher: {name_of(mine[i].prompt_ids)}", at) for i, at in broken.items()]
            context.raise_on_all_ranks(errors[0] if errors else None)
            new = {_key(sample.prompt_ids): text for sample, text in zip(mine, responses, strict=True)}
            new = {key: text for texts in context.gather_objects_over_dp(new) for key, text in texts.items()}
            written |= new
            context.run_on_rank0(partial(_append, path, new))
            bar.update(len(part))
    return written


def _append(path: Path, responses: Mapping[str, TokenIds]) -> None:
    lines = [json.dumps({"prompt": key, "response": list(text)}) for key, text in responses.items()]
    with _clear_errors(path), path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def _clear_errors(path: Path) -> AbstractContextManager[None]:
    """A full disk or a missing permission becomes an error that every rank can raise: rank 0 alone touches the file."""
    return os_errors_as(ConfigError, f"generation.teacher_cache={path}")


def _key(prompt: TokenIds) -> str:
    return hashlib.blake2b(",".join(map(str, prompt)).encode(), digest_size=16).hexdigest()


def _settings(config: RunConfig, teacher: TextModel, folder: str, eos_ids: frozenset[int]) -> dict[str, Any]:
    """The first line of the file: everything that decides the text."""
    generation = config.generation
    is_random = not has_weights(folder)
    return {
        "format": _FORMAT,
        "teacher": config.model.teacher.path,
        "files": model_fingerprint(folder),
        "commit": split_revision(folder)[1],  # a run names the commit of a hub name
        "dtype": config.model.teacher.dtype,
        "vocabulary": teacher.shard.total,
        "temperature": generation.teacher_temperature,
        "seed": config.run.seed if is_random or generation.teacher_temperature > 0 else None,
        "max_new_tokens": generation.max_new_tokens,
        "max_tokens": config.data.max_tokens,
        "eos_ids": sorted(eos_ids),
    }


def _open(path: Path, settings: dict[str, Any], may_lack: Collection[str] = ()) -> dict[str, TokenIds]:
    """The responses in a file, which is begun where there is none and loses a line that was being written.

    A file that is not ours is never touched. ``may_lack``: settings that a file need not have.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"generation.teacher_cache={path} is not a file")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings) + "\n")
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    first, *lines = text.split("\n")
    try:
        saved = json.loads(first)
    except ValueError:
        saved = None
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
        raise ConfigError(f"generation.teacher_cache={path} is not a megadistill teacher cache; choose another file")
    changed = [key for key in settings if saved.get(key) != settings[key] and (key in saved or key not in may_lack)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"generation.teacher_cache={path} holds the teacher's text of other settings: {key}={saved.get(key)} "
            f"there, {settings[key]} here; choose another file, or remove this one"
        )
    responses: dict[str, TokenIds] = {}
    try:
        for line in lines[:-1]:
            row = json.loads(line)
            response = tuple(int(token) for token in row["response"])
            if not all(0 <= token < settings["vocabulary"] for token in response):
                raise ValueError("a token outside the vocabulary")
            responses[str(row["prompt"])] = response
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it, and the teacher writes it again") from None
    if lines and lines[-1]:
        write_atomically(path, "\n".join([first, *lines[:-1]]) + "\n")
    return responses
