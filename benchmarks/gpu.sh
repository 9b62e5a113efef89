#!/usr/bin/env bash
# Builds, tests and measures on a machine with a CUDA device. Offline: uses the Python, torch, nvcc, ninja
# and pytest that are there, installs nothing. Results go to $OUT, or to
# benchmarks/results/<device>.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=0

step() { printf '\n== %s (%ss) ==\n' "$1" "$SECONDS"; }

step "build"
SBP_FAST_BUILD=cuda "$python" setup.py -q build_ext --inplace || exit 1

step "doctor"
"$python" -m sbp_fast doctor || failed=1

step "tests on the device"
"$python" -m pytest tests/gpu -q -p no:cacheprovider || failed=1

# The slow tools see a few small cases of every kernel; the tests above see the rest.
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool"
    timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest tests/gpu -q -p no:cacheprovider -m sanitize || failed=1
  done
else
  echo "compute-sanitizer was not found: memory checks on the device are left out"
fi

step "benchmarks"
"$python" -m sbp_fast bench --device cuda --quick ${OUT:+--output "$OUT"} || failed=1

step "done"
exit "$failed"
