"""A LoRA adapter merged into its base model: one ordinary Hugging Face folder, which needs no peft to be loaded."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megadistill.checkpoint.hf_export import write_safetensors
from megadistill.checkpoint.manifest import new_folder
from megadistill.errors import CheckpointError, ConfigError, needs_extra
from megadistill.models.loading import DTYPES, has_weights, load_model_config, load_weights
from megadistill.observability.log import get_logger
from megadistill.observability.progress import progress_bar

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)


def merge_adapter(base: str, adapter: str | Path, folder: str | Path, *, dtype: str | None = None) -> None:
    """Writes the model in ``base`` (folder or hub name) with the LoRA adapter of a local folder merged into it.

    Every layer is merged in float32 and rounded once, to ``dtype`` fp32 or bf16 (default: the base's own type). The
    model is held in its own type. A head tied to the embedding is written untied where the adapter changed one of them.
    The tokenizer is the adapter's, or else the base's. Raises CheckpointError or ConfigError for what cannot be merged;
    nothing is left behind then.
    """
    with needs_extra("lora", "megadistill merge"):  # before the model is loaded
        import peft  # noqa: F401
    adapter, target = Path(adapter), Path(folder)
    _check_adapter(adapter)
    config = load_model_config(base, "BASE")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"BASE: {base} is quantised; merge into the model that it was made from")
    if not has_weights(base):
        raise ConfigError(f"BASE: {base} has no weights")
    with new_folder(target) as beside:
        model = load_weights(base, "BASE", dtype="auto")
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        is_tied = _untie(model)
        model = _merge(model, base, adapter)
        if is_tied:
            _tie_again(model)
        wanted = None if dtype is None else DTYPES[dtype]
        model.config.dtype = wanted or next(iter(dtypes.values()))  # also of a head that was tied before
        write_safetensors(_tensors(model, dtypes, wanted), beside)
        model.config.save_pretrained(beside)
        model.generation_config.save_pretrained(beside)
        if not any(_copy_tokenizer(source, beside) for source in (str(adapter), base)):
            get_logger().warning(f"neither {adapter} nor {base} has a tokenizer; {target} has none")


def _check_adapter(adapter: Path) -> None:
    """Refuses what cannot be merged, before anything is loaded."""
    if not adapter.is_dir():
        raise CheckpointError(f"ADAPTER: no such folder: {adapter}; an adapter of the hub has to be downloaded first")
    if not (adapter / _CONFIG).is_file():
        raise CheckpointError(f"ADAPTER: {adapter} has no {_CONFIG}; an adapter saved by peft is needed")
    try:
        config = json.loads((adapter / _CONFIG).read_text())
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"ADAPTER: {adapter / _CONFIG} is damaged: {error!r}") from None
    if kind != "LORA":
        raise CheckpointError(f"ADAPTER: {adapter} is an adapter of type {kind}; only LORA can be merged")
    if config.get("layer_replication"):
        raise CheckpointError(f"ADAPTER: {adapter} repeats layers of its base (layer_replication): it cannot be merged")
    if not (adapter / _WEIGHTS).is_file():
        if (adapter / _PICKLE).is_file():
            raise CheckpointError(
                f"ADAPTER: {adapter / _PICKLE} is a pickle, which can run any program when it is read; "
                "save the adapter as safetensors (peft's save_pretrained does) where you trust it"
            )
        raise CheckpointError(f"ADAPTER: {adapter} has no {_WEIGHTS}")


def _merge(model: nn.Module, base: str, adapter: Path) -> nn.Module:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    with warnings.catch_warnings():
        # What peft warns of is checked here (missing weights) or intended (layers that are merged already).
        warnings.simplefilter("ignore")
        try:
            wrapped = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
        except Exception as error:  # peft raises many kinds for one cause: this adapter does not fit this base
            raise CheckpointError(f"ADAPTER: {adapter} does not fit {base}: {_reason(error)}") from None
        _check_names(wrapped, base, adapter)
        layers = [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]
        try:
            for layer in progress_bar(layers, description="merging", unit="layer"):
                own = layer.get_base_layer().weight.dtype
                layer.float()
                layer.merge(safe_merge=True)
                layer.to(own)
            return wrapped.merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise CheckpointError(f"ADAPTER: {adapter} cannot be merged: {_reason(error)}") from None


def _check_names(wrapped: Any, base: str, adapter: Path) -> None:
    """peft takes an adapter of a larger or smaller model as well, and leaves out what it has no place for."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter / _WEIGHTS, "pt") as file:
        stored = set(file.keys())
    needed = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    has_place = needed | set(wrapped.state_dict())  # with a changed vocabulary peft stores embeddings as well
    for names, what in ((stored - has_place, "weights without a place in it"), (needed - stored, "weights missing")):
        if names:
            first = min(names).removeprefix(_PREFIX)
            raise CheckpointError(f"ADAPTER: {adapter} does not fit {base}: {len(names)} {what}, {first} among them")


def _reason(error: Exception) -> str:
    """The line that says what does not fit: torch lists sizes below a title."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "size mismatch" in line), lines[0])


def _untie(model: Any) -> bool:
    """Gives a tied head weights of its own, so that an adapter of one side leaves the other alone, as it did in
    training; whether there was one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head.weight is embedding.weight
    if is_tied:
        head.weight = nn.Parameter(embedding.weight.data.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    return is_tied


def _tie_again(model: Any) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        model.config.tie_word_embeddings = True


def _tensors(
    model: Any, dtypes: dict[str, torch.dtype], wanted: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter once, in ``wanted`` or in the type that the base had it in."""
    named = list(model.named_parameters())
    for name, parameter in progress_bar(named, description="writing", unit="tensor"):
        yield name, parameter.data.to(wanted or dtypes.get(name, model.config.dtype))


def _copy_tokenizer(source: str, folder: Path) -> bool:
    """Copies the tokenizer's files as they are, of a local folder or of a hub name; whether there is one."""
    from transformers.utils import cached_file

    has_any = False
    for name in _TOKENIZER_FILES:
        found = cached_file(
            source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if found is not None:
            shutil.copyfile(found, folder / name)
            has_any = True
    return has_any
