"""What the argument parsers of all verbs share."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megadistill.config.aliases import other_name
from megadistill.config.data import DataSection
from megadistill.config.fields import walk
from megadistill.config.load import flatten, load_config, unknown_key
from megadistill.config.schema import RunConfig
from megadistill.config.section import PositiveInt, Section, describe
from megadistill.config.shipped import find_config
from megadistill.errors import ConfigError
from megadistill.files import did_you_mean
from megadistill.observability.redact import holds_url_credentials


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError, which becomes one line like every other error."""

    def __init__(self, verb: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=f"megadistill {verb}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._has_settings = False

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")

    def add_config(self, *, required: bool = True) -> None:
        """Adds ``--config FILE`` and ``section.field=value`` overrides."""
        self.add_argument("--config", required=required, metavar="FILE", help="YAML file of the run")
        self.add_settings("settings that win over the file; docs/configuration.md has all of them")
        # The deepspeed launcher adds it; the rank is taken from the environment.
        self.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)

    def add_settings(self, help_text: str) -> None:
        """Adds ``section.field=value`` overrides, as ``overrides``."""
        self.add_argument("overrides", nargs="*", metavar="section.field=value", help=help_text)
        self._has_settings = True

    def add_section(self, section: type[Section]) -> None:
        """An option for each key of a section of the configuration: ``--top-k`` for ``top_k``."""
        for name, field in section.model_fields.items():
            kind: Any = Annotated.__class_getitem__((field.annotation, *field.metadata))  # type: ignore[attr-defined]
            help_text = f"{(field.description or '').rstrip('.')}; default: {field.default}"
            self.add_argument(
                f"--{name.replace('_', '-')}", type=value_of(kind), default=field.default, metavar="N", help=help_text
            )

    def add_template(self) -> None:
        """Adds ``--template``, ``--chat-template`` and ``--chat-template-kwargs``."""
        templates = get_args(DataSection.model_fields["template"].annotation)
        self.add_argument(
            "--template", choices=templates, default="auto",
            help="how a row becomes a prompt; chat: the tokenizer's own chat template; default: auto, which is chat "
            "for chats, else alpaca",
        )  # fmt: skip
        self.add_argument("--chat-template", metavar="FILE", help="chat template in place of the tokenizer's own")
        self.add_argument(
            "--chat-template-kwargs", type=json_object, default={}, metavar="JSON",
            help="variables for the chat template, such as '{\"enable_thinking\": false}'",
        )  # fmt: skip

    def add_fields(self, parts: Sequence[str] = ("instruction", "input", "output")) -> None:
        """Adds the names of the columns."""
        for part in parts:
            self.add_argument(
                f"--{part}-field", default=part, metavar="NAME", help=f"column with the {part}; default: {part}"
            )

    def add_new_folder(self) -> None:
        """Adds the argument FOLDER, where a verb writes."""
        self.add_argument("folder", metavar="FOLDER", help="where to write; must not exist or be empty")

    def add_layout(self, default_dp_size: int | None = None) -> None:
        """Adds ``--tp-size`` and ``--dp-size``, which is required where it has no default."""
        number, has_default = value_of(PositiveInt), default_dp_size is not None
        self.add_argument("--tp-size", type=number, required=True, metavar="N", help="tensor-parallel processes")
        self.add_argument(
            "--dp-size", type=number, required=not has_default, default=default_dp_size, metavar="M",
            help="data-parallel processes" + (f"; default: {default_dp_size}" if has_default else ""),
        )  # fmt: skip

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses options and positional arguments in any order.

        Raises:
            ConfigError: An unknown option; where the verb has settings, with the one that it is.
        """
        options = self._option_string_actions
        for word, following in zip(arguments, [*arguments[1:], "VALUE"], strict=False):
            option, _, value = word.partition("=")
            if word == "--":
                break
            if word.startswith("--") and option not in options:
                self._refuse(option, value or following)
        return self.parse_intermixed_args(list(arguments))

    def _refuse(self, option: str, value: str) -> NoReturn:
        key, near = option.lstrip("-"), did_you_mean(option, self._option_string_actions)
        if self._has_settings and key in dict(walk()):
            raise ConfigError(f"{self.prog}: {option} is a setting; write {key}={value}")
        if self._has_settings and (not near or other_name(key) is not None):
            raise ConfigError(f"{self.prog}: settings are written section.field=value; {unknown_key(option)}")
        self.error(f"unrecognized arguments: {option}{near}")


def value_of(kind: Any) -> Callable[[str], Any]:
    """A converter for argparse that accepts what the configuration accepts for ``kind``, such as PositiveInt."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))

    def convert(text: str) -> Any:
        try:
            return adapter.validate_strings(text)
        except ValidationError:
            raise argparse.ArgumentTypeError(f"{text} is not {describe(kind)}") from None

    return convert


def json_object(text: str) -> dict[str, Any]:
    """Converts a JSON object, for argparse."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is not a JSON object")
    return value


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def size(text: str) -> int:
    """Converts a size such as 500MB or 2GiB to bytes, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if not match or match[2].lower() not in units or not 0 < float(match[1]) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a size; allowed: a number with {', '.join(list(_UNITS)[1:])}")
    return max(1, int(float(match[1]) * units[match[2].lower()]))


def named_paths(values: Sequence[str]) -> dict[str, str]:
    """Values of the form [NAME=]PATH by name, by default the path's last part. Raises ConfigError for equal names."""
    named: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or Path(value).exists():
            name, path = Path(value).name, value
        if name in named:
            raise ConfigError(f"two arguments have the name '{name}' ({named[name]}, {path}); write NAME=PATH")
        named[name] = path
    return named


def refuse_unwritable(path: str | Path, *, is_file: bool) -> None:
    """Raises ConfigError for a path that cannot be written, before any work is done for it."""
    target = Path(path)
    if target.exists() and target.is_dir() == is_file:
        raise ConfigError(f"{target} is a {'folder; a file' if is_file else 'file; a folder'} is needed")
    above = target if target.exists() else target.absolute().parent
    while not above.exists():
        above = above.parent
    if not target.exists() and not above.is_dir():
        raise ConfigError(f"{target}: {above} is not a folder")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"{target}: no permission to write in {above}")


def config_of(parsed: argparse.Namespace) -> RunConfig:
    """The run configuration that the arguments name.

    Raises:
        ConfigError: As ``load_config``; or a setting holds a password, which resolved.yaml would repeat.
    """
    config = load_config(find_config(parsed.config), parsed.overrides)
    for key, value in flatten(config.model_dump()).items():
        if holds_url_credentials(str(value)):
            raise ConfigError(
                f"{key} is a URL with a user or password, which would be written to files; leave them out"
            )
    return config


def ask_hub_only_if_there(paths: Iterable[str | None]) -> None:
    """Makes a path that is not local fail at once, instead of after retries, where the hub cannot be reached."""
    if any(path is not None and not Path(path).exists() for path in paths):
        from megadistill.data.hub import offline_if_unreachable

        offline_if_unreachable()
