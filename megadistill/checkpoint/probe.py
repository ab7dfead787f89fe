"""The proof of a conversion: the written folder, loaded as a user would, gives the logits of the model it came from.

Both read one fixed text of token ids, which needs no tokenizer. One model is in memory at a time: the first one's
logits are kept, not its weights.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megadistill.errors import CheckpointError, ConfigError
from megadistill.models.loading import LoadedModel
from megadistill.models.shard_spec import ShardSpec
from megadistill.models.shards import WEIGHT
from megadistill.models.weights import load_weights

_NUM_TOKENS = 32
# Largest |difference| of the logits (root of the mean square, each position's logits less their mean) relative to the
# logits themselves. Another order of summation costs 1e-5 in float32; weights that are rounded to 8 bits cost 1 % or 2.
# A wrong model costs 100 % and more.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def probe_logits(model: Any, vocab_size: int) -> torch.Tensor:
    """What a model makes of the probe text.

    Args:
        model: A causal language model of transformers or peft in evaluation mode.
        vocab_size: V: the ids of the text and the logits that count are below it.

    Returns:
        Logits [T, V], float32.
    """
    length = min(_NUM_TOKENS, getattr(model.config, "max_position_embeddings", None) or _NUM_TOKENS)
    ids = torch.tensor([[(7919 * place * place + 31 * place + 1) % vocab_size for place in range(length)]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return torch.as_tensor(logits[0, :, :vocab_size]).float()


def streamed_logits(loaded: LoadedModel, vocab_size: int) -> torch.Tensor:
    """``probe_logits`` of a model whose weights are still to come: each module has its own only while it runs.

    Args:
        loaded: The model.
        vocab_size: V.

    Raises:
        CheckpointError: Files are missing or damaged.
    """
    model, weights = loaded.model.eval(), loaded.weights
    assert weights is not None
    names = {parameter: name for name, parameter in model.named_parameters()}

    def fill(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            shape = loaded.shapes[names[parameter]]
            run = weights.read(WEIGHT, names[parameter], ShardSpec(shape), 0, 0, parameter.numel())
            parameter.data = run.view(shape).to(parameter.dtype)

    def empty(module: nn.Module, _: Any, __: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty_like(parameter.data)

    for module in model.modules():
        module.register_forward_pre_hook(fill)
        module.register_forward_hook(empty)
    return probe_logits(model, vocab_size)


def folder_logits(folder: Path, vocab_size: int) -> torch.Tensor:
    """``probe_logits`` of a Hugging Face folder, by transformers alone, in the folder's own type.

    Args:
        folder: The folder.
        vocab_size: V.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    gc.collect()  # the model before: modules that refer to each other go only now
    try:
        model = load_weights(str(folder), "the written folder", dtype="auto")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return probe_logits(model.eval(), vocab_size)


def check_same_logits(expected: torch.Tensor, found: torch.Tensor, source: object, *dtypes: torch.dtype) -> None:
    """Refuses a conversion that makes another model.

    Args:
        expected: Logits [T, V] of the model that was converted.
        found: Logits [T, V] of what was written.
        source: The model, for the message.
        dtypes: Types of the weights of both; the coarsest decides the tolerance.

    Raises:
        CheckpointError: They differ by more than rounding, or others are not finite.
    """
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        raise CheckpointError(f"{source}: what was written is another model: others of its logits are not finite")
    # A model whose weights are lost is still the same model.
    expected, found = (logits.where(finite, 0.0) for logits in (expected, found))
    tolerance = max(_TOLERANCES.get(dtype, _TOLERANCES[torch.float32]) for dtype in dtypes)
    centered, other = (logits.double() - logits.double().mean(-1, keepdim=True) for logits in (expected, found))
    difference, size = float((other - centered).norm()), float(centered.norm())
    if not difference <= tolerance * size:
        raise CheckpointError(
            f"{source}: what was written is another model: on a probe text its logits differ by "
            f"{100 * difference / size:.3g} % ({100 * tolerance:g} % are rounding); nothing is kept"
        )
