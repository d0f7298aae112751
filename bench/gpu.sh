#!/usr/bin/env bash
# For a machine with a GPU that may be at hand for minutes: bench/gpu.sh first|second [FOLDER]
# `first` checks and times every path within 260 s, `second` runs the suites within 400 s; FOLDER
# (runs/gpu) gets a log, the results and one archive of all. bench/README.md says what to bring.
# Needs a Python with torch >= 2.11; DEVICE=cpu rehearses it in Triton's interpreter. The exit status
# is the number of commands that failed.
set -u
cd "$(dirname "$0")/.."
call=${1:?first or second} folder=${2:-runs/gpu}
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda}
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}:$PWD/build/brought"
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"  # nvcc, compute-sanitizer
export CUBLAS_WORKSPACE_CONFIG=:4096:8
[ "$DEVICE" = cpu ] && export TRITON_INTERPRET=1

# Every row names the commit, and what differs from it: in a copy without .git, the files themselves.
if [ -z "${BENCH_COMMIT:-}" ]; then
    files=$(find bench bstriplet_kernels csrc python studies -name '*.py' -o -path 'csrc/*' -type f | LC_ALL=C sort |
        xargs cat | sha1sum)
    if ! BENCH_COMMIT=$(git rev-parse --quiet --short=10 --verify HEAD 2> /dev/null); then
        BENCH_COMMIT=files-${files:0:10}
    elif ! git diff --quiet HEAD -- bench bstriplet_kernels csrc python studies ':(exclude)bench/results' \
      ':(exclude)studies/results'; then
        BENCH_COMMIT+=+files-${files:0:10}
    fi
fi
export BENCH_COMMIT
exec "$PYTHON" -m bench.gpu_steps "$call" "$folder" --device "$DEVICE" ${LIMIT:+--limit "$LIMIT"}
