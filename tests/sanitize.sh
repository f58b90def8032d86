#!/usr/bin/env bash
# Builds the module instrumented, in a copy of the package under build/sanitize, and runs the
# operators' tests on it: one line for each file and instruction set, and failure if any of them
# found something. `make sanitize` calls this; arguments are the test files, by default all.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/sanitize
mkdir -p "$build/latentdem_ext" "$build/logs"
cmake -S . -B "$build/cmake" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DLATENTDEM_SANITIZE=ON \
  -DLATENTDEM_CUDA=off -DPython_EXECUTABLE="$(command -v python)" \
  -DLATENTDEM_VERSION="$(python -c 'import importlib.metadata as m; print(m.version("latentdem"))')"
cmake --build "$build/cmake"
cp -r latentdem_ext/. "$build/latentdem_ext/"
cp "$build"/cmake/_C*.so "$build/latentdem_ext/"
echo "build: $SECONDS s"

# The runtime must come first in the process; libstdc++ with it, or exceptions go past it.
runtime="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
runtime="$runtime $(g++ -print-file-name=libstdc++.so)"
# Leaks are the interpreter's own. An absurd size must be refused, not end the process. Reports go
# to files of their own, where pytest cannot swallow them.
rm -f "$build"/logs/*
report="$PWD/$build/logs/report"
export ASAN_OPTIONS="detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:log_path=$report"
export UBSAN_OPTIONS="print_stacktrace=1:log_path=$report"
export LATENTDEM_FUZZ="${LATENTDEM_FUZZ:-150}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
widest=$(LD_PRELOAD="$runtime" python - <<'PYTHON'
import sys
sys.path.insert(0, "build/sanitize")
import latentdem_ext as ext
assert "build/sanitize" in ext.__file__, ext.__file__
print(ext.build_info()["cpu_capability"])
PYTHON
)

# compile's own subprocesses and forked children are not what is tested here; gradcheck and
# opcheck call the same kernels hundreds of times more.
left_out="not compile and not fork and not workers and not gradcheck and not opcheck and not memory"
findings=0

check() { # instruction set, test file
  local started=$SECONDS status=0 log found
  log="$build/logs/$(basename "$2" .py)-$1.log"
  LATENTDEM_CPU_CAPABILITY="$1" LD_PRELOAD="$runtime" \
    python -m pytest -q -p no:cacheprovider \
    -o "pythonpath=build/sanitize tests python" -k "$left_out" "$2" >"$log" 2>&1 || status=$?
  # A warning, that an absurd size was refused, is none.
  if [ "$status" -eq 0 ] && ! grep -qsE "ERROR: |runtime error:" "$report".*; then
    rm -f "$report".*
    echo "ok    $1 $2: $(tail -n 1 "$log")"
    return
  fi
  findings=$((findings + 1))
  echo "FOUND $1 $2: status $status after $((SECONDS - started)) s, see $log"
  grep -E "^(FAILED|ERROR)" "$log" | head -n 10 || true
  for found in "$report".*; do
    [ -e "$found" ] || continue
    head -n 15 "$found" | cut -c 1-160
    mv "$found" "$log.report"
  done
}

files=("$@")
[ $# -gt 0 ] || files=(tests/ops/test_*.py)
for file in "${files[@]}"; do check "$widest" "$file"; done
# Kernels that are compiled once per instruction set, in the narrower ones.
if [ $# -eq 0 ]; then
  for isa in avx2 default; do
    [ "$isa" != "$widest" ] || continue
    for family in blur kernel_map varying_blur volume_render; do
      check "$isa" "tests/ops/test_$family.py"
    done
  done
fi
echo "total: $SECONDS s, $findings with findings"
[ "$findings" -eq 0 ]
