#!/usr/bin/env bash
# Builds, tests and measures on a machine with a CUDA device, in at most 8 minutes. Offline: uses the
# Python, torch, nvcc, ninja and pytest that are there, installs nothing. Results go to $OUT, or to
# benchmarks/results/<device>.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
limit=480
reserve=120 # of it, for the benchmarks
failed=0

step() { printf '\n== %s (%ss) ==\n' "$1" "$SECONDS"; }

# within SECONDS COMMAND...: what does not end in time is left out, anything else that goes wrong is a
# failure; either way the next step has its turn.
within() {
  local seconds=$1 status=124
  shift
  if [ "$seconds" -gt 0 ]; then
    timeout --kill-after=5 "$seconds" "$@"
    status=$?
  fi
  case $status in
    0) ;;
    124) echo "left out (time)" ;;
    *) failed=1 ;;
  esac
}
before_benchmarks() { within $((limit - reserve - SECONDS)) "$@"; }

# What was compiled when the time is up is not compiled again by the next run.
step "build"
SBP_FAST_BUILD=cuda within $((limit / 2)) "$python" build_native.py
[ -e sbp_fast/_native/libsbp_fast_cuda.so ] || failed=1

step "doctor"
before_benchmarks "$python" -m sbp_fast doctor

# Without its CUDA library Triton is still tested and measured, but the outcome is a failure.
step "tests on the device"
SBP_FAST_REQUIRE=cuda,triton before_benchmarks "$python" -m pytest tests/gpu -q -p no:cacheprovider

# The slow tools see a few small cases of every kernel; the tests above see the rest. With torch's
# cache of memory off, every tensor is an allocation whose end memcheck knows.
sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 before_benchmarks \
      "$sanitizer" --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest tests/gpu -q -p no:cacheprovider -m sanitize
  done
else
  echo "compute-sanitizer was not found: memory checks on the device are left out"
fi

step "benchmarks"
within $((limit - SECONDS)) "$python" -m sbp_fast bench --device cuda --quick ${OUT:+--output "$OUT"}

step "done"
exit "$failed"
