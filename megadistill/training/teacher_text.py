"""The teacher's own text for mode ``teacher`` (SeqKD): written once before training, kept in a file, read ever after.

The file is JSON lines: the settings that decide the text, then a prompt (checksum of its tokens) and a response a line.
A run that is stopped while writing goes on behind the last whole line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megadistill.checkpoint.manifest import write_atomically
from megadistill.config.schema import RunConfig
from megadistill.data.tokenize import TokenizedExample
from megadistill.decoding.protocols import Rows, Sampling
from megadistill.decoding.rollout import rollout
from megadistill.engines.teacher import PartitionedModel
from megadistill.errors import ConfigError, DataError
from megadistill.generation.policy import STREAM_TEACHER_TEXT
from megadistill.models.fingerprint import model_fingerprint
from megadistill.models.loading import has_weights
from megadistill.observability.lock import exclusive_lock
from megadistill.observability.log import get_logger
from megadistill.observability.progress import progress_bar
from megadistill.parallel.context import ParallelContext

Prompt = tuple[int, ...]
_FORMAT = "megadistill teacher text 1"


def teacher_texts(
    config: RunConfig,
    rows: Sequence[TokenizedExample],
    teacher: PartitionedModel,
    context: ParallelContext,
    *,
    eos_ids: frozenset[int],
    rows_at_once: int,
) -> dict[Prompt, Prompt]:
    """Prompt -> the teacher's response, for every row: from the file, and written to it where they are missing.

    Collective over the world. The teacher's parameters are gathered once. Rank 0 alone touches the file. Raises
    ConfigError on every rank for a file made with other settings, DataError for a damaged one.
    """
    path = Path(config.generation.teacher_cache or Path(config.run.dir) / "teacher_text.jsonl")
    prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
    with ExitStack() as held:

        def begin() -> dict[str, Prompt]:
            with _one_line(path):
                held.enter_context(
                    exclusive_lock(path.with_name(path.name + ".lock"), f"generation.teacher_cache={path}")
                )
                return _open(path, _settings(config, teacher))

        known: dict[str, Prompt] = context.run_on_rank0(begin)
        missing = [prompt for prompt in prompts if _key(prompt) not in known]
        if missing:
            log = get_logger(context.rank)
            log.info(f"the teacher writes {len(missing)} of {len(prompts)} responses to {path}")
            known |= _write_missing(path, config, missing, teacher, context, eos_ids, rows_at_once)
    return {prompt: known[_key(prompt)] for prompt in prompts}


def _write_missing(
    path: Path,
    config: RunConfig,
    prompts: Sequence[Prompt],
    teacher: PartitionedModel,
    context: ParallelContext,
    eos_ids: frozenset[int],
    rows_at_once: int,
) -> dict[str, Prompt]:
    """Writes block by block, each block shared by the data-parallel ranks and kept before the next begins."""
    generation, written = config.generation, {}
    sampling = Sampling(config.run.seed, generation.teacher_temperature)
    block = rows_at_once * context.dp_size
    with (
        teacher.decoder() as writer,
        progress_bar(description="teacher text", total=len(prompts), unit="row", rank=context.rank) as bar,
    ):
        for start in range(0, len(prompts), block):
            part = prompts[start : start + block]
            mine = part[context.dp_rank :: context.dp_size]
            texts: tuple[Prompt, ...] = ()
            if mine:
                # The number of a prompt is its checksum: the text does not depend on what else is written.
                ids = tuple(int(_key(prompt), 16) >> 65 for prompt in mine)
                limits = [min(generation.max_new_tokens, config.data.max_tokens - len(prompt)) for prompt in mine]
                texts = rollout(
                    writer, Rows(ids, tuple(mine), ((),) * len(mine)), limits=limits, eos_ids=eos_ids,
                    sampling=sampling, stream=STREAM_TEACHER_TEXT, max_rows=rows_at_once,
                ).responses  # fmt: skip
            new: dict[str, Prompt] = {}
            for some_prompts, some_texts in context.gather_objects_over_dp((mine, texts)):
                new |= {_key(prompt): text for prompt, text in zip(some_prompts, some_texts, strict=True)}
            written |= new
            context.run_on_rank0(partial(_append, path, new))
            bar.update(len(part))
    return written


def _append(path: Path, texts: Mapping[str, Prompt]) -> None:
    lines = [json.dumps({"prompt": key, "response": list(text)}) for key, text in texts.items()]
    with _one_line(path), path.open("a") as file:
        file.write("\n".join(lines) + "\n")


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """A full disk or a missing permission becomes an error that every rank can raise: rank 0 alone touches the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"generation.teacher_cache={path}: {error.strerror or error}") from None


def _key(prompt: Prompt) -> str:
    return hashlib.blake2b(",".join(map(str, prompt)).encode(), digest_size=16).hexdigest()


def _settings(config: RunConfig, teacher: PartitionedModel) -> dict[str, Any]:
    """The first line of the file: everything that decides the text."""
    generation, path = config.generation, str(config.model.teacher.path)
    is_random = not has_weights(path)
    return {
        "format": _FORMAT,
        "teacher": path,
        "files": model_fingerprint(path),
        "dtype": config.model.teacher.dtype,
        "vocabulary": teacher.shard.total,
        "temperature": generation.teacher_temperature,
        "seed": config.run.seed if is_random or generation.teacher_temperature > 0 else None,
        "max_new_tokens": generation.max_new_tokens,
        "max_tokens": config.data.max_tokens,
    }


def _open(path: Path, settings: dict[str, Any]) -> dict[str, Prompt]:
    """The responses in a file, which is begun where there is none and loses a line that was being written.

    A file that is not ours is never touched.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"generation.teacher_cache={path} is no file")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings) + "\n")
        return {}
    text = path.read_text(errors="replace")
    first, *lines = text.split("\n")
    try:
        saved = json.loads(first)
    except ValueError:
        saved = None
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
        raise ConfigError(f"generation.teacher_cache={path} is no teacher's text of megadistill; choose another file")
    changed = [key for key in settings if saved.get(key) != settings[key]]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"generation.teacher_cache={path} holds the teacher's text of other settings: {key}={saved.get(key)} "
            f"there, {settings[key]} here; choose another file, or remove this one"
        )
    found: dict[str, Prompt] = {}
    try:
        for line in lines[:-1]:
            row = json.loads(line)
            response = tuple(int(token) for token in row["response"])
            if not all(0 <= token < settings["vocabulary"] for token in response):
                raise ValueError("a token outside the vocabulary")
            found[str(row["prompt"])] = response
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it, and the teacher writes it anew") from None
    if lines and lines[-1]:
        write_atomically(path, "\n".join([first, *lines[:-1]]) + "\n")
    return found
