"""YAML file + its bases + command-line overrides -> RunConfig, and back to resolved.yaml."""

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from megadistill.config.aliases import other_name
from megadistill.config.deepspeed import moved
from megadistill.config.fields import nearest_key, nearest_sibling, walk
from megadistill.config.schema import RunConfig
from megadistill.config.section import CombinationError, Section, allowed, section_type
from megadistill.config.shipped import find_base, shipped_names
from megadistill.errors import ConfigError, first_line
from megadistill.files import did_you_mean, did_you_mean_path, write_atomically

COMMAND_LINE = "command line"
Tree = dict[str, Any]
# Keys of former releases: the value that is the only one today, and why.
_RETIRED = {
    "loss.quantile": (
        "mass",
        "quantiles are always of the teacher's mass, and cut what they say (docs/method.md, section 2), which the "
        "former ones, read off the loss.top_k largest classes, did not",
    )
}
_RESOLVER = re.compile(r"\$\{[^{}]*:")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, is_record: bool = False) -> RunConfig:
    """Reads a configuration file, the files of its ``base:`` chain, and overrides; the later one wins.

    ``base:`` is relative to the file it stands in, or the name of a shipped file; every other relative path is relative
    to the working directory.
    ``${section.field}`` refers to another key.

    Args:
        path: The YAML file.
        overrides: ``section.field=value`` settings.
        is_record: A run wrote the file, maybe one of an earlier version, whose keys for DeepSpeed are moved.

    Raises:
        ConfigError: In one line: file (or "command line"), key, what is allowed, nearest valid key.
    """
    files = _read_chain(Path(path), ())
    if is_record:
        files = [(source, moved(layer)) for source, layer in files]
    layers = [*files, *(_read_override(text) for text in overrides)]
    sources = {key: source for source, layer in layers for key, _ in _nodes(layer)}
    try:
        merged = OmegaConf.merge(_defaults(RunConfig), *(layer for _, layer in layers))
        tree = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {first_line(error)}") from error
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, tree, sources, str(path))) from error


def dump_resolved(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Writes the whole tree, defaults included, atomically; ``load_config(path)`` gives an equal tree."""
    path = Path(path)
    text = OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
    header = f"# Every setting of this run, defaults included. Repeat it with --config {path.name}\n"
    write_atomically(path, header + text)


def unknown_key(key: str, value: Any = None) -> str:
    """The message about a key that does not exist, with what it is here where it is one of another trainer.

    Args:
        key: The key.
        value: Its value, in which the first key was typed where it is a section.
    """
    is_slip = "." in key and nearest_sibling(key, 0.85) is not None  # optim.beta is optim.betas, not GKD's beta
    if not is_slip and (other := other_name(key, value)) is not None:
        return f"{other[0]}: unknown key; {other[1].hint}"
    nearest = nearest_key(key)
    hint = f"did you mean {nearest}?" if nearest else f"sections are {', '.join(RunConfig.model_fields)}"
    return f"{key}: unknown key; {hint}"


def require(config: RunConfig, key: str, reason: str) -> str:
    """The text under an optional key.

    Args:
        config: The configuration.
        key: The dotted key.
        reason: Completes the message "KEY is missing: ".

    Raises:
        ConfigError: The key is null.
    """
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    if value is None:
        raise ConfigError(f"{key} is missing: {reason}")
    return str(value)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every setting of a dumped configuration."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _defaults(section: type[Section]) -> Tree:
    """Every section with the defaults of its keys: ``${...}`` finds them, and a missing value has its own name."""
    tree: Tree = {}
    for name, field in section.model_fields.items():
        inner = section_type(field)
        if inner is not None:
            tree[name] = _defaults(inner)
        elif not field.is_required():
            tree[name] = list(field.default) if isinstance(field.default, tuple) else field.default
    return tree


def _read_chain(path: Path, above: tuple[Path, ...]) -> list[tuple[str, Tree]]:
    """The layers of ``path``, its base first."""
    if path.resolve() in above:
        raise ConfigError(f"{above[-1]}: base: {path} is circular: that file is being read already")
    try:
        layer = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError as error:
        where, hint = (f"{above[-1]}: base: ", did_you_mean(path.name, shipped_names())) if above else ("", "")
        raise ConfigError(f"{where}{path}: no such file{hint or did_you_mean_path(path, _is_yaml)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {first_line(error)}") from error
    except (YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}") from error
    if not isinstance(layer, dict):
        raise ConfigError(f"{path}: must hold sections ({', '.join(RunConfig.model_fields)}), not a list")
    base = layer.pop("base", None)
    checked = str(path), _checked(str(path), layer)
    if base is None:
        return [checked]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: must be the path of one YAML file, not {base!r}")
    return [*_read_chain(find_base(base, path.parent), (*above, path.resolve())), checked]


def _read_override(text: str) -> tuple[str, Tree]:
    key, sign, _ = text.partition("=")
    if not sign:
        setting = f"{key}=VALUE" if key in dict(walk()) else "section.field=value"
        raise ConfigError(f"{COMMAND_LINE}: {text!r} is not a setting; write {setting}")
    if not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ConfigError(f"{COMMAND_LINE}: {unknown_key(key)}")
    try:
        layer = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{COMMAND_LINE}: {text!r} cannot be read as YAML: {first_line(error)}") from error
    assert isinstance(layer, dict)
    return COMMAND_LINE, _checked(COMMAND_LINE, layer)


def _checked(source: str, layer: dict[Any, Any]) -> Tree:
    """Drops empty sections, and refuses what the merge would hide: unknown keys, values in place of sections."""
    fields = dict(walk())
    for key, value in list(_nodes(layer)):
        if key in _RETIRED:
            _retire(source, layer, key, value)
            continue
        field = fields.get(key)
        if field is None:
            raise ConfigError(f"{source}: {unknown_key(key, value)}")
        if section_type(field) is not None and value is not None and not isinstance(value, dict):
            names = ", ".join(name for name in fields if name.startswith(key + "."))
            raise ConfigError(f"{source}: {key}={_show(value)}: is a section; its keys are {names}")
        if isinstance(value, str) and _RESOLVER.search(value):
            raise ConfigError(
                f"{source}: {key}={_show(value)}: only ${{section.field}} works; environment variables are not read"
            )
        if get_origin(field.annotation) is tuple and not isinstance(value, list) and "${" not in str(value):
            raise ConfigError(f"{source}: {key}={_show(value)}: must be {allowed(field)}")
    return _without_empty(layer, RunConfig)


def _retire(source: str, layer: dict[Any, Any], key: str, value: Any) -> None:
    """Removes a key of a former release from the layer, and says so; refuses a value that has no counterpart."""
    today, reason = _RETIRED[key]
    if value != today:
        raise ConfigError(f"{source}: {key}={_show(value)} is gone: {reason}; remove the key")
    warnings.warn(f"{source}: {key} is gone: {reason}", FutureWarning, stacklevel=2)
    section, _, name = key.partition(".")
    del layer[section][name]


def _without_empty(tree: dict[Any, Any], section: type[Section]) -> Tree:
    """Drops ``loss:`` with every key under it commented out: its null would replace the section of the base."""
    kept: Tree = {}
    for name, value in tree.items():
        inner = section_type(section.model_fields[name])
        if inner is None:
            kept[name] = value
        elif value is not None:
            kept[name] = _without_empty(value, inner)
    return kept


def _nodes(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values, sections before what is in them; what is under an unknown key is left out."""
    fields = dict(walk())
    for name, value in tree.items():
        key = f"{prefix}{name}"
        yield key, value
        if isinstance(value, dict) and key in fields and section_type(fields[key]) is not None:
            yield from _nodes(value, key + ".")


def _explain(error: ValidationError, tree: Any, sources: Mapping[str, str], path: str) -> str:
    """All missing keys, else the first problem, as one line, and how many more there are."""
    fields = dict(walk())
    missing, lines = [], []
    for problem in error.errors():
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, CombinationError):
            # Where an override is among the keys that must agree, the command line is to blame.
            involved = {sources.get(key) for key in cause.keys}
            lines.append(f"{COMMAND_LINE if COMMAND_LINE in involved else path}: {cause}")
            continue
        key = next(key for key in _prefixes(problem["loc"]) if key in fields)
        if problem["type"] == "missing":
            missing.append(key)
        else:
            value = reduce(lambda part, name: part[name], key.split("."), tree)
            problem_is = f"{key}={_show(value)}: must be {allowed(fields[key])}{_hint(key, value, problem['type'])}"
            lines.append(f"{sources.get(key, path)}: {problem_is}")
    if missing:
        listed = ", ".join(f"{key} ({allowed(fields[key])})" for key in missing)
        lines.insert(0, f"{path}: {listed} {'is' if len(missing) == 1 else 'are'} missing")
    lines = list(dict.fromkeys(lines))
    return lines[0] if len(lines) == 1 else f"{lines[0]} (and {len(lines) - 1} more)"


def _hint(key: str, value: Any, problem: str) -> str:
    """What to do about a value of a wrong type, where it is not plain."""
    if isinstance(value, list) and key.rpartition(".")[2].endswith("path"):
        return "; put the files into a folder and give its path"
    if problem == "dict_type":
        return "; write the keys themselves, not the name of a file"
    if problem == "string_type" and not isinstance(value, list | dict):
        return "; put it in quotes to make it text"
    return ""


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _prefixes(location: tuple[int | str, ...]) -> Iterator[str]:
    """Dotted keys from the whole location down: pydantic appends list positions and union members."""
    for end in range(len(location), 0, -1):
        yield ".".join(str(part) for part in location[:end])


def _is_yaml(file: Path) -> bool:
    return file.suffix in (".yaml", ".yml")
