"""Loading on several ranks: what each reads and holds, one reader a node, one download a node."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.preload import preload
from tests.support.runs import join_deepspeed
from tests.support.spawn import run_fresh, run_ranks
from tools.benchmarks.loading import FILE_TYPES, LAYOUTS, TYPES, load_and_measure, write_checkpoint

V = 500
SIZES = {"hidden": 512, "layers": 6, "vocab": 8000}  # 51 MB in two bytes a weight; the largest tensor has 8
_SLACK = 6e6  # small objects, gloo's buffers, pages of the allocator


def _forget_groups() -> None:
    from deepspeed.utils import groups

    for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "mpu"):
        setattr(groups, name, None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    preload()

    base = tmp_path_factory.mktemp("models")
    for name, dtype in FILE_TYPES.items():
        write_checkpoint(base / name, dtype, **SIZES)
    write_checkpoint(base / "small", torch.float16, 64, 2, V + 1)
    return {folder.name: folder for folder in base.iterdir()}


def _measure(rank: int, folders: dict[str, Path], tp_size: int) -> list[dict[str, float]]:
    from megadistill.parallel.context import ParallelContext

    # Every tensor gets pages of its own, which go back to the system: what is measured is what is held.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    join_deepspeed(rank)
    context = ParallelContext.build(tp_size, 300, torch.device("cpu"))
    load_and_measure(context, folders["small"], "fp32", "teacher", "map")  # what libraries load late
    return [load_and_measure(context, folders[files], run, "teacher", "map") for files, run in TYPES]


@pytest.mark.parametrize(("tp_size", "dp_size"), LAYOUTS)
def test_a_rank_holds_its_slice_and_two_tensors_at_most(folders: dict[str, Path], tp_size: int, dp_size: int) -> None:
    """Whatever the type of the files; and with ZeRO-3, not more than it keeps in the end."""
    for tp_rank, ranks in enumerate(run_ranks(_measure, tp_size * dp_size, folders, tp_size, timeout_s=600)):
        for (files, run), found in zip(TYPES, ranks, strict=True):
            case = f"{files} -> {run}, rank {tp_rank}: {found}"
            assert found["anonymous"] <= found["kept"] + 2 * found["largest"] + _SLACK, case
            assert found["anonymous"] >= 0.9 * found["kept"], f"{case}: this would measure nothing"
            assert found["kept"] <= found["shard"] / dp_size + 1e4, case
            assert found["read"] <= found["shard_in_files"] / dp_size + 1e5, case  # small parameters are whole on each


def _fill(rank: int, folder: Path, read: Any, zero_stage: int) -> dict[str, Any]:
    """A student of tp 2: its numbers, the bytes of files that this rank read, and the broadcasts."""
    import torch.distributed as dist

    from megadistill.config.schema import OptimSection, TrainSection
    from megadistill.engines.local_state import local_parts
    from megadistill.engines.student import trained_model
    from megadistill.models.loading import load_model_on_ranks
    from megadistill.parallel.context import ParallelContext
    from megadistill.parallel.node import Node

    join_deepspeed(rank)
    context = ParallelContext.build(2, 60, torch.device("cpu"))
    node = Node.build(context, has_group=read == "copy")
    assert (node.ranks, node.rank) == ((0, 1), rank) and (node.group is not None) == (read == "copy")
    loaded = load_model_on_ranks(
        str(folder), node, dtype="bf16", vocab_size=V, seed=0, attention="sdpa", where="x", read=read
    )
    reader: Any = loaded.weights
    train = TrainSection(global_batch_size=1, micro_batch_size=1)
    sent, broadcast = [], dist.broadcast

    def counting(tensor: torch.Tensor, *more: Any, **named: Any) -> Any:
        if named.get("group") is node.group is not None:
            sent.append(tensor.nbytes)
        return broadcast(tensor, *more, **named)

    dist.broadcast = counting  # type: ignore[assignment]
    student = trained_model(loaded, context, zero_stage=zero_stage, dtype="bf16", optim=OptimSection(), train=train)
    dist.broadcast = broadcast
    masters = {part.name: part.tensors["master"].float().sum().item() for part in local_parts(student.engine)}
    weights = {
        name: getattr(parameter, "ds_tensor", parameter).data.double().square().sum().item()
        for name, parameter in student.module.named_parameters()
    }
    assert student.loaded.weights is None, "nothing keeps the files open"
    return {"masters": masters, "weights": weights, "read": reader.bytes_read, "sent": sent}


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_node_reads_its_files_once(folders: dict[str, Path], zero_stage: int) -> None:
    """``copy``: one rank reads every tensor once and sends it once; the numbers are those of mapped files."""
    from safetensors import safe_open

    with safe_open(folders["small"] / "model-00001-of-00001.safetensors", "pt") as file:
        sizes = [file.get_tensor(key).nbytes for key in file.offset_keys()]
    mapped = run_ranks(_fill, 2, folders["small"], "map", zero_stage)
    copied = run_ranks(_fill, 2, folders["small"], "copy", zero_stage)
    assert [found["read"] for found in copied] == [sum(sizes), 0]
    assert [found["sent"] for found in copied] == [sizes, sizes], "in the order of the file"
    assert all(found["sent"] == [] and found["read"] < sum(sizes) for found in mapped)
    for ours, theirs in zip(copied, mapped, strict=True):
        assert ours["masters"] == theirs["masters"] and ours["weights"] == theirs["weights"]


def _shard_peak(folders: dict[str, Path], folder: Path) -> dict[str, float]:
    """Highest memory of splitting the large model, after a small one (what libraries load late)."""
    from megadistill.checkpoint.reshard import shard_model
    from tools.benchmarks.loading import peak_memory

    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    shard_model(str(folders["small"]), folder / "small", tp_size=1, dp_size=1, dtype="bf16")
    with peak_memory() as peak:
        shard_model(str(folders["fp16"]), folder / "big", tp_size=2, dp_size=2, dtype="bf16")
    return peak


def test_shard_holds_one_share(folders: dict[str, Path], tmp_path: Path) -> None:
    """float16 to bfloat16; the proof included, which reads the written model one module at a time."""
    from tests.support.tokenizers import byte_level

    for name in ("small", "fp16"):
        byte_level(folders[name])

    peak = run_fresh(_shard_peak, folders, tmp_path)
    share = max(file.stat().st_size for file in (tmp_path / "big" / "shards").glob("tp*.safetensors"))
    removed = (tmp_path / "big" / "shards" / "removed_rows.safetensors").stat().st_size
    largest = SIZES["vocab"] * SIZES["hidden"] * 2
    assert 0.9 * share < peak["anonymous"] <= share + removed + 2 * largest + _SLACK, peak


# Hub names.


def _fake_hub(rank: int, source: Path, cache: Path, is_broken: bool) -> list[str]:
    """Loads owner/model from a hub that is a folder; returns which files this rank downloaded."""
    import transformers.utils.hub as transformers_hub
    from huggingface_hub import constants

    from megadistill.models import loading
    from megadistill.parallel.context import ParallelContext
    from megadistill.parallel.node import Node

    snapshot = cache / "models--owner--model" / "snapshots" / ("0" * 40)
    asked: list[str] = []
    cached = transformers_hub.cached_files

    def download(path_or_repo_id: str, filenames: list[str], **options: Any) -> Any:
        """As transformers', which finds a file in the cache or asks the network for it."""
        for file in filenames if not constants.HF_HUB_OFFLINE else []:
            asked.append(file)
            if is_broken:
                raise OSError("403 Forbidden: the model is gated")
            if (source / file).exists():
                shutil.copy(source / file, snapshot / file)
            else:
                marker = cache / "models--owner--model" / ".no_exist" / ("0" * 40) / file
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
        before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
        try:
            return cached(path_or_repo_id, filenames, **options | {"cache_dir": str(cache)})
        finally:
            constants.HF_HUB_OFFLINE = before

    config = loading.load_model_config(str(source), "x")
    constants.HF_HUB_OFFLINE = False
    transformers_hub.cached_files = download
    loading.load_model_config = lambda path, where: config  # type: ignore[assignment]  # its files are small
    node = Node.build(ParallelContext.build(1, 60, torch.device("cpu")))
    loaded = loading.load_model_on_ranks(
        "owner/model", node, dtype="fp32", vocab_size=V, seed=0, attention="sdpa", where="x"
    )
    assert not constants.HF_HUB_OFFLINE
    model, expected = loading.whole_model(loaded, torch.device("cpu")), {}
    from safetensors.torch import load_file

    for file in source.glob("*.safetensors"):
        expected |= load_file(file)
    assert all(torch.equal(p.data, expected[n][: len(p)].float()) for n, p in model.named_parameters())
    return asked


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    repository = tmp_path / "models--owner--model"
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    return tmp_path


def test_a_hub_name_is_downloaded_once_a_node(folders: dict[str, Path], hub_cache: Path) -> None:
    first, second = run_ranks(_fake_hub, 2, folders["small"], hub_cache, False)
    assert second == [], "it reads the cache"
    files = json.loads((folders["small"] / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert first == ["model.safetensors", "model.safetensors.index.json", *sorted(set(files.values()))]


def test_what_fails_for_the_one_that_downloads_ends_all(folders: dict[str, Path], hub_cache: Path) -> None:
    def body(rank: int) -> str:
        from megadistill.errors import ConfigError

        with pytest.raises(ConfigError) as error:
            _fake_hub(rank, folders["small"], hub_cache, True)
        return str(error.value)

    line = "x: cannot download the weights of 'owner/model': 403 Forbidden: the model is gated"
    assert run_ranks(body, 2) == [line, line]
    assert os.listdir(hub_cache / "models--owner--model" / "snapshots" / ("0" * 40)) == []
