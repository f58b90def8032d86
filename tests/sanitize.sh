#!/usr/bin/env bash
# Builds the module instrumented, in a copy of the package under build/sanitize, and runs the
# operators' tests on it. Any finding aborts the run. `make sanitize` calls this.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/sanitize
mkdir -p "$build/latentdem_ext"
cmake -S . -B "$build/cmake" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DLATENTDEM_SANITIZE=ON \
  -DLATENTDEM_CUDA=off -DPython_EXECUTABLE="$(command -v python)" \
  -DLATENTDEM_VERSION="$(python -c 'import importlib.metadata as m; print(m.version("latentdem"))')"
cmake --build "$build/cmake"
cp -r latentdem_ext/. "$build/latentdem_ext/"
cp "$build"/cmake/_C*.so "$build/latentdem_ext/"
# The runtime must come first in the process; libstdc++ with it, or exceptions go past it.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
LD_PRELOAD="$LD_PRELOAD $(g++ -print-file-name=libstdc++.so)"
export LD_PRELOAD
# Leaks are the interpreter's own. An absurd size must be refused, not end the process.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
export LATENTDEM_FUZZ="${LATENTDEM_FUZZ:-150}"
python - <<'PYTHON'
import sys
sys.path.insert(0, "build/sanitize")
import latentdem_ext._C as module
assert "build/sanitize" in module.__file__, module.__file__
PYTHON
# compile's own subprocesses and forked children are not what is tested here; gradcheck and
# opcheck call the same kernels hundreds of times more.
python -m pytest -q -p no:cacheprovider -o "pythonpath=build/sanitize tests python" \
  -k "not compile and not fork and not workers and not gradcheck and not opcheck and not memory" \
  "${@:-tests/ops}"
