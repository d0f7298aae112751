#!/usr/bin/env bash
# One command for a machine with a GPU: bench/gpu.sh [OUTPUT FOLDER]
# Needs a Python with torch >= 2.11, and this repository; installs nothing. Checks first, then times,
# then lets compute-sanitizer look, where it is. Whatever fails, the rest still runs; the exit
# status is the number of steps that failed. DEVICE=cpu rehearses it in Triton's interpreter.
set -u
cd "$(dirname "$0")/.."
out=${1:-bench/results}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
export PYTHONPATH=. CUBLAS_WORKSPACE_CONFIG=:4096:8
[ "$DEVICE" = cpu ] && export TRITON_INTERPRET=1
failed=0

step() {  # step NAME COMMAND...: run it, say how long it took, count a failure
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    if "$@"; then echo "== $name: $((SECONDS - start)) s"; else
        echo "== $name: FAILED after $((SECONDS - start)) s"
        failed=$((failed + 1))
    fi
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

mkdir -p "$out"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
step doctor "$PYTHON" -m bstriplet_kernels
if [ "$DEVICE" = cpu ]; then
    step checks "$PYTHON" -m bench.gpu_check --device cpu --impl triton --quick
    step timing "$PYTHON" -m bench.run --device cpu --results "$out" smoke
else
    step checks "$PYTHON" -m bench.gpu_check
    has pytest && has hypothesis && step tests "$PYTHON" -m pytest tests/kernels/test_triton.py
    step timing "$PYTHON" -m bench.run --device cuda --results "$out" targets paper dtypes hinge sweep
fi
if [ "$DEVICE" = cuda ] && command -v compute-sanitizer >/dev/null; then
    # torch's caching allocator hides what lies beyond a tensor from the tools
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck initcheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$PYTHON" -m bench.gpu_check --quick --impl triton
    done
else
    echo "== compute-sanitizer: not here"
fi
echo "== $failed steps failed"
exit "$failed"
