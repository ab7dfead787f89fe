"""What an export has beside its weights: what the student brought, and the run's tokenizer, byte for byte.

It is collected when a run begins, so that a checkpoint does not need the student's folder, which may be gone by then.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadistill.data.tokenize import TOKENIZER_EXTRAS, TOKENIZER_FILES, auto_tokenizer_differs, has_tokenizer
from megadistill.errors import ConfigError
from megadistill.files import os_errors_as
from megadistill.models.end_tokens import ids_of
from megadistill.models.model_files import CONFIG, GENERATION_CONFIG, files_folder, model_file, read_model_json
from megadistill.observability.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_GENERIC_CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is, in every version of transformers
# Files of a model folder that mean something wherever the model goes (processors, code, licenses) ...
_KEPT = ("*.json", "*.jinja", "*.py", "*.model", "*.tiktoken", "license*", "notice*", "use_policy*")
# ... but not what is made anew, describes the weights that were replaced, or is left from training.
_LEFT = (
    CONFIG, GENERATION_CONFIG, "*.index.json", "*quant*.json", "adapter_*", "trainer_state.json", "training_args*",
    "*_results.json", ".*",
)  # fmt: skip
_MAX_BYTES = 16 << 20  # of a file that is not the tokenizer's: weights of other frameworks are larger


@dataclass(frozen=True)
class Carried:
    """Files of an export, in memory.

    Attributes:
        files: Name below the folder -> content.
        special_ids: Entries of config.json: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``.
    """

    files: Mapping[str, bytes]
    special_ids: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Writes all files into a folder.

        Args:
            folder: Exists.
        """
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def carried_files(
    model: str,
    tokenizer_path: str,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: frozenset[int],
    config: PreTrainedConfig,
) -> Carried:
    """Collects the files of a model and of a tokenizer.

    Args:
        model: Folder, configuration file (it brings nothing), or hub name of the model.
        tokenizer_path: Folder or hub name of the tokenizer.
        tokenizer: The tokenizer.
        eos_ids: Tokens that end a text of the model.
        config: The model's configuration.

    Raises:
        ConfigError: A file is damaged or cannot be read.
    """
    files = _tokenizer_files(tokenizer_path, tokenizer)
    if model != tokenizer_path:
        files = _with_own_template(files, model)
    names = {name.partition("/")[0] for name in (*files, *_tokenizer_names(tokenizer))}
    own = {name: content for name, content in _other_files(model) if name not in names}
    ids = _special_ids(model, tokenizer, eos_ids)
    generation = _generation_config(model, eos_ids | {tokenizer.eos_token_id}, ids, config)
    return Carried({**own, **files, GENERATION_CONFIG: generation}, ids)


def own_files(model: str) -> Carried:
    """The files of a model whose tokenizer is missing or cannot be read, as they are.

    Args:
        model: Folder, configuration file (it brings nothing), or hub name of the model.

    Raises:
        ConfigError: A file cannot be read.
    """
    names = (GENERATION_CONFIG, *TOKENIZER_FILES, *TOKENIZER_EXTRAS)
    found = {name: file for name in names if (file := model_file(model, name)) is not None}
    return Carried(dict(_other_files(model)) | {name: _read(file) for name, file in found.items()}, {})


def for_auto_tokenizer(carried: Carried, config: PreTrainedConfig, where: str) -> Carried:
    """The files such that AutoTokenizer reads the tokenizer as it is, or a warning where it cannot be made to.

    For some model types transformers takes the family's own class, which replaces parts of what tokenizer.json
    describes.

    Args:
        carried: The files.
        config: The model's configuration.
        where: The tokenizer's folder or name, for the log.
    """
    if not _differs(carried, config):
        return carried
    log = get_logger(component="checkpoint")
    settings = json.loads(carried.files.get(_TOKENIZER_CONFIG, b"{}"))
    text = json.dumps({**settings, "tokenizer_class": _GENERIC_CLASS}, indent=2, ensure_ascii=False) + "\n"
    patched = replace(carried, files={**carried.files, _TOKENIZER_CONFIG: text.encode()})
    if not _differs(patched, config):
        log.info(
            f"AutoTokenizer does not read {where} as its tokenizer.json describes it; exports name the class "
            f"{_GENERIC_CLASS} in {_TOKENIZER_CONFIG}, with which it does"
        )
        return patched
    log.warning(
        f"AutoTokenizer does not tokenize as {where}/tokenizer.json describes and as this run does, because "
        f"transformers has a class of its own for {config.model_type}. Programs with AutoTokenizer (vLLM) would read "
        f"exports with other ids. Either load their tokenizer with {_GENERIC_CLASS} there, or train with what "
        "AutoTokenizer reads: before training, AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) for every model "
        "folder DIR of the run"
    )
    return carried


def _differs(carried: Carried, config: PreTrainedConfig) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        carried.write(Path(folder))
        config.save_pretrained(folder)
        return auto_tokenizer_differs(folder)


def _read(file: Path) -> bytes:
    with os_errors_as(ConfigError, file, "cannot be read"):
        return file.read_bytes()


def _tokenizer_names(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    own = getattr(tokenizer, "vocab_files_names", {}).values()
    return {*TOKENIZER_FILES, *TOKENIZER_EXTRAS, *own, _TEMPLATE, _MORE_TEMPLATES}


def _tokenizer_files(path: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files that the tokenizer was read from; where they cannot be found, what transformers makes of it."""
    names, folder = _tokenizer_names(tokenizer), files_folder(path)
    if folder is not None:
        found = {name: _read(folder / name) for name in sorted(names) if (folder / name).is_file()}
        if set(found) & set(TOKENIZER_FILES):
            return found | _more_templates(folder)
    with tempfile.TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        return {file.name: file.read_bytes() for file in Path(made).iterdir() if file.is_file()}


def _more_templates(folder: Path) -> dict[str, bytes]:
    """Named chat templates, each a file below the folder."""
    return {f"{_MORE_TEMPLATES}/{file.name}": _read(file) for file in folder.glob(f"{_MORE_TEMPLATES}/*.jinja")}


def _with_own_template(files: dict[str, bytes], model: str) -> dict[str, bytes]:
    """Adds the chat template of a model to the files of another tokenizer that has none."""
    settings = json.loads(files.get(_TOKENIZER_CONFIG, b"{}"))
    folder = files_folder(model)
    if folder is None or _TEMPLATE in files or settings.get("chat_template") is not None:
        return files
    if (folder / _TEMPLATE).is_file():
        files = files | {_TEMPLATE: _read(folder / _TEMPLATE)} | _more_templates(folder)
    template = (read_model_json(model, _TOKENIZER_CONFIG) or {}).get("chat_template")
    if template is None:
        return files
    text = json.dumps({**settings, "chat_template": template}, indent=2, ensure_ascii=False) + "\n"
    return files | {_TOKENIZER_CONFIG: text.encode()}


def _other_files(model: str) -> Iterator[tuple[str, bytes]]:
    """Small files of a model's folder that are neither its tokenizer's, nor weights, nor left from training."""
    folder = files_folder(model)
    for file in sorted(folder.iterdir()) if folder is not None else ():
        name = file.name.lower()
        is_kept = any(fnmatch(name, p) for p in _KEPT) and not any(fnmatch(name, p) for p in _LEFT)
        if is_kept and file.is_file() and file.stat().st_size <= _MAX_BYTES:
            yield file.name, _read(file)


def _special_ids(model: str, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> dict[str, Any]:
    """What config.json says of special tokens: what it said, completed by the tokenizer's.

    Ids of a model without a tokenizer of its own may belong to another vocabulary, and are replaced.
    """
    content, is_own = read_model_json(model, CONFIG) or {}, has_tokenizer(model)
    ids: dict[str, Any] = {}
    for name in ("bos_token_id", "pad_token_id"):
        named = content.get(name) if is_own else None
        ids[name] = getattr(tokenizer, name) if named is None else named
    eos, named = tokenizer.eos_token_id, content.get("eos_token_id")
    ends = [id_ for id_ in ids_of(named, f"{model}: {CONFIG}") if is_own or id_ in eos_ids]
    if eos not in ends:  # a single other one gives way, as the list of all is in generation_config.json
        ends = [*ends, eos] if len(ends) > 1 else [eos]
    ids["eos_token_id"] = ends if isinstance(named, list) and (is_own or len(ends) > 1) else ends[0]
    return ids


def _generation_config(
    model: str, eos_ids: frozenset[int], special_ids: Mapping[str, Any], config: PreTrainedConfig
) -> bytes:
    """The model's generation_config.json, with the end tokens and the padding token that it lacks; or a new one."""
    from transformers import GenerationConfig

    before = read_model_json(model, GENERATION_CONFIG)
    if before is None:
        new_config = type(config).from_dict({**config.to_dict(), **special_ids})
        content = json.loads(GenerationConfig.from_model_config(new_config).to_json_string())
        named: Any = (read_model_json(model, CONFIG) or {}).get("eos_token_id")
    else:
        content, named = dict(before), before.get("eos_token_id")
    is_own = has_tokenizer(model)
    ends = [id_ for id_ in ids_of(named, f"{model}: {GENERATION_CONFIG}") if is_own or id_ in eos_ids]
    ends += sorted(eos_ids.difference(ends))
    if content.get("pad_token_id") is None:
        content["pad_token_id"] = special_ids["pad_token_id"]
    if ends != list(ids_of(content.get("eos_token_id"), model)):
        content["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    file = model_file(model, GENERATION_CONFIG)
    if content == before and file is not None:
        return _read(file)
    content.pop("_from_model_config", None)  # transformers would make it anew from config.json
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
