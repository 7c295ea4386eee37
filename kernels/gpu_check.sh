#!/usr/bin/env bash
# Everything about the CUDA kernels that needs a GPU, in under ten minutes: builds them for it, tests them against their
# definitions, looks for memory errors and races, measures them beside Megatron Core, and rewrites kernels/BENCH.md.
#
#   bash kernels/gpu_check.sh            PYTHON=/path/to/python for another environment
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD

echo "== build"
MEGACPT_CUDA_ARCHS=native "$PYTHON" setup.py -q build_ext --inplace
"$PYTHON" -m megacpt.ops.native_cuda

echo "== tests"
"$PYTHON" -m pytest -q -n 0 tests/gpu

echo "== compute-sanitizer"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
      "$PYTHON" -m pytest -q -n 0 -p no:cacheprovider tests/gpu \
      -k "softmax-True-1-shape3-dtype1 or sigmoid-True-4-shape6-dtype1 or steps[31-dtype1] or 5000-31-33-dtype1 \
or definition[dtype0-out_dtype0] or definition[500-1024-500-8-17] or definition[11008-1032-2-1-1]"
  done
  sanitizer="memcheck and racecheck found nothing"
else
  sanitizer="not run: compute-sanitizer is not on the PATH"
fi
echo "$sanitizer"

echo "== bench"
"$PYTHON" kernels/bench_cuda.py --sanitizer "$sanitizer" --write kernels/BENCH.md
