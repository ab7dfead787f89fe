"""The Triton kernels through Triton's own compiler for a GPU that need not be there: down to machine code for an H100.

The interpreter, which runs them in the other tests, accepts more than the compiler does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.losses.backends import has_triton

ROOT = Path(__file__).parents[2]
_COMPILE = """
import itertools
from dataclasses import replace
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megadistill.config.loss import LossConfig
from megadistill.losses import triton_kernels as kernels
from megadistill.losses.divergences import DIVERGENCES
from megadistill.losses.tiles import ClippedSum, TileSpec
from megadistill.losses.triton_mask import edge_masses_kernel

REMAINDERS = ("bucket", "truncate", "renormalize", "none")

INTEGERS = dict.fromkeys(("num_classes", "num_groups", "num_tokens", "stride", "stride_out"), "i32")
CLASSES = dict.fromkeys(("top_column", "label_column"), "*i64")

def build(kernel, dtype, out, **constants):
    types = {name: "constexpr" if name in constants else INTEGERS.get(name) or CLASSES.get(name) or f"*{dtype}" for name in kernel.arg_names}
    if "out" in types:
        types["out"] = f"*{out}"
    built = triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert len(built.asm["cubin"]) > 1000

numbers = dict(inverse=0.5, softness_inverse=4.0)
specs = [TileSpec(is_clipped=True), *(TileSpec(formula=each.formula, share=each.share(LossConfig())) for each in DIVERGENCES.values())]
flags = [True, False]
for dtype, F in (("fp32", 1.0), ("fp64", 8.0)):
    for teacher, plain, width in itertools.product(flags, flags, (1, 64)):
        build(kernels.statistics_kernel, dtype, dtype, inverse=0.5, HAS_TEACHER=teacher, HAS_UNTEMPERED=plain, WIDTH=width, BLOCK=1024)
    build(kernels.span_sums_kernel, dtype, dtype, inverse=0.5, F=F, BLOCK=1024)
    for upper, wide in itertools.product(flags, flags):
        build(edge_masses_kernel, dtype, dtype, num_nodes=7, inverse=0.5, softness_inverse=4.0, IS_WIDE=wide, HAS_UPPER=upper, HAS_BUCKET=wide, F=F, NODES=8, BLOCK=256)
    for spec in specs:
        kind = dict(IS_CLIPPED=spec.is_clipped, FORMULA=kernels.triton_formula(spec.formula))
        share = {"share": spec.share}
        own_share = {"share": None} if spec.formula is not None and isinstance(spec.share, float) else share
        for remainder, edges, upper in itertools.product(REMAINDERS, flags, flags) if spec.is_clipped else [("bucket", False, False)]:
            num_sums = len(ClippedSum) if spec.is_clipped else spec.num_sums
            mask = dict(IS_BUCKET=remainder == "bucket", IS_NONE=remainder == "none", HAS_TOTALS=replace(spec, remainder=remainder).has_totals, HAS_UPPER=upper)
            build(kernels.sums_kernel, dtype, dtype, **(numbers | own_share), **kind, **mask, IS_TRUNCATE=remainder == "truncate", HAS_EDGES=edges, HAS_BUCKET=not edges, F=F, NUM_SUMS=num_sums, BLOCK=1024)
        for out, rest in itertools.product((dtype, "bf16") if F == 1 else (dtype,), flags):
            mask = dict(IS_BUCKET=rest, IS_NONE=not rest, HAS_TOTALS=rest, HAS_UPPER=rest)
            build(kernels.gradient_kernel, dtype, out, **(numbers | (own_share if rest else share)), **kind, **mask, HAS_BUCKET=rest, HAS_TOKEN=True, HAS_UNTEMPERED=rest, HAS_LABEL=rest, HAS_SPAN=rest, ADDS=not rest, F=F, BLOCK=1024)
print("compiled")
"""  # noqa: E501


@pytest.mark.skipif(not has_triton(), reason="the package triton is not installed")
def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", _COMPILE]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stdout.strip() == "compiled", result.stderr[-3000:]
