"""``megadistill chat MODEL``: a look at a model by hand."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, NoReturn

from megadistill.cli.generate_options import add_drawing, add_run, run_settings
from megadistill.cli.parsing import Parser, value_of
from megadistill.config.sampling import SamplingOptions
from megadistill.config.section import PositiveInt
from megadistill.errors import ConfigError, DataError, ExitCode
from megadistill.files import did_you_mean
from megadistill.observability.log import printable

if TYPE_CHECKING:
    from megadistill.data.prompts import PromptSettings
    from megadistill.evaluation.conversation import Conversation

_MOST_TOKENS, _MOST_NEW_TOKENS = 4096, 512
_COMMANDS = {"/reset": "forget the turns so far", "/quit": "end (as Ctrl-D does)", "/help": "show these lines"}


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    parsed = _parser().parse(arguments)
    with _conversation(parsed) as conversation:
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        return _at_terminal(conversation) if is_terminal else _from_pipe(conversation)


def _parser() -> Parser:
    parser = Parser(
        "chat",
        "Answers what you type, turn by turn, in the model's template. With a chat template the model reads the turns\n"
        "before; the templates alpaca and plain hold one instruction, so each turn stands alone. A line that ends in\n"
        "a backslash continues in the next one. From a pipe every line is a turn; answers go to standard output, and\n"
        "everything else to standard error. One process.",
        "commands:\n" + "\n".join(f"  {name:<7} {text}" for name, text in _COMMANDS.items()) + "\n"
        "  Ctrl-C  stop an answer\n  Ctrl-D  end\n\n"
        "examples:\n"
        "  megadistill chat runs/demo\n"
        "  megadistill chat Qwen/Qwen2.5-0.5B-Instruct --system 'Answer in one word.' --temperature 0\n"
        "  echo 'Name a river.' | megadistill chat runs/demo",
    )
    number = value_of(PositiveInt)
    parser.add_argument("model", metavar="MODEL", help="model folder, hub name, checkpoint or run directory")
    parser.add_argument("--system", metavar="TEXT", help="system prompt, for chat templates")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the model's own")
    add_run(parser)
    parser.add_template()
    parser.add_argument(
        "--max-new-tokens", type=number, metavar="N", help=f"of an answer; default: the run's, else {_MOST_NEW_TOKENS}"
    )
    parser.add_argument(
        "--max-tokens", type=number, metavar="N",
        help="of turns and answer together; the oldest turns are left out over it; default: the run's, else the\n"
        f"model's positions, at most {_MOST_TOKENS}",
    )  # fmt: skip
    add_drawing(parser)
    parser.set_defaults(template=None, chat_template_kwargs=None)
    return parser


@contextmanager
def _conversation(parsed: Namespace) -> Iterator[Conversation]:
    """The model, loaded; what libraries print meanwhile goes to standard error."""
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.config.parallel import ParallelSection
    from megadistill.data.encode import open_template
    from megadistill.data.tokenize import load_tokenizer, vocabulary_size
    from megadistill.engines.inference import open_model
    from megadistill.evaluation.answers import AnswerSettings
    from megadistill.evaluation.conversation import Conversation, conversation_template
    from megadistill.evaluation.processes import inference_context
    from megadistill.models.end_tokens import end_tokens
    from megadistill.models.loading import load_model_config
    from megadistill.models.positions import check_positions

    output = sys.stdout
    with redirect_stdout(sys.stderr):
        folder = model_folder(parsed.model)
        config = load_model_config(folder, "MODEL")
        prompts, max_new_tokens = _limits(parsed, getattr(config, "max_position_embeddings", None))
        check_positions(config, prompts.max_tokens, "--max-tokens", f"MODEL ({folder})")
        tokenizer = load_tokenizer(model_folder(parsed.tokenizer or folder))
        prompts, size = conversation_template(prompts, tokenizer), vocabulary_size(tokenizer)
        more = {open_template(prompts, tokenizer, are_chats=False).end_id}
        answers = AnswerSettings(
            tokenizer, end_tokens(folder, tokenizer, vocab_size=size, asked=None, more=more), max_new_tokens,
            prompts.max_tokens, parsed.temperature, SamplingOptions.of(parsed),
        )  # fmt: skip
        with inference_context(ParallelSection(), {"MODEL": folder}) as context:
            if context.world_size > 1:
                raise ConfigError(f"a conversation needs one process, and this launcher started {context.world_size}")
            with open_model(folder, context, vocab_size=size, dtype=parsed.dtype, where="MODEL") as model:
                made = Conversation(model, prompts, answers, seed=parsed.seed, system=parsed.system)
                _say(
                    f"{parsed.model}: template {prompts.template}, at most {prompts.max_tokens} tokens of turns and "
                    f"answer, {max_new_tokens} of an answer"
                )
                with redirect_stdout(output):
                    yield made


def _limits(parsed: Namespace, positions: int | None) -> tuple[PromptSettings, int]:
    """How turns become prompts, and the most tokens of an answer: options, else the run's, else the model's."""
    from megadistill.data.prompts import PromptSettings

    found = run_settings(parsed)
    if found is None:
        most, new, template, chat_template, variables = positions or _MOST_TOKENS, _MOST_NEW_TOKENS, "auto", None, {}
        most = min(most, _MOST_TOKENS)
    else:
        data, new = found[1].data, found[1].generation.max_new_tokens
        most, template = data.max_tokens, data.template
        chat_template, variables = data.chat_template, data.chat_template_kwargs
    if parsed.template not in (None, template):  # another template does not take the run's variables
        template, chat_template, variables = parsed.template, None, {}
    most = parsed.max_tokens or most
    new = parsed.max_new_tokens or min(new, max(1, most // 2))
    if new >= most:
        raise ConfigError(f"--max-new-tokens {new} leaves no token of --max-tokens {most} for a turn")
    prompts = PromptSettings(
        template=template,
        chat_template=parsed.chat_template or chat_template,
        chat_template_kwargs=variables if parsed.chat_template_kwargs is None else parsed.chat_template_kwargs,
        max_prompt_tokens=most - new,
        max_tokens=most,
        long_prompt="truncate",
    )
    return prompts, new


def _at_terminal(conversation: Conversation) -> int:
    """Turns and commands until the user ends; an answer can be stopped, and what cannot be answered is said."""
    with suppress(ImportError):
        import readline  # noqa: F401  lines can be edited and found again

    _say("/help lists the commands")
    while True:
        try:
            text = _turn(lambda is_first: input("> " if is_first else "  "))
        except KeyboardInterrupt:
            print()
            _say("/quit or Ctrl-D ends")
            continue
        if text is None:
            print()
            return ExitCode.DONE
        if text.startswith("/"):
            if not _obey(text, conversation):
                return ExitCode.DONE
        elif text.strip():
            try:
                _answer(conversation, text, printable)
            except KeyboardInterrupt:
                print()
            except DataError as error:
                _say(printable(str(error)))


def _from_pipe(conversation: Conversation) -> int:
    """A turn per line up to the end of standard input; the first one that cannot be answered ends it."""

    def line(_: bool) -> str:
        found = sys.stdin.readline()
        if not found:
            raise EOFError
        return found.rstrip("\r\n")

    while (text := _turn(line)) is not None:
        if text.startswith("/"):
            if text.strip() not in _COMMANDS:
                _refuse(text)
            if not _obey(text, conversation):
                break
        elif text.strip():
            _answer(conversation, text, str)
    return ExitCode.DONE


def _turn(read: Callable[[bool], str]) -> str | None:
    """The next turn, which may have several lines; None at the end of the input."""
    lines: list[str] = []
    try:
        while True:
            lines.append(read(not lines))
            if not lines[-1].endswith("\\"):
                return "\n".join(lines)
            lines[-1] = lines[-1][:-1]
    except EOFError:
        return "\n".join(lines) if lines else None


def _answer(conversation: Conversation, text: str, shown: Callable[[str], str]) -> None:
    with closing(conversation.answer(text)) as pieces:
        for piece in pieces:
            print(shown(piece), end="", flush=True)
    print(flush=True)
    if conversation.is_shortened:
        _say("(over the limit: the model did not read the oldest turns, or the beginning of the text)")


def _obey(text: str, conversation: Conversation) -> bool:
    """Follows a command; false: the user ends."""
    command = text.strip()
    if command == "/quit":
        return False
    if command == "/reset":
        conversation.reset()
        _say("the turns so far are forgotten")
    elif command == "/help":
        _say("\n".join(f"{name:<7} {what}" for name, what in _COMMANDS.items()))
    else:
        _say(_unknown(command))
    return True


def _refuse(text: str) -> NoReturn:
    raise ConfigError(_unknown(text.strip()))


def _unknown(command: str) -> str:
    return f"unknown command {printable(command)}; allowed: {', '.join(_COMMANDS)}{did_you_mean(command, _COMMANDS)}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
