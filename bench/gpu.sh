#!/usr/bin/env bash
# One command for a machine with a GPU: bench/gpu.sh [OUTPUT FOLDER]
# Needs a Python with torch >= 2.11, and this repository; installs nothing. Checks first, then times,
# then lets compute-sanitizer look, where it is. Whatever fails, the rest still runs; the exit
# status is the number of steps that failed. It ends after LIMIT seconds (480): a step that is at
# work then is stopped, and those behind it do not begin; both count as failed. Suites of timings
# that are complete are kept. DEVICE=cpu rehearses it in Triton's interpreter.
set -u
cd "$(dirname "$0")/.."
out=${1:-bench/results}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
LIMIT=${LIMIT:-480}
export PYTHONPATH=. CUBLAS_WORKSPACE_CONFIG=:4096:8
[ "$DEVICE" = cpu ] && export TRITON_INTERPRET=1
failed=0

step() {  # step NAME COMMAND...: run it in the time that is left, say how long it took
    local name=$1 start=$SECONDS left=$((LIMIT - SECONDS))
    shift
    echo "== $name: $*"
    if [ "$left" -gt 0 ] && timeout --signal=INT --kill-after=10 "$left" "$@"; then
        echo "== $name: $((SECONDS - start)) s"
    else
        echo "== $name: FAILED after $((SECONDS - start)) s; $left s were left"
        failed=$((failed + 1))
    fi
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

mkdir -p "$out"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
step doctor "$PYTHON" -m bstriplet_kernels
if [ "$DEVICE" = cpu ]; then
    step checks "$PYTHON" -m bench.gpu_check --device cpu --impl triton --quick
    step "more checks" "$PYTHON" -m bench.gpu_check --device cpu --impl gram
    step timing "$PYTHON" -m bench.run --device cpu --results "$out" smoke
else
    step checks "$PYTHON" -m bench.gpu_check
    step timing "$PYTHON" -m bench.run --device cuda --results "$out" targets paper hinge crossover
fi
if [ "$DEVICE" = cuda ] && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
        # torch's caching allocator hides what lies beyond a tensor from the tools
        step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
            --error-exitcode 1 "$PYTHON" -m bench.gpu_check --quick --impl triton
    done
else
    echo "== compute-sanitizer: not here"
fi
if [ "$DEVICE" = cuda ]; then
    has pytest && has hypothesis && step tests "$PYTHON" -m pytest tests/kernels/test_triton.py
    step "more timing" "$PYTHON" -m bench.run --device cuda --results "$out" \
        sweep dtypes classes training_step million
fi
echo "== $failed steps failed"
exit "$failed"
