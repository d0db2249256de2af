#!/usr/bin/env bash
# The whole GPU round on a bare machine that has torch and Triton, in at most 10 minutes and without a network:
#   [OUT=folder] [BENCH_COMMIT=hash] [PYTHON=python3] [PEERS=1 WHEELS=folder] bash benchmarks/gpu.sh
# Every phase has its own time limit, so that one that hangs leaves the later ones their time; what no session has measured
# yet comes first. The exit status is 0 where every phase passed. OUT (default benchmarks/results, where only the rows
# belong in a commit) receives two files: rows (gpu.jsonl) and, phase after phase, what was printed (gpu.log). PEERS=1
# adds a phase of 4 minutes that measures other libraries, installed from the wheels in WHEELS (what
# benchmarks/peers/environments.py names for bergson and kronfluence; from there, liger-kernel and jvp_flash_attention
# also join benchmarks.large); PEERS=only builds and does nothing else.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
ROWS="$OUT/gpu.jsonl" LOG="$OUT/gpu.log" LOGS=$(mktemp -d)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
mkdir -p "$OUT"
SUMMARY=()
FAILED=0

phase() { # name, seconds, command...: run it, keep its log, note how it ended
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  echo "=== $name"
  # An interrupted pytest says what has failed so far; a terminated one says nothing.
  timeout --signal=INT --kill-after=5 "$limit" "$@" >"$LOGS/$name.log" 2>&1 || status=$?
  { echo "=== $name"; cat "$LOGS/$name.log"; } >>"$LOG"
  tail -n "${SHOWN:-6}" "$LOGS/$name.log"
  local verdict=ok
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then verdict="TIMED OUT after $limit s"
  elif [ "$status" -ne 0 ]; then verdict="FAILED (exit status $status)"; fi
  [ "$verdict" = ok ] || FAILED=1
  SUMMARY+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - start)) "$verdict")")
}

skip() { SUMMARY+=("$(printf '%-12s    - s  skipped: %s' "$1" "$2")"); }

peers() { # other libraries beside u2a_fast; the limit is for what --seconds does not end
  SHOWN=200 phase peers 270 "$PYTHON" -m benchmarks.peers --device cuda --seconds 240 ${WHEELS:+--wheels "$WHEELS"} --out "$ROWS"
}

finish() {
  printf '%s\n' "=== summary" "${SUMMARY[@]}"
  exit "$FAILED"
}

# Without a compiler the package works, more slowly: here that is a failure.
phase build 60 bash -c '"$0" setup.py -q build_ext --inplace && exec "$0" -c "import torch, u2a_fast._C"' "$PYTHON"
if [ "${PEERS:-}" = only ]; then
  peers
  finish
fi
RIVALS=
if [ -n "${WHEELS:-}" ]; then # kernels of others that benchmarks.large times beside ours
  RIVALS=$(mktemp -d)
  "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$RIVALS" --find-links "$WHEELS" liger-kernel jvp_flash_attention
fi
PYTHONPATH="$PYTHONPATH${RIVALS:+:$RIVALS}" SHOWN=40 phase large 100 "$PYTHON" -m benchmarks.large --rounds 5 --out "$ROWS"
phase Llama-3.2-1B 45 "$PYTHON" -m benchmarks.throughput --like meta-llama/Llama-3.2-1B --device cuda --out "$ROWS"
phase Llama-3.1-8B 60 "$PYTHON" -m benchmarks.throughput --like meta-llama/Llama-3.1-8B --device cuda --out "$ROWS"
WORKERS=()
"$PYTHON" -c "import xdist" 2>/dev/null && WORKERS=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
# The interpreter's tests and those of C++ need no GPU, and Triton 3.6's interpreter no numpy from 2.4 on.
phase pytest 90 "$PYTHON" -m pytest -q "${WORKERS[@]}" -p no:cacheprovider -k "not in_the_interpreter" \
  tests/test_triton.py tests/test_cuda.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 phase "$tool" 50 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m benchmarks.sanitize
  done
else
  skip memcheck "no compute-sanitizer"
  skip racecheck "no compute-sanitizer"
fi
SHOWN=200 phase benchmarks 90 "$PYTHON" -m benchmarks.run --device cuda --threads "$(nproc)" --out "$ROWS"
if [ ! -s "$ROWS" ]; then
  skip profile "no rows"
elif command -v ncu >/dev/null && ncu --version >/dev/null 2>&1; then
  phase profile 40 ncu --clock-control none --set basic --launch-count 6 \
    --kernel-name 'regex:(attention|queries|keys|ghost_dot|gram|tile|logprob|jvp|dz|matmul|combine|tangents)_kernel' "$PYTHON" -m benchmarks.slowest --rows "$ROWS"
else
  phase profile 40 "$PYTHON" -m benchmarks.slowest --rows "$ROWS" --profile
fi
[ "${PEERS:-}" != 1 ] || peers
finish
