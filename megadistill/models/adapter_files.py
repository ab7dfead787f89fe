"""Adapters in a folder: written as peft reads them, and read merged into their base.

    adapter_config.json, adapter_model.safetensors    what peft reads
    adapter_base.json                                 which model they belong to: path, sizes and checksums of its files

Only folders with all three, which training writes, are read as models; other adapters are merged first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megadistill.config.lora import LoraSection
from megadistill.data.hub import split_revision
from megadistill.errors import ConfigError, first_line
from megadistill.files import write_json
from megadistill.models.families import LORA_A, LORA_B, Family
from megadistill.models.fingerprint import model_fingerprint
from megadistill.models.folder_checks import ADAPTER_BASE, ADAPTER_CONFIG
from megadistill.models.weight_files import StoredTensor

if TYPE_CHECKING:
    from megadistill.models.lora import Lora

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the name of every tensor


@dataclass(frozen=True)
class AdapterFolder:
    """Adapters that training wrote.

    Attributes:
        folder: The folder.
        base: Folder or hub name of their base.
        config: Rank, scale and targets.
        files: What ``model_fingerprint`` said of the base; empty for a hub name.
        layers: Names of the layers that have adapters.
    """

    folder: Path
    base: str
    config: LoraSection
    files: Mapping[str, str]
    layers: tuple[str, ...]

    @classmethod
    def of(cls, path: str, where: str, *, is_checked: bool = True) -> AdapterFolder | None:
        """The adapters in a folder; None for what is no such folder.

        Args:
            path: A model folder, a configuration file, or a hub name.
            where: The key or option that names the model; errors begin with it.
            is_checked: Whether the base must be there, as it was.

        Raises:
            ConfigError: It is damaged, or its base is not the model that it was trained on.
        """
        folder = Path(path)
        if not (folder / ADAPTER_BASE).is_file():
            return None
        try:
            record = json.loads((folder / ADAPTER_BASE).read_text(encoding="utf-8"))
            written = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            config = LoraSection(
                r=written["r"],
                alpha=written["lora_alpha"],
                targets=written["target_modules"],
                use_rslora=written["use_rslora"],
            )
            if not config.enabled:
                raise ValueError("r must be at least 1")
            base, files, layers = str(record["path"]), dict(record["files"]), tuple(record["layers"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{where}: the adapters in {path} are damaged: {first_line(error)}") from None
        if is_checked and files and model_fingerprint(base) != files:
            what = "is not what it was when they were trained" if Path(base).exists() else "is not there"
            raise ConfigError(
                f"{where}: {path} holds adapters of {base}, which {what}; where it is now, megadistill merge BASE "
                f"{path} FOLDER makes a model of both"
            )
        return cls(folder, base, config, files, layers)

    def check_base(self, base: str, where: str) -> None:
        """Refuses a base that is not the one that the adapters were trained on, wherever that is now.

        Raises:
            ConfigError: Its files differ.
        """
        if self.files and model_fingerprint(base) != self.files:
            raise ConfigError(f"{where}: {base} is not the model that the adapters in {self.folder} were trained on")

    def merged_into(self, tensors: Mapping[str, StoredTensor], family: Family, where: str) -> dict[str, StoredTensor]:
        """The tensors of the base, of which the adapted ones read as W + s B A, in float32.

        Args:
            tensors: Parameter -> its tensor, of which nothing is read here.
            family: Their family.
            where: Errors begin with it.

        Raises:
            ConfigError: The adapters are damaged, or do not fit the base.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            parts = load_file(self.folder / ADAPTER_WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{where}: {self.folder / ADAPTER_WEIGHTS} cannot be read: {first_line(error)}") from None
        merged = dict(tensors)
        for layer in self.layers:
            stored = tensors.get(f"{layer}.weight")
            a, b = (parts.get(f"{PREFIX}{layer}.{part}.weight") for part in (LORA_A, LORA_B))
            is_transposed = f"{layer}.weight".endswith(family.transposed)
            if stored is None or a is None or b is None or _shape(a, b, is_transposed) != stored.shape:
                raise ConfigError(f"{where}: {self.folder} has adapters of {layer} that do not fit {self.base}")
            content = _Merged(stored.content, self.config.scale * b.float(), a.float(), is_transposed)
            merged[f"{layer}.weight"] = replace(stored, dtype=torch.float32, content=content)
        return merged


def _shape(a: Tensor, b: Tensor, is_transposed: bool) -> tuple[int, int]:
    return (a.shape[1], b.shape[0]) if is_transposed else (b.shape[0], a.shape[1])


class _Merged:
    """``StoredTensor.content`` of W + B A: indexing it with slices reads the rectangle of W, and adds that of B A."""

    def __init__(self, base: Any, b: Tensor, a: Tensor, is_transposed: bool) -> None:
        self._base, self._b, self._a, self._is_transposed = base, b, a, is_transposed

    def __getitem__(self, key: slice | tuple[slice, slice]) -> Tensor:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        weight = torch.as_tensor(self._base[rows, columns]).float()
        if self._is_transposed:
            return weight + (self._b[columns] @ self._a[:, rows]).t()
        return weight + self._b[rows] @ self._a[:, columns]


def weights_folder(path: str, where: str) -> str:
    """Where the weights of a model are: of adapters, their base; anything else as it is.

    Raises:
        ConfigError: As for ``AdapterFolder.of``.
    """
    adapters = AdapterFolder.of(path, where)
    return path if adapters is None else adapters.base


def write_adapter_settings(lora: Lora, family: Family, folder: Path) -> None:
    """Writes what goes beside the adapters' weights.

    Args:
        lora: The adapters.
        family: The family of their base.
        folder: Exists.
    """
    config = lora.config
    base = str(Path(lora.base).resolve()) if Path(lora.base).exists() else lora.base
    name, revision = split_revision(base)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "fan_in_fan_out": bool(family.transposed),
        "target_modules": sorted({layer.rpartition(".")[2] for layer in lora.layers}),
        "inference_mode": True,
    }
    write_json(folder / ADAPTER_CONFIG, settings)
    write_json(folder / ADAPTER_BASE, {"path": base, "files": lora.base_files, "layers": lora.layers})
