"""The layout of each weight that is the fastest on this CPU: measured once, then remembered in the user's cache.

The measurement takes a few hundredths of a second for each shape. It is remembered because the layouts differ in
round-off: a run that is resumed has to find the same ones.

Shapes: a weight is [outputs, inputs].
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from megadistill.decoding.plan import DecoderPlan, weight_of
from megadistill.decoding.products import PACKED, Layout, Product, ProductLayouts
from megadistill.files import write_json

Setting = Literal["auto", "packed", "plain"]
_PLAIN = ProductLayouts("transposed", "transposed", "transposed", "transposed", "transposed", "plain")
# Numbers of examples for which decoding is measured, and of tokens for reading.
_ROWS, _TOKENS = (8, 32), 512
# Examples that are decoded together, as far as it is looked at whether one depends on the others.
_MOST_ROWS = 64
_ROUNDS = 5
# A round lasts at least this long.
_SECONDS = 5e-4
# Elements of a weight below which no product matters, and above which a copy to measure with would.
_FEWEST, _MOST = 2**14, 2**25

Shape = tuple[int, ...]


def product_shapes(
    plan: DecoderPlan | None, head: nn.Parameter, shape_of: Callable[[nn.Parameter], Sequence[int]]
) -> dict[str, Shape]:
    """The weight of each product of a decoder, by its field of ``ProductLayouts``; only the head's without a plan.

    Args:
        plan: The decoder.
        head: Weight of the output head.
        shape_of: Shape of a parameter, which may be partitioned.
    """
    shapes: dict[str, Shape] = {"head": tuple(shape_of(head))}
    if plan is None:
        return shapes

    def joined(modules: Sequence[nn.Module]) -> Shape:
        found = [tuple(shape_of(cast(nn.Parameter, weight_of(module)))) for module in modules]
        return (sum(shape[0] for shape in found), found[0][1])

    layer = plan.layers[0]
    for name, modules in (("qkv", layer.qkv), ("out", (layer.out,)), ("up", layer.up), ("down", (layer.down,))):
        shapes[name] = joined(modules)
    return shapes


def choose_layouts(
    setting: Setting, shapes: Mapping[str, Shape], dtype: torch.dtype, file: Path | None = None
) -> ProductLayouts:
    """The layouts of weights on this CPU; only float32 has several.

    Does not communicate: one rank chooses, and all others are given its choice.

    Args:
        setting: "packed" or "plain" everywhere, or what a measurement finds.
        shapes: Of ``product_shapes``.
        dtype: Of the weights.
        file: Where measurements are remembered; default: in the user's cache.
    """
    assert setting in get_args(Setting)
    if dtype != torch.float32:
        return PACKED
    if setting != "auto" or not torch.backends.mkldnn.is_available():
        return PACKED if setting == "packed" else _PLAIN
    measured = {name: shape for name, shape in shapes.items() if _FEWEST <= shape[0] * shape[1] <= _MOST}
    if not measured:
        return PACKED
    file = file or _cache_folder() / "products.json"
    known = _remembered(file)
    key = f"{_processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {sorted(measured.items())}"
    found: dict[str, Layout] = known.get(key, {})
    if not _is_choice(found, measured):
        found = _measure(measured)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, known | {key: found})
        except OSError:  # measured again, it might be another one: a resumed run would differ in the last bits
            return PACKED
    return PACKED._replace(**found)


def _is_choice(found: Any, shapes: Mapping[str, Shape]) -> bool:
    names = {*shapes, "read"}
    return isinstance(found, dict) and set(found) == names and set(found.values()) <= set(get_args(Layout))


@torch.no_grad()
def _measure(shapes: Mapping[str, Shape]) -> dict[str, Layout]:
    """The fastest layout of each weight for decoding, and of all weights together for reading."""
    found: dict[str, Layout] = {}
    reading = [0.0, 0.0]
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(0)
        weight, x = (torch.randn(size, generator=generator) for size in (shape, (_TOKENS, shape[1])))
        few = [x[:rows] for rows in _ROWS]
        packed, transposed, plain = (Product(weight, None, layout) for layout in get_args(Layout))
        seconds = _seconds(partial(_each, packed, few), partial(_each, transposed, few))
        is_usable = seconds[1] < seconds[0] and is_independent(transposed, x)
        found[name] = "transposed" if is_usable else "packed"
        if name != "head":  # a copy in another layout is made whenever text is read
            seconds = _seconds(partial(_packed_product, weight, x), partial(plain, x))
            reading = [total + more for total, more in zip(reading, seconds, strict=True)]
    found["read"] = "packed" if reading[0] <= reading[1] else "plain"
    return found


def is_independent(product: Product, x: Tensor) -> bool:
    """Whether the result of a token of x [T, inputs], bit by bit, is the same whatever stands beside it."""
    whole = product(x[:_MOST_ROWS])
    parts = [(start, size) for size in (1, 2, 3, 4, 7, 8, 12, 16, 31, 32) for start in (0, 5)]
    return all(torch.equal(product(x[a : a + n]), whole[a : a + n]) for a, n in parts)


def _each(product: Product, inputs: Sequence[Tensor]) -> None:
    for x in inputs:
        product(x)


def _packed_product(weight: Tensor, x: Tensor) -> Tensor:
    return Product(weight, None, "packed")(x)


def _seconds(*calls: Callable[[], object]) -> list[float]:
    """The shortest CPU time of each call, measured in turn: other programs share the cores."""
    best = [float("inf")] * len(calls)
    for _ in range(_ROUNDS):
        for i, call in enumerate(calls):
            count, begin = 0, time.thread_time()
            while count == 0 or time.thread_time() - begin < _SECONDS:
                call()
                count += 1
            best[i] = min(best[i], (time.thread_time() - begin) / count)
    return best


def _remembered(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or damaged: it is measured again
        return {}
    return known if isinstance(known, dict) else {}


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megadistill"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())
