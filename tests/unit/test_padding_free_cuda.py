"""Flash attention for variable lengths against one sequence after the other, on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from megadistill.data.collate import concatenated
from megadistill.models import attention
from megadistill.models.attention import use_padding_free_attention
from tests.unit.test_padding_free import VARIANTS, make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LENGTHS = (9, 1, 40, 3, 17)


def states_and_gradients(model: Any) -> list[torch.Tensor]:
    batch = concatenated([(tuple(range(1, length + 1)), None) for length in LENGTHS]).to("cuda")
    model.zero_grad()
    hidden = model.base_model(
        input_ids=batch.input_ids, attention_mask=None, position_ids=batch.position_ids, use_cache=False,
        lengths=batch.lengths, bounds=batch.bounds,
    ).last_hidden_state  # fmt: skip
    (hidden.float() * torch.linspace(-1, 1, hidden.numel(), device="cuda").view_as(hidden)).sum().backward()
    return [hidden.detach().float(), *(p.grad.float() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_kernel_for_all_sequences(variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As close to float64 as one sequence after the other is; in float32 it is one sequence after the other."""
    exact = make_model(variant, "sdpa", torch.float64).cuda()
    model = copy.deepcopy(exact).to(dtype)
    for one in (exact, model):
        use_padding_free_attention(one)
    expected, found = states_and_gradients(exact), states_and_gradients(model)
    monkeypatch.setattr(attention, "_has_flash", lambda query: False)
    one_by_one = states_and_gradients(model)
    for a, b, c in zip(found, one_by_one, expected, strict=True):
        scale = float(c.abs().max())
        assert float((a - c).abs().max()) <= 3 * float((b - c).abs().max()) + 1e-5 * scale
