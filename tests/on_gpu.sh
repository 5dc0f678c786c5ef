#!/usr/bin/env bash
# What only a GPU can show, side by side where it may be: tests/on_gpu.sh OUTPUT [PROCESSES].
# PYTHON names the interpreter that has the package (default .venv/bin/python). Tests first, then
# compute-sanitizer, then what must have the GPU to itself: tuning and the benchmarks.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?where to write}") processes=${2:-8}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
export ADASPLASH2_CACHE_DIR="$out/cache" TRITON_CACHE_DIR="$out/triton" PYTHONUNBUFFERED=1

jobs=()
part() { # name, pytest arguments
  local name=$1
  shift
  "$python" -m pytest -q --tb=short -p no:cacheprovider "$@" >"$out/$name.txt" 2>&1 &
  jobs+=($!)
}
tables=(tests/test_attention.py tests/test_entmax.py tests/test_ops.py tests/test_determinism.py
  tests/test_dispatch.py tests/test_properties.py)
for ((i = 0; i < processes; i++)); do part "cuda$i" -k cuda --part "$i/$processes" "${tables[@]}"; done
for scan in hopper portable; do
  for ((i = 0; i < processes; i++)); do
    part "cuda-$scan$i" -k cuda --part "$i/$processes" --prefer "scan=$scan" tests/test_attention.py
  done
done
part configs tests/test_configs.py
part compile -m gpu tests/test_cuda_compile.py
wait "${jobs[@]}"
for ((i = 0; i < processes; i++)); do part "triton$i" -k triton --part "$i/$processes" "${tables[@]}"; done
wait "${jobs[@]}"
tail -qn 1 "$out"/*.txt

for tool in memcheck racecheck; do
  timeout 300 compute-sanitizer --tool $tool "$python" tests/small_calls.py >"$out/$tool.log" 2>&1
  grep -h "SUMMARY" "$out/$tool.log" || tail -n 3 "$out/$tool.log"
done

"$python" -m adasplash2 tune --quick --json >"$out/tune.json"
for program in first_call overhead; do
  "$python" benchmarks/$program.py --device cuda --json "$out/$program.json"
done
"$python" benchmarks/all.py --output "$out/benchmarks"
