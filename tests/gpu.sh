#!/usr/bin/env bash
# Everything that needs a GPU, in about ten minutes on one card; measurements at full size are in docs/benchmarks.
#   bash tests/gpu.sh [test] [smoke] [benchmark]      (none: all three)
# PYTHON names the interpreter (default: the clone's .venv, else python3), OUT a folder for runs and tables.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
out=${OUT:-runs/gpu}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
failed=()

step() { # NAME COMMAND ...
    local name=$1 begin=$SECONDS
    shift
    mkdir -p "$out"
    if "$@" >"$out/$name.log" 2>&1; then echo "ok      $name ($((SECONDS - begin)) s)"; return; fi
    failed+=("$name")
    echo "FAILED  $name ($((SECONDS - begin)) s): $out/$name.log"
    tail -n 5 "$out/$name.log"
}

run_test() {
    step tests "$python" -m pytest -q -n 4 tests/unit/test_losses_cuda.py tests/unit/test_decoding_cuda.py tests/unit/test_padding_free_cuda.py \
        tests/unit/test_losses_backends.py tests/unit/test_triton_compiles.py
}

run_smoke() {
    local run=$out/smoke launch=("$python" -m deepspeed.launcher.runner launchers/run.sh --config configs/smoke.yaml)
    local settings=("run.dir=$run" model.student.dtype=bf16 model.teacher.dtype=bf16)
    rm -rf "$run" "$out/answers.jsonl"
    step smoke "${launch[@]}" "${settings[@]}"
    step resume "${launch[@]}" "${settings[@]}" train.max_steps=26
    step generate "$python" -m megadistill generate --model "$run" --input runs/assets/smoke_0/data/test.jsonl \
        --output "$out/answers.jsonl" --max-prompt-tokens 64 --long-prompt truncate --max-new-tokens 16
    step evaluate "$python" -m megadistill evaluate --config "$run/resolved.yaml" --model "$run"
}

run_benchmark() {
    local small=(--device cuda --models small --vocab 8192 --rounds 2)
    step loss "$python" tools/benchmark.py loss --device cuda --dtype bfloat16 --tokens 1024 --vocab 32768 --hidden 512 \
        --tp 1 --output "$out/loss.json"
    step rollout "$python" tools/benchmark.py rollout "${small[@]}" --rows 8 --dtype bfloat16 --output "$out/rollout.json"
    step step "$python" tools/benchmark.py step "${small[@]}" --output "$out/step.json"
}

nvidia-smi --query-gpu=name --format=csv,noheader || { echo "tests/gpu.sh: no GPU here" >&2; exit 2; }
[ $# -gt 0 ] || set -- test smoke benchmark
for part in "$@"; do
    case $part in
    test | smoke | benchmark) "run_$part" ;;
    *) echo "tests/gpu.sh: unknown argument '$part'; allowed: test, smoke, benchmark" >&2; exit 2 ;;
    esac
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
