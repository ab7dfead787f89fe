"""What of a model's path is no model that can be used: refused in one line before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadistill.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHARDS = "shards"  # folder of a model that ``megadistill shard`` made
ADAPTER_CONFIG, ADAPTER_BASE = "adapter_config.json", "adapter_base.json"
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
_LFS_POINTER = b"version https://git-lfs"
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# Older tools name the method in a file beside config.json, or by the file alone.
_QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def has_weights(path: str) -> bool:
    """False for a configuration alone: a .json file, or a local folder without weight files."""
    local = Path(path)
    return not local.is_file() and (not local.is_dir() or bool(_weight_files(local)))


def is_sharded(path: str) -> bool:
    """Whether a model folder is one that ``megadistill shard`` made: ``load_model`` reads it, transformers does not."""
    return (Path(path) / SHARDS).is_dir()


def check_weights(path: str, where: str) -> None:
    """Checks that a model has weights that transformers can read.

    Args:
        path: What the user named.
        where: The key or option that names the model; errors begin with it.

    Raises:
        ConfigError: It is a configuration alone, a sharded model, or adapters.
    """
    if is_sharded(path):
        raise ConfigError(f"{where}: {path} is a sharded model; use the model that it was made from")
    if (Path(path) / ADAPTER_BASE).is_file():
        raise ConfigError(
            f"{where}: {path} holds LoRA adapters, which are merged first: megadistill merge {_base_of(Path(path))} "
            f"{path} FOLDER"
        )
    if not has_weights(path):
        raise ConfigError(f"{where}: {path} has no weights")


def check_folder(path: str, where: str) -> None:
    """Checks that a folder holds a whole model; a configuration file and a hub name pass.

    Args:
        path: What the user named.
        where: The key or option that names the model; errors begin with it.

    Raises:
        ConfigError: It is a LoRA adapter, has no configuration or no weights, or holds Git LFS pointers.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / ADAPTER_BASE).is_file():
        # Also where a model lies beside it: transformers would load the adapter's base in its place.
        raise ConfigError(
            f"{where}: {path} holds a LoRA adapter ({ADAPTER_CONFIG}), which is no model; merge it first: "
            f"megadistill merge {_base_of(folder)} {path} FOLDER"
        )
    if not (folder / "config.json").exists():
        raise ConfigError(f"{where}: {path} has no config.json; a model folder or a configuration file is needed")
    if is_sharded(path):
        return
    files = _weight_files(folder)
    if not files:
        raise ConfigError(
            f"{where}: {path} has a config.json, but no weights ({', '.join(_WEIGHT_FILES)}); was a download or a copy "
            f"interrupted? To make random weights, name the file: {folder / 'config.json'}"
        )
    for file in files:
        if _begins_with(file, _LFS_POINTER):
            raise ConfigError(f"{where}: {file} is a Git LFS pointer, not weights: run git lfs pull in {path}")
    for name, method in _QUANTIZATION_FILES.items():
        if (folder / name).is_file():
            raise _quantized(path, method, where)


def check_sizes(config: PreTrainedConfig, path: str, where: str) -> None:
    """Refuses a configuration with sizes that no model has; transformers checks their types alone.

    Args:
        config: The configuration.
        path: What the user named.
        where: The key or option that names the model; the error begins with it.

    Raises:
        ConfigError: A size is less than 1.
    """
    for name in _SIZES:
        size = getattr(config, name, None)
        if isinstance(size, int) and size < 1:
            raise ConfigError(f"{where}: '{path}' has {name}={size}; at least 1 is needed")


def check_not_quantized(config: PreTrainedConfig, path: str, where: str) -> None:
    """Refuses a quantized model.

    Args:
        config: Its configuration.
        path: What the user named.
        where: The key or option that names the model; the error begins with it.

    Raises:
        ConfigError: It is quantized.
    """
    method = quantization_of({key: getattr(config, key, None) for key in _QUANTIZATION_KEYS})
    if method is not None:
        raise _quantized(path, method, where)


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """The method by which a model is quantized, such as "fp8".

    Args:
        config: The content of its config.json.

    Returns:
        The method; None where the model is not quantized.
    """
    for key in _QUANTIZATION_KEYS:
        settings = config.get(key)
        if settings:
            settings = settings if isinstance(settings, Mapping) else vars(settings)
            bitsandbytes = any(settings.get(name) for name in ("load_in_8bit", "load_in_4bit"))
            method = settings.get("quant_method") or ("bitsandbytes" if bitsandbytes else "an unnamed method")
            return str(getattr(method, "value", method))
    return None


def _quantized(path: str, method: str, where: str) -> ConfigError:
    return ConfigError(
        f"{where}: {path} is quantized ({method}), which is not supported; use the unquantized model that it was made "
        "from"
    )


def _weight_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in _WEIGHT_FILES for file in folder.glob(pattern)})


def _begins_with(file: Path, start: bytes) -> bool:
    try:
        with file.open("rb") as content:
            return content.read(len(start)) == start
    except OSError:  # whoever reads the weights says why
        return False


def _base_of(adapter: Path) -> str:
    """The base that an adapter names, for a command line; BASE where it names none."""
    try:
        base = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    return base if isinstance(base, str) and base.isprintable() and base else "BASE"
