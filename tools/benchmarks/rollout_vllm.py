"""vLLM as a contender of the rollout benchmark: its own process, in its own environment, because it pins torch.

    PYTHON_OF_VLLM tools/benchmarks/rollout_vllm.py MODEL_FOLDER PROMPTS.json NEW_TOKENS DEVICE DTYPE

Reads a line on standard input for each rollout that is wanted, and answers with its seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_READY = "ready"


class VllmRollout:
    """The benchmark's side: starts the process, asks for rollouts.

    Args:
        python: The interpreter of an environment that has vLLM.
        folder: For the model and the prompts.
        model: A transformers model.
        prompts: Token ids.
        new_tokens: Tokens of each response.
        device: "cpu" or "cuda".

    Raises:
        RuntimeError: The process ended before it was ready.
    """

    def __init__(
        self, python: Path, folder: Path, model: Any, prompts: Sequence[tuple[int, ...]], new_tokens: int, device: str
    ) -> None:
        model.save_pretrained(folder / "student")
        (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
        dtype = str(model.dtype).removeprefix("torch.")
        words = [str(folder / "student"), str(folder / "prompts.json"), str(new_tokens), device, dtype]
        self._log = folder / "vllm.log"
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [str(python), str(Path(__file__).resolve()), *words],
                env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
            )  # fmt: skip
        if self._answer() != _READY:
            self.close()
            raise RuntimeError(f"vLLM did not start: {self._last_line()}")

    def seconds(self) -> float:
        """One rollout of all prompts."""
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)
        answer = self._answer()
        if not answer:
            raise RuntimeError(f"vLLM ended: {self._last_line()}")
        return float(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # vLLM prints there too
            if line.startswith("answer "):
                return line.removeprefix("answer ").strip()
        return ""

    def _last_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"


def _serve(model: str, prompts_file: str, new_tokens: str, device: str, dtype: str) -> None:
    """vLLM's side; nothing of this project is imported."""
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    vllm = importlib.import_module("vllm")  # never in the project's environment, so mypy cannot know it
    prompts = json.loads(Path(prompts_file).read_text(encoding="utf-8"))
    longest = max(map(len, prompts)) + int(new_tokens)
    engine = vllm.LLM(
        model=model, dtype=dtype, max_model_len=longest, skip_tokenizer_init=True, enable_prefix_caching=False,
        seed=0, **({"block_size": 32, "enforce_eager": True} if device == "cpu" else {"gpu_memory_utilization": 0.4}),
    )  # fmt: skip
    sampling = vllm.SamplingParams(temperature=1.0, max_tokens=int(new_tokens), ignore_eos=True, detokenize=False)
    print(f"answer {_READY}", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        assert all(len(one.outputs[0].token_ids) == int(new_tokens) for one in found)
        print(f"answer {time.perf_counter() - begin}", flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
