"""Merges a LoRA adapter into its base model: the result is an ordinary Hugging Face folder, loadable without peft."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megadistill.checkpoint.carried import Carried, carried_files, own_files
from megadistill.checkpoint.hf_files import write_safetensors
from megadistill.checkpoint.manifest import new_folder
from megadistill.checkpoint.probe import check_same_logits, folder_logits, probe_logits
from megadistill.data.tokenize import has_tokenizer, load_tokenizer, vocabulary_size
from megadistill.errors import CheckpointError, ConfigError, needs_extra
from megadistill.models.adapter_files import AdapterFolder
from megadistill.models.end_tokens import end_tokens
from megadistill.models.folder_checks import ADAPTER_CONFIG, check_weights
from megadistill.models.loading import DTYPES, load_model_config
from megadistill.models.weights import is_tied, load_weights
from megadistill.observability.log import get_logger
from megadistill.observability.progress import progress_bar

_CONFIG, _WEIGHTS, _PICKLE = ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."


def merge_adapter(base: str, adapter: str | Path, folder: str | Path, *, dtype: str | None = None) -> None:
    """Writes a model with a LoRA adapter merged into it.

    Every layer is merged in float32 and rounded once; the model is in memory in its own type. A head tied to the
    embedding is written untied where the adapter changed one of them. The tokenizer is the adapter's, else the base's;
    what else the base has beside its weights goes with it.

    Args:
        base: Folder or hub name of the model.
        adapter: Local folder.
        folder: Must not exist, or be empty.
        dtype: fp32 or bf16; default: that of the base.

    Raises:
        CheckpointError: The adapter cannot be merged, or what was written does not give the probe text's logits of base
            and adapter; nothing is left behind.
        ConfigError: The base cannot be used.
    """
    adapter, target = Path(adapter), Path(folder)
    _check_adapter(adapter)
    with needs_extra("lora", "merging an adapter"):  # before the model is loaded
        import peft  # noqa: F401
    load_model_config(base, "BASE")
    check_weights(base, "BASE")
    if (own := AdapterFolder.of(str(adapter), "ADAPTER", is_checked=False)) is not None:
        own.check_base(base, "BASE")
    with new_folder(target) as beside:
        wanted = None if dtype is None else DTYPES[dtype]
        carried = _carried(base, adapter)
        _write_merged(base, adapter, beside, wanted)
        carried.write(beside)
        _prove(base, adapter, beside, wanted)


def _carried(base: str, adapter: Path) -> Carried:
    """What goes beside the weights; a warning where no tokenizer is among it that can be read."""
    reasons = []
    for source in (str(adapter), base):
        if has_tokenizer(source):
            try:
                tokenizer = load_tokenizer(source)
            except ConfigError as error:
                reasons.append(str(error))
                continue
            ends = end_tokens(base, tokenizer, vocab_size=vocabulary_size(tokenizer))
            return carried_files(base, source, tokenizer, ends, load_model_config(base, "BASE"))
    get_logger(component="merge").warning(
        f"neither {adapter} nor {base} has a tokenizer that can be read; the files of the base are copied as they are"
        + "".join(f"; {reason}" for reason in reasons)
    )
    return own_files(base)


def _write_merged(base: str, adapter: Path, folder: Path, wanted: torch.dtype | None) -> None:
    """Weights and configurations; the model is in memory only here."""
    model = load_weights(base, "BASE", dtype="auto")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    was_tied = _untie(model)
    model = _merge(model, base, adapter)
    if was_tied:
        _tie_again(model)
    model.config.dtype = wanted or next(iter(dtypes.values()))  # also of a head that was tied before
    write_safetensors(_tensors(model, dtypes, wanted), folder)
    model.config.save_pretrained(folder)


def _prove(base: str, adapter: Path, folder: Path, wanted: torch.dtype | None) -> None:
    """Compares the folder with base and adapter as peft computes them unmerged, loaded once more."""
    from peft import PeftModel

    gc.collect()  # the merged model
    model = load_weights(base, "BASE", rank=1, dtype="auto")  # rank 1 says nothing: it was said before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in _merge, where the adapter was checked
        wrapped = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu").eval()
    vocab_size, dtype = model.config.vocab_size, model.dtype
    expected = probe_logits(wrapped, vocab_size)
    del model, wrapped
    check_same_logits(expected, folder_logits(folder, vocab_size), f"{base} with {adapter}", dtype, wanted or dtype)


def _check_adapter(adapter: Path) -> None:
    """Refuses what cannot be merged, before anything is loaded."""
    if not adapter.is_dir():
        raise CheckpointError(f"ADAPTER: no such folder: {adapter}; download an adapter of the hub first")
    if not (adapter / _CONFIG).is_file():
        raise CheckpointError(f"ADAPTER: {adapter} has no {_CONFIG}; it must be an adapter that peft saved")
    try:
        config = json.loads((adapter / _CONFIG).read_text(encoding="utf-8"))
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
                f"ADAPTER: {adapter / _PICKLE} is a pickle, which can run any program when it is loaded; "
                "if you trust it, save it as safetensors with peft's save_pretrained"
            )
        raise CheckpointError(f"ADAPTER: {adapter} has no {_WEIGHTS}")


def _merge(model: nn.Module, base: str, adapter: Path) -> Any:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    with warnings.catch_warnings():
        # peft warns of what is checked below (missing weights) or intended (layers that are merged already).
        warnings.simplefilter("ignore")
        try:
            wrapped = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
        except Exception as error:  # peft raises many types for one cause: this adapter does not fit this base
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
    """Refuses an adapter of a larger or smaller model: peft loads it, and leaves out what has no place."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter / _WEIGHTS, "pt") as file:
        stored = set(file.keys())
    needed = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    known = needed | set(wrapped.state_dict())  # with a changed vocabulary peft stores embeddings, too
    for names, what in ((stored - known, "weights without a place in it"), (needed - stored, "weights missing")):
        if names:
            first = min(names).removeprefix(_PREFIX)
            raise CheckpointError(f"ADAPTER: {adapter} does not fit {base}: {len(names)} {what}, including {first}")


def _reason(error: Exception) -> str:
    """The line with the cause: torch lists sizes below a title."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "size mismatch" in line), lines[0])


def _untie(model: Any) -> bool:
    """Gives a tied head separate weights, so that an adapter of one side leaves the other unchanged, as in training.

    Returns:
        Whether the head was tied.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    was_tied = is_tied(model)
    if was_tied:
        head.weight = nn.Parameter(embedding.weight.data.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    return was_tied


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
