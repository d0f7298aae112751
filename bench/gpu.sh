#!/usr/bin/env bash
# For a machine with a GPU that may be at hand for minutes: bench/gpu.sh first|second [FOLDER]
# `first` checks and times every path within 260 s, `second` runs the suites within 300 s; FOLDER
# (runs/gpu) gets a log, the results and one archive of all. bench/README.md says what to bring.
# Needs a Python with torch >= 2.11; DEVICE=cpu rehearses it in Triton's interpreter. The exit status
# is the number of commands that failed.
set -u
cd "$(dirname "$0")/.."
call=${1:?first or second} folder=${2:-runs/gpu}
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda}
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" CUBLAS_WORKSPACE_CONFIG=:4096:8
[ "$DEVICE" = cpu ] && export TRITON_INTERPRET=1

# Every row names the commit, and what differs from it: in a copy without .git, the files themselves.
if [ -z "${BENCH_COMMIT:-}" ]; then
    files=$(find bench bstriplet_kernels csrc -name '*.py' -o -path 'csrc/*' -type f | LC_ALL=C sort |
        xargs cat | sha1sum)
    if ! BENCH_COMMIT=$(git rev-parse --quiet --short=10 --verify HEAD 2> /dev/null); then
        BENCH_COMMIT=files-${files:0:10}
    elif ! git diff --quiet HEAD -- bench bstriplet_kernels csrc; then
        BENCH_COMMIT+=+files-${files:0:10}
    fi
fi
export BENCH_COMMIT
echo "$(date -u +%FT%TZ) commit $BENCH_COMMIT"
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

if compgen -G 'build/wheels/*.whl' > /dev/null; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade \
        --target build/brought build/wheels/*.whl && export PYTHONPATH="$PYTHONPATH:$PWD/build/brought"
fi
# Libraries are no part of the sources. Built apart from pyproject.toml, which an old setuptools
# cannot read.
libraries=(bstriplet_kernels/_native.*so bstriplet_kernels/_native_cuda.*so)
if [ "$DEVICE" = cuda ] && ! ls "${libraries[@]}" > /dev/null 2>&1; then
    echo "not both native libraries were brought: building them"
    mkdir -p build/apart/bstriplet_kernels && cp -r csrc setup.py build/apart/ &&
        (cd build/apart && timeout 120 "$PYTHON" setup.py -q build_ext --inplace) &&
        cp build/apart/bstriplet_kernels/_native* bstriplet_kernels/
fi
exec "$PYTHON" -m bench.gpu_steps "$call" "$folder" --device "$DEVICE" --spent "$SECONDS" \
    ${LIMIT:+--limit "$LIMIT"}
