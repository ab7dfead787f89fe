"""Products of decoding: every layout gives the linear layer, token by token, and the choice of a layout."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from megadistill.config.sampling import SamplingOptions
from megadistill.decoding import layouts
from megadistill.decoding.hf_decoder import make_decoder
from megadistill.decoding.layouts import choose_layouts, is_independent, product_shapes
from megadistill.decoding.products import PACKED, Layout, Product, ProductLayouts
from megadistill.decoding.rollout import rollout
from megadistill.decoding.sampling import Sampling
from megadistill.models.families import FAMILIES
from tests.unit.test_decoding import (
    CPU,
    EOS,
    GREEDY,
    LIMIT,
    PROMPTS,
    SAMPLES,
    SHARD,
    VARIANTS,
    WITHOUT_PLAN,
    generated,
    make_model,
)
from tools.benchmarks.operations import token_operations

LAYOUTS = get_args(Layout)
SHAPES = {"qkv": (384, 128), "out": (128, 128), "up": (256, 128), "down": (128, 256), "head": (300, 128)}
TRANSPOSED = ProductLayouts(*["transposed"] * 5, "plain")


def weights(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    return torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_product_is_the_linear_layer(layout: Layout, has_bias: bool, rows: int) -> None:
    weight, bias = weights(40, 24)
    x, total = torch.randn(rows, 24), torch.randn(rows, 40)
    product = Product(weight, bias if has_bias else None, layout)
    expected = (x.double() @ weight.double().T + (bias.double() if has_bias else 0)).float()
    torch.testing.assert_close(product(x), expected, rtol=1e-5, atol=1e-5)
    beside = torch.zeros(rows, 50)
    product(x, beside[:, 5:45])
    torch.testing.assert_close(beside[:, 5:45], expected, rtol=1e-5, atol=1e-5)
    assert not beside[:, :5].any() and not beside[:, 45:].any()
    torch.testing.assert_close(product.add_to(total.clone(), x), total + expected, rtol=1e-5, atol=1e-5)


def test_a_token_alone_is_the_token_among_others() -> None:
    """Else texts would depend on how many examples a rank has; what breaks it is found before it is chosen."""
    weight, _ = weights(384, 128)
    x = torch.randn(512, 128)
    assert is_independent(Product(weight, None, "packed"), x)

    class Dependent(Product):
        def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            return super().__call__(x, out) + 1e-6 * (len(x) < 4)

    assert not is_independent(Dependent(weight, None, "packed"), x)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in WITHOUT_PLAN])
def test_all_layouts_write_the_same_text(variant: str) -> None:
    model = make_model(variant)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    family = FAMILIES[VARIANTS[variant][0]]
    if family.prepare is not None:
        family.prepare(model)
    for chosen in (TRANSPOSED, ProductLayouts.reading("plain")):
        decoder = make_decoder(model, family.plan(model), SHARD, CPU, chosen)
        for max_examples in (1, 64):
            responses = rollout(
                decoder, SAMPLES, limits=[LIMIT] * len(PROMPTS), eos_ids=frozenset({EOS}), sampling=GREEDY,
                max_examples=max_examples,
            )  # fmt: skip
            assert responses == expected, chosen


def test_products_are_not_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 replaces ``F.linear`` by a Python function of some ten operations."""

    def replaced(*_: Any) -> torch.Tensor:
        raise AssertionError("F.linear")

    model = make_model("llama")
    monkeypatch.setattr(torch.nn.functional, "linear", replaced)
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        for chosen in (PACKED, TRANSPOSED, ProductLayouts.reading("plain")):
            decoder = make_decoder(model, FAMILIES["llama"].plan(model), SHARD, CPU, chosen)
            rollout(decoder, SAMPLES, limits=[3] * len(PROMPTS), eos_ids=frozenset(), sampling=Sampling(0))


def test_shapes_are_those_of_the_joined_weights() -> None:
    model = make_model("llama with grouped heads")
    shapes = product_shapes(FAMILIES["llama"].plan(model), model.lm_head.weight, lambda weight: weight.shape)
    layer = model.model.layers[0]
    rows = sum(len(part.weight) for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj))
    assert shapes["qkv"] == (rows, 32) and shapes["head"] == tuple(model.lm_head.weight.shape)
    assert shapes["up"] == (2 * layer.mlp.up_proj.out_features, 32)
    assert product_shapes(None, model.lm_head.weight, lambda weight: weight.shape).keys() == {"head"}


def _choose(setting: Any, shapes: dict[str, Any], file: Path | None = None) -> ProductLayouts:
    return choose_layouts(setting, shapes, torch.float32, file)


def test_settings_need_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_measure", lambda _: pytest.fail("measured"))
    file = tmp_path / "products.json"
    assert _choose("packed", SHAPES, file) == PACKED
    assert _choose("plain", SHAPES, file) == TRANSPOSED
    assert _choose("auto", {name: (8, 8) for name in SHAPES}, file) == PACKED, "too small to matter"
    # Nothing but float32 has several layouts.
    assert choose_layouts("auto", SHAPES, torch.bfloat16, file) == PACKED
    assert not file.exists()


def test_what_was_measured_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run is resumed with the same round-off; per shape and machine; whatever the file holds."""
    calls: list[Any] = []
    real = layouts._measure

    def counted(shapes: Any) -> Any:
        calls.append(shapes)
        return real(shapes)

    monkeypatch.setattr(layouts, "_measure", counted)
    monkeypatch.setattr(layouts, "_SECONDS", 1e-5)
    file = tmp_path / "below" / "products.json"
    first = _choose("auto", SHAPES, file)
    assert first.read in ("packed", "plain") and {*first[:5]} <= {"packed", "transposed"}
    assert _choose("auto", SHAPES, file) == first and len(calls) == 1
    _choose("auto", SHAPES | {"head": (400, 128)}, file)
    assert len(calls) == 2 and len(json.loads(file.read_text(encoding="utf-8"))) == 2
    for damaged in ("{", "[]", json.dumps({key: {"qkv": "x"} for key in json.loads(file.read_text(encoding="utf-8"))})):
        file.write_text(damaged, encoding="utf-8")
        _choose("auto", SHAPES, file)
    assert len(calls) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    _choose("auto", SHAPES)
    assert (tmp_path / "user" / "megadistill" / "products.json").is_file()
    monkeypatch.setattr(layouts, "write_json", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert _choose("auto", SHAPES, tmp_path / "other.json") == PACKED  # a choice that the next start repeats
    assert len(calls) == 7


@pytest.mark.parametrize(("name", "bound"), [("llama", 18), ("qwen3", 22), ("opt", 12), ("gpt2", 12)])
def test_operations_of_a_token(name: str, bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a launch on a GPU and some microseconds anywhere: a bar, which may be lowered."""
    family, more = VARIANTS[name]

    def make(num_layers: int) -> Any:
        key = "n_layer" if family == "gpt2" else "num_hidden_layers"
        monkeypatch.setitem(VARIANTS, name, (family, more | {key: num_layers, "layer_types": None}))
        model = make_model(name)
        if FAMILIES[family].prepare is not None:
            FAMILIES[family].prepare(model)
        return make_decoder(model, FAMILIES[family].plan(model), SHARD, CPU)

    count = partial(token_operations, make)
    found = count(Sampling(0))
    assert found.layer <= bound and found.outside <= 7 and found.sampling <= 17
    if name == "llama":
        assert count(Sampling(0, 0.7)).sampling <= 19 and count(Sampling(0, 0.0)).sampling <= 6
        assert count(Sampling(0, 0.7, SamplingOptions(top_k=5, top_p=0.9))).sampling <= 169
