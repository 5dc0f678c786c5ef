#!/usr/bin/env bash
# The core with AddressSanitizer and UndefinedBehaviorSanitizer, and the tables of tests under it:
# the first report ends the run with its own exit code. PYTHON is the interpreter of an environment
# with the tests' packages; what is built goes to the folder named first, and replaces nothing.
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=$(realpath -m "${1:-output/sanitize}")
shift || true

"$python" -m pip --disable-pip-version-check --quiet install --no-build-isolation --no-deps \
  --upgrade --target "$folder/site" --config-settings=build-dir="$folder/build" \
  --config-settings=cmake.define.ADASPLASH2_SANITIZE=ON \
  --config-settings=install.strip=false .

# An editable install finds itself before PYTHONPATH: here it must not.
cat >"$folder/site/sitecustomize.py" <<'PROGRAM'
import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
PROGRAM

# The interpreter itself is not instrumented, so the runtime must come first. Python frees little
# at its end: leaks are not looked for.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=86:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:exitcode=86
export PYTHONPATH="$folder/site" PYTHONSAFEPATH=1 ADASPLASH2_BACKEND=cpu

"$python" - <<'PROGRAM'
import ctypes, sys
from adasplash2 import _core
print("sanitized core:", _core.__file__)
assert hasattr(ctypes.CDLL(_core.__file__), "__asan_version_mismatch_check_v8"), "not sanitized"
PROGRAM
exec "$python" -m pytest -q -p no:cacheprovider --only-backend cpu --expect-backends cpu \
  tests/test_attention.py tests/test_entmax.py tests/test_edges.py tests/test_language.py "$@"
