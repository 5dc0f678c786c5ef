#!/usr/bin/env bash
# What only a GPU can show: tests/on_gpu.sh OUTPUT [STAGE...], by default all stages:
#   tests  every table of tests on each backend, as many side by side as there are cores, on all GPUs
#   fuzz   random problems, FUZZ_SECONDS for each backend and kind
#   tools  compute-sanitizer over one small call of each kind
#   speed  tuning and the benchmarks, which have the machine to themselves, after all that was begun
# PYTHON names the interpreter that has the package (default .venv/bin/python), PROCESSES how many run
# side by side, GPUS on how many (default all), PARTS into how many parts the tables go,
# BENCHMARK_SECONDS what all benchmarks together may take, MAY_SKIP for which further reason tests may
# be skipped (tests/conftest.py has those that are always allowed). All of it runs, whatever fails;
# what has failed is told at the end, and then the exit code is 1; it is 2 where nothing could begin.
# RESUME=1 leaves out what passed in a run before that wrote to the same OUTPUT.
set -u
cd "$(dirname "$0")/.."
stop() {
  echo "$1" >&2
  exit 2
}
out=$(realpath -m "${1:?where to write}")
shift
known="tests fuzz tools speed"
set -- ${*:-$known}
for stage in "$@"; do
  [[ " $known " == *" $stage "* ]] || stop "no stage $stage: $known"
done
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || stop "no GPU: nvidia-smi -L lists none, and GPUS does not say how many there are"
python=${PYTHON:-.venv/bin/python} processes=${PROCESSES:-$(nproc)} seconds=${FUZZ_SECONDS:-300}
parts=${PARTS:-$((processes < 24 ? 32 : processes * 4 / 3))} started=0
[[ $parts =~ ^[1-9][0-9]*$ ]] || stop "PARTS must be a number above 0, got $parts"
mkdir -p "$out"
export ADASPLASH2_CACHE_DIR="$out/cache" TRITON_CACHE_DIR="$out/triton" PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=2
begun="$out/begun" failed="$out/failed" passed="$out/passed"
: >"$begun"
: >"$failed"
[[ -n ${RESUME-} ]] || rm -f "$passed"
# A part that has passed is that part again only where there are as many.
[[ ! -s $passed || $(cat "$out/parts" 2>/dev/null) == "$parts" ]] ||
  stop "RESUME: what has passed is of a run with other PARTS"
echo "$parts" >"$out/parts"
touch "$passed"

# The tables of tests: files with tests that each backend has to pass.
tables=(tests/test_{language,attention,entmax,edges,ops,determinism,dispatch,properties,fuzz,kvcache,decoding,compat,features,judge}.py)

# Every check that is begun has its name in `begun` first, and must end in `passed` or `failed`: one
# that dies without a word is found at the end. It passes where its exit code is 0 and what it says,
# which goes to OUTPUT/name.txt, has these words: a program that does nothing passes nothing.
check() { # name, words, command
  echo "$1" >>"$begun"
  concluded "$@"
}
concluded() {
  local name=$1 words=$2
  shift 2
  ! grep -qFx "$name" "$passed" || return 0
  if "$@" >"$out/$name.txt" 2>&1 && grep -Eq "$words" "$out/$name.txt"; then
    echo "$name" >>"$passed"
  else
    echo "$name" >>"$failed"
  fi
}
beside() { # the same, beside others, when a core is free
  while (($(jobs -rp | wc -l) >= processes)); do wait -n; done
  echo "$1" >>"$begun"
  local gpu=$((started++ % gpus)) # not in what follows, which a process of its own evaluates
  CUDA_VISIBLE_DEVICES=$gpu concluded "$@" &
}
part() { # name, pytest arguments
  beside "$1" '[0-9]+ (passed|skipped).* in [0-9.]+s' "$python" -m pytest -q --tb=short \
    -p no:cacheprovider --together --expect-backends cuda,triton --judge-skips \
    ${MAY_SKIP:+--may-skip "$MAY_SKIP"} "${@:2}"
}

tests() {
  # Kernels are compiled as the tests ask for them: Triton's take most of the time. The longest go
  # first, of a table its last parts. Tests that are of no backend are parts of their own, those that
  # are marked `gpu` others, with all of their kind from files that are no table. Whole rows are those
  # of 16 bits: other dtypes meet the same kernels whatever is preferred of them.
  local i scan whole few=$(((parts + 3) / 4))
  for ((i = parts - 1; i >= 0; i--)); do
    part "triton$i" --only-backend triton --part "$i/$parts" "${tables[@]}"
  done
  for ((i = 0; i < 8; i++)); do part "gpu$i" -m gpu --part "$i/8" tests; done
  for ((i = 0; i < parts; i++)); do
    part "cuda$i" --only-backend cuda --part "$i/$parts" "${tables[@]}"
  done
  for scan in hopper portable; do
    for ((i = 0; i < few; i++)); do
      part "cuda-$scan$i" --only-backend cuda --part "$i/$few" --prefer "scan=$scan" \
        tests/test_attention.py
    done
  done
  for whole in thresholds nothing; do
    for ((i = 0; i < few; i++)); do
      part "triton-$whole$i" --only-backend triton --part "$i/$few" --prefer "whole=$whole" \
        --without dtype=torch.float32,torch.float64 tests/test_language.py
    done
  done
  for ((i = 0; i < 4; i++)); do
    part "rest$i" --only-backend none -m "not gpu" --part "$i/4" "${tables[@]}"
  done
  part configs tests/test_configs.py
}

fuzz() {
  local backend kind
  for backend in cuda triton; do
    for kind in plain language; do
      beside "fuzz-$backend-$kind" '^0 of [1-9][0-9]* failed' \
        "$python" tests/fuzz.py --backend $backend --kind $kind --problems 20000 --seconds "$seconds"
    done
  done
}

tools() {
  # Not racecheck of Triton: where a row's number lies in several threads its compiler lets each of
  # them write it to the same place, which racecheck takes for a race (Triton 3.6, four such places).
  local of
  for of in memcheck-cuda racecheck-cuda memcheck-triton; do
    beside "$of" 'SUMMARY: ' timeout 300 compute-sanitizer --tool "${of%-*}" \
      --error-exitcode 1 "$python" tests/small_calls.py "${of#*-}"
  done
}

tune() {
  "$python" -m adasplash2 tune --quick --json >"$out/tune.json" && wc -c "$out/tune.json"
}

speed() {
  wait
  check tune '^[1-9][0-9]* ' tune
  local program
  for program in first_call overhead; do
    check $program . "$python" benchmarks/$program.py --device cuda --json "$out/$program.json"
    cat "$out/$program.txt"
  done
  check benchmarks . "$python" benchmarks/all.py --output "$out/benchmarks" \
    ${BENCHMARK_SECONDS:+--seconds "$BENCHMARK_SECONDS"}
}

texts() { # what parts are called: the files of those that were begun
  grep -Ex "$1[0-9]*" "$begun" | sort -u | sed "s|.*|$out/&.txt|"
}
counted() { # what parts are called, backend, outcome: of how many of its tests in all of them
  texts "$1" | xargs -r -d '\n' sed -nE "s/^backend $2: (.* )?([0-9]+) $3.*/\2/p" 2>/dev/null |
    awk '{ n += $1 } END { print n + 0 }'
}
told() { # what parts are called, backend: its tests; it fails where none has passed
  local name=$1 count
  [[ $1 == "$2" || $1 == "$2"-* || $2 == none ]] || name="$1 $2"
  count=$(counted "$1" "$2" passed)
  echo "$name: $count tests passed, $(counted "$1" "$2" skipped) skipped"
  ((count)) || echo "${name// /-}-passed-nothing" >>"$failed"
}

for stage in "$@"; do $stage; done
wait
texts '.*' | xargs -r -d '\n' tail -qn 1 2>/dev/null
if [[ " $* " == *" tests "* ]]; then
  for backend in cuda triton; do
    case $backend in cuda) kinds=(hopper portable) ;; *) kinds=(thresholds nothing) ;; esac
    for name in $backend "${kinds[@]/#/$backend-}" gpu configs; do told "$name" "$backend"; done
  done
  told rest none
fi
sort -u "$begun" | grep -Fxv -f "$passed" -f "$failed" | sed 's/$/-ended-without-a-word/' >"$out/lost"
cat "$out/lost" >>"$failed"
[[ -s $begun ]] || echo "nothing-was-begun" >>"$failed"
if [[ -s $failed ]]; then
  echo "failed: $(sort "$failed" | paste -sd ' ')"
  exit 1
fi
echo "all passed"
