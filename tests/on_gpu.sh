#!/usr/bin/env bash
# What only a GPU can show, side by side where it may be: tests/on_gpu.sh OUTPUT [PROCESSES].
# PYTHON names the interpreter that has the package (default .venv/bin/python). Tests first, then
# compute-sanitizer, then what must have the GPU to itself: tuning and the benchmarks. All of it runs,
# whatever fails; what has failed is told at the end, and then the exit code is 1.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?where to write}") processes=${2:-8}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
export ADASPLASH2_CACHE_DIR="$out/cache" TRITON_CACHE_DIR="$out/triton" PYTHONUNBUFFERED=1

failed=()
check() { # name, command: what it says goes to OUTPUT/name.txt
  local name=$1
  shift
  "$@" >"$out/$name.txt" 2>&1 || failed+=("$name")
}
declare -A jobs
part() { # name, backends that must be here, pytest arguments
  local name=$1 backends=$2
  shift 2
  "$python" -m pytest -q --tb=short -p no:cacheprovider --expect-backends "$backends" "$@" \
    >"$out/$name.txt" 2>&1 &
  jobs[$name]=$!
}
join() {
  for name in "${!jobs[@]}"; do wait "${jobs[$name]}" || failed+=("$name"); done
  jobs=()
}
tables=(tests/test_attention.py tests/test_entmax.py tests/test_ops.py tests/test_determinism.py
  tests/test_dispatch.py tests/test_properties.py tests/test_fuzz.py)
for ((i = 0; i < processes; i++)); do
  part "cuda$i" cuda -k cuda --part "$i/$processes" "${tables[@]}"
done
for scan in hopper portable; do
  for ((i = 0; i < processes; i++)); do
    part "cuda-$scan$i" cuda -k cuda --part "$i/$processes" --prefer "scan=$scan" \
      tests/test_attention.py
  done
done
part configs cuda,triton tests/test_configs.py
part compile cuda,triton -m gpu tests/test_cuda_compile.py
join
for ((i = 0; i < processes; i++)); do
  part "triton$i" triton -k triton --part "$i/$processes" "${tables[@]}"
done
join
tail -qn 1 "$out"/*.txt

for backend in cuda triton; do
  check "fuzz-$backend" "$python" tests/fuzz.py --backend $backend --problems 20000 --seconds 300
  tail -n 1 "$out/fuzz-$backend.txt"
done

for tool in memcheck racecheck; do
  check $tool timeout 300 compute-sanitizer --tool $tool --error-exitcode 1 \
    "$python" tests/small_calls.py
  grep -h "SUMMARY" "$out/$tool.txt" || tail -n 3 "$out/$tool.txt"
done

"$python" -m adasplash2 tune --quick --json >"$out/tune.json" || failed+=(tune)
for program in first_call overhead; do
  check $program "$python" benchmarks/$program.py --device cuda --json "$out/$program.json"
  cat "$out/$program.txt"
done
check benchmarks "$python" benchmarks/all.py --output "$out/benchmarks"

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed"
