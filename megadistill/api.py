"""What ``import megadistill`` offers to notebooks and scripts: a whole run, and a model that writes text.

Both work in one process and in those of a launcher, where every rank makes the same calls.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megadistill.config.sampling import SamplingOptions
from megadistill.config.schema import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megadistill.decoding.decoder import PlanDecoder
    from megadistill.decoding.hf_decoder import HFDecoder
    from megadistill.parallel.context import ParallelContext

# A chat: messages with role and content.
Chat = Sequence[Mapping[str, Any]]


def distill(config: RunConfig | str | os.PathLike[str], *overrides: str) -> dict[str, Any]:
    """Does what ``megadistill train`` does: carries out a run, or resumes it (collective over the launcher's ranks).

    Ctrl-C, SIGTERM, and the like stop it after its step, with a checkpoint.

    Args:
        config: A configuration file, ``configs/NAME.yaml`` for a shipped one, or what ``load_config`` made of one.
        overrides: ``section.field=value`` settings that win over the file.

    Returns:
        What RUN/summary.json holds: steps, seconds, last metrics, validation. ``{"stopped": signal, "step": number}``
        for a run that was asked to stop.

    Raises:
        ConfigError: A setting is wrong; or overrides beside a configuration that has been loaded already.
        MegadistillError: Another mistake of the user, in one line, as on the command line.
        ValueError: Not in the main thread, which alone can be told of signals.
    """
    from megadistill.cli.train import train_run
    from megadistill.config.load import load_config
    from megadistill.config.shipped import find_config
    from megadistill.errors import ConfigError
    from megadistill.launch.stopping import stop_requests

    with stop_requests() as request:
        if isinstance(config, RunConfig):
            if overrides:
                raise ConfigError("settings beside a configuration that is loaded already; give them to load_config")
        else:
            config = load_config(find_config(os.fspath(config)), overrides)
        request.grace_s = config.train.stop_grace_s
        summary = train_run(config, request)
    if summary:
        return summary
    return dict(json.loads((Path(config.run.dir) / "summary.json").read_text(encoding="utf-8")))  # was done before


class OpenModel:
    """A model that writes text; made by ``open_model``.

    Attributes:
        decoder: Writes and reads tokens (``decoding/protocols.py``).
        tokenizer: The tokenizer.
        eos_ids: Tokens that end a text.
        context: The grid of processes.
    """

    def __init__(
        self,
        decoder: PlanDecoder | HFDecoder,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: frozenset[int],
        context: ParallelContext,
    ) -> None:
        self.decoder, self.tokenizer, self.eos_ids, self.context = decoder, tokenizer, eos_ids, context

    def answer(
        self,
        prompts: Sequence[str | Chat],
        *,
        template: str = "auto",
        max_prompt_tokens: int = 256,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        seed: int = 0,
        options: SamplingOptions | None = None,
        batch_size: int = 16,
    ) -> list[str]:
        """Answers prompts, which data-parallel ranks share (collective over the world).

        An answer depends on the model, the prompt, its place in the list, and the seed; not on the layout.

        Args:
            prompts: Instructions, or chats: lists of messages with ``role`` and ``content``.
            template: "alpaca", "plain", "chat", or "auto": chat where one of the prompts is a chat, else alpaca.
            max_prompt_tokens: A longer prompt is an error.
            max_new_tokens: Longest answer, in tokens.
            temperature: 0: greedy.
            seed: Of sampled answers.
            options: Which tokens may be drawn; None: all.
            batch_size: Prompts that a data-parallel rank writes answers to at a time.

        Returns:
            One text per prompt, in order, on every rank.

        Raises:
            ConfigError: The template does not fit the tokenizer.
            DataError: A prompt is too long, or is no chat.
            DivergenceError: Logits are not finite.
        """
        from megadistill.data.chats import chat_of
        from megadistill.data.dataset import Example
        from megadistill.data.encode import tokenize_examples
        from megadistill.data.prompts import PromptSettings
        from megadistill.data.readers import BadRow
        from megadistill.errors import DataError
        from megadistill.evaluation.answers import AnswerSettings, write_answers

        examples = []
        for number, prompt in enumerate(prompts):
            where = f"prompts[{number}]"
            try:
                chat = None if isinstance(prompt, str) else chat_of(list(prompt), where)
            except BadRow as error:
                raise DataError(str(error)) from None
            text = prompt if isinstance(prompt, str) else ""
            examples.append(Example(number, text if chat is None else chat.last_user_text, "", (), where, chat))
        most = max_prompt_tokens + max_new_tokens
        done = tokenize_examples(
            examples, self.tokenizer,
            PromptSettings(template, max_prompt_tokens=max_prompt_tokens, max_tokens=most, long_prompt="error"),
        )  # fmt: skip
        ends, drawn = self.eos_ids | {done.end_id}, options or SamplingOptions()
        settings = AnswerSettings(self.tokenizer, ends, max_new_tokens, most, temperature, drawn, batch_size)
        return write_answers(self.decoder, done.rows, seed, settings, self.context)


@contextmanager
def open_model(
    path: str, *, dtype: str = "fp32", tp_size: int | Literal["auto"] = "auto", tokenizer: str | None = None
) -> Iterator[OpenModel]:
    """A model with its tokenizer, partitioned over the ranks of the launcher (collective over the world).

    Args:
        path: A model folder, hub name, checkpoint or run directory.
        dtype: "fp32" or "bf16".
        tp_size: Tensor-parallel ranks; the others share the prompts. "auto": the most that the heads allow.
        tokenizer: Where the tokenizer is; default: beside the model.

    Raises:
        ConfigError: The model cannot be loaded.
        TopologyError: The tensor-parallel size does not fit.
    """
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.config.parallel import ParallelSection
    from megadistill.data.tokenize import load_tokenizer, vocabulary_size
    from megadistill.engines import inference
    from megadistill.evaluation.processes import inference_context
    from megadistill.models.end_tokens import end_tokens

    folder = model_folder(path)
    loaded = load_tokenizer(model_folder(tokenizer or folder))
    size = vocabulary_size(loaded)
    with inference_context(ParallelSection(tp_size=tp_size), {path: folder}) as context:
        ends = context.run_on_rank0(lambda: end_tokens(folder, loaded, vocab_size=size, asked=None, more=frozenset()))
        with inference.open_model(folder, context, vocab_size=size, dtype=dtype, where=path) as decoder:
            yield OpenModel(decoder, loaded, ends, context)
