"""csrc/cuda/ as the build compiles it, for GPUs that are not here: resources and machine code."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools
from kept import kept, version_of

ROOT = Path(__file__).parents[2]
CHIPS = ("sm_80", "sm_90", "sm_100")
KERNELS = 12  # four dtypes, in clusters of 16 and of eight and plain
STATIC_SHARED = 48 * 1024  # of a block, on every chip


def disassembler() -> str | None:
    """cuobjdump of the CUDA toolkit, else the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    folders = [
        Path(p) / "backends/nvidia/bin"
        for p in (triton and triton.submodule_search_locations) or ()
    ]
    return shutil.which("cuobjdump") or next(
        (str(f / "cuobjdump") for f in folders if (f / "cuobjdump").is_file()), None
    )


@pytest.fixture(scope="module")
def disassembly(request):
    """Runs cuobjdump with options on what nvcc makes of the kernel, with the flags of setup.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.setenv("BSTRIPLET_NATIVE", "0")
        patch.chdir(ROOT)
        build = runpy.run_path("setup.py")
    nvcc, tool = build["nvcc"](), disassembler()
    if nvcc is None or tool is None:
        pytest.skip("needs nvcc and cuobjdump")
    source = ROOT / "csrc/cuda/small_batch.cu"

    def compile_all(folder: Path) -> None:
        command = [nvcc, *build["NVCC_FLAGS"], "-fatbin", source, "-o", folder / "cuda.fatbin"]
        subprocess.run(command, check=True)

    made_of = [Path(__file__), *version_of(nvcc), *build["NVCC_FLAGS"]]
    made_of += sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    binary = kept(request, "cuda", made_of, compile_all) / "cuda.fatbin"

    def run(*options: str) -> str:
        return subprocess.run(
            [tool, *options, binary], capture_output=True, text=True, check=True
        ).stdout

    return run


@pytest.mark.parametrize("chip", CHIPS)
def test_no_kernel_spills_or_outgrows_shared_memory(disassembly, chip):
    usage = disassembly("-arch", chip, "-res-usage")
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert len(found) == KERNELS
    for registers, stack, shared, local in (map(int, kernel) for kernel in found):
        assert stack == local == 0
        assert registers <= 128  # of 512 threads, all that a multiprocessor has
        assert shared <= STATIC_SHARED


@pytest.mark.parametrize("chip", CHIPS)
def test_each_chip_has_both_forms(disassembly, chip):
    """A chip that runs the code of another may have clusters or not; what cannot run must trap."""
    code = functions(disassembly("-arch", chip, "-sass"))
    assert len(code) == KERNELS
    for name, instructions in code.items():
        works = any(" FFMA" in line or " DFMA" in line for line in instructions)
        assert works == (chip != "sm_80" or not is_clustered(name))
        assert works or any(" BPT.TRAP" in line for line in instructions)


def test_a_cluster_exchanges_messages_without_a_fence(disassembly):
    """A fence of all memory, as in front of a barrier of the cluster, takes about a microsecond."""
    code = functions(disassembly("-arch", "sm_90", "-sass"))
    clustered = [lines for name, lines in code.items() if is_clustered(name)]
    assert len(clustered) == KERNELS * 2 // 3
    for lines in clustered:
        assert any(" STAS" in f" {line}" for line in lines)
        assert not any("MEMBAR" in line for line in lines)


def is_clustered(name: str) -> bool:
    return "Li16E" in name or "Li8E" in name


def functions(sass: str) -> dict[str, list[str]]:
    """The instructions of each kernel by its mangled name."""
    _, *parts = re.split(r"Function : (\S+)\n", sass)
    return {
        name: re.findall(r"^\s+/\*[0-9a-f]{4,}\*/(.*);", body, re.MULTILINE)
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }
