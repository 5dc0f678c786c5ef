#!/usr/bin/env bash
# What only a GPU can show: tests/on_gpu.sh OUTPUT [STAGE...], by default all stages:
#   tests  every table of tests on each backend, as many side by side as there are cores, on all GPUs
#   fuzz   random problems, FUZZ_SECONDS for each backend and kind
#   tools  compute-sanitizer over one small call of each kind
#   speed  tuning and the benchmarks, which have the machine to themselves, after all that was begun
# PYTHON names the interpreter that has the package (default .venv/bin/python), PROCESSES how many run
# side by side, GPUS on how many (default all), PARTS into how many parts the tables go,
# BENCHMARK_SECONDS what all benchmarks together may take. All of it runs,
# whatever fails; what has failed is told at the end, and then the exit code is 1. RESUME=1 leaves out
# what passed in a run before that wrote to the same OUTPUT.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?where to write}")
shift
stages=("${@:-tests fuzz tools speed}")
python=${PYTHON:-.venv/bin/python} processes=${PROCESSES:-$(nproc)} seconds=${FUZZ_SECONDS:-300}
mkdir -p "$out"
export ADASPLASH2_CACHE_DIR="$out/cache" TRITON_CACHE_DIR="$out/triton" PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=2
gpus=${GPUS:-$(nvidia-smi -L | wc -l)} started=0
failed="$out/failed" passed="$out/passed"
: >"$failed"
[[ -n ${RESUME-} ]] || : >"$passed"
touch "$passed"

check() { # name, command: what it says goes to OUTPUT/name.txt
  local name=$1
  shift
  ! grep -qx "$name" "$passed" || return 0
  if "$@" >"$out/$name.txt" 2>&1; then
    echo "$name" >>"$passed"
  else
    echo "$name" >>"$failed"
  fi
}
beside() { # the same, beside others, when a core is free
  while (($(jobs -rp | wc -l) >= processes)); do wait -n; done
  CUDA_VISIBLE_DEVICES=$((started++ % gpus)) check "$@" &
}
part() { # name, backends that must be here, pytest arguments
  beside "$1" "$python" -m pytest -q --tb=short -p no:cacheprovider --together --expect-backends \
    "${@:2}"
}

tests() {
  # Kernels are compiled as the tests ask for them: Triton's take most of the time. The longest go
  # first.
  local tables=(tests/test_{language,attention,entmax,edges,ops,determinism,dispatch,properties,fuzz,kvcache,compat,features}.py)
  local parts=${PARTS:-$((processes < 48 ? 16 : processes / 3))} i scan whole
  local half=$(((parts + 1) / 2))
  for ((i = 0; i < parts; i++)); do
    part "triton$i" triton -k triton --part "$i/$parts" "${tables[@]}"
  done
  for ((i = 0; i < 4; i++)); do part "gpu$i" "" -m gpu --part "$i/4" tests; done
  for ((i = 0; i < parts; i++)); do
    part "cuda$i" cuda -k cuda --part "$i/$parts" "${tables[@]}"
  done
  for scan in hopper portable; do
    for ((i = 0; i < half; i++)); do
      part "cuda-$scan$i" cuda -k cuda --part "$i/$half" --prefer "scan=$scan" \
        tests/test_attention.py
    done
  done
  for whole in thresholds nothing; do
    for ((i = 0; i < half; i++)); do
      part "triton-$whole$i" triton -k triton --part "$i/$half" --prefer "whole=$whole" \
        tests/test_language.py
    done
  done
  part configs cuda,triton tests/test_configs.py
}

fuzz() {
  local backend kind
  for backend in cuda triton; do
    for kind in plain language; do
      beside "fuzz-$backend-$kind" "$python" tests/fuzz.py --backend $backend --kind $kind \
        --problems 20000 --seconds "$seconds"
    done
  done
}

tools() {
  local tool
  for tool in memcheck racecheck; do
    beside $tool timeout 300 compute-sanitizer --tool $tool --error-exitcode 1 \
      "$python" tests/small_calls.py
  done
}

speed() {
  wait
  "$python" -m adasplash2 tune --quick --json >"$out/tune.json" || echo tune >>"$failed"
  local program
  for program in first_call overhead; do
    check $program "$python" benchmarks/$program.py --device cuda --json "$out/$program.json"
    cat "$out/$program.txt"
  done
  check benchmarks "$python" benchmarks/all.py --output "$out/benchmarks" \
    ${BENCHMARK_SECONDS:+--seconds "$BENCHMARK_SECONDS"}
}

passes() { # what parts are called: how many tests of their backend have passed in all of them
  sed -n "s/^backend ${1%%-*}: \([0-9]*\) passed.*/\1/p" "$out/$1"[0-9]*.txt | awk '{ n += $1 } END { print n + 0 }'
}

for stage in ${stages[*]}; do
  declare -F "$stage" >/dev/null || { echo "no stage $stage: tests fuzz tools speed" && exit 2; }
  $stage
done
wait
tail -qn 1 "$out"/*.txt
if [[ " ${stages[*]} " == *" tests "* ]]; then
  for parts in cuda cuda-{hopper,portable} triton triton-{thresholds,nothing}; do
    echo "$parts: $(passes $parts) tests passed"
    (($(passes $parts))) || echo "$parts-passed-nothing" >>"$failed"
  done
fi
if [[ -s $failed ]]; then
  echo "failed: $(sort "$failed" | paste -sd ' ')"
  exit 1
fi
echo "all passed"
