"""The portable kernels of csrc/ by a driver of their own: here, without vectors, and as arm64."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from kept import kept, version_of

SOURCES = Path(__file__).parents[2] / "csrc"
DRIVER = Path(__file__).parents[1] / "support/baseline_kernels.cpp"
FLAGS = (
    *("-std=c++17", "-O2", "-static", "-Wall", "-Wno-psabi"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),  # as setup.py has them
)


@pytest.mark.parametrize(
    ("compiler", "emulator", "flags"),
    [
        ("g++", None, ()),
        ("g++", None, ("-U__GNUC__",)),  # arrays in place of vectors, as MSVC compiles them
        ("aarch64-linux-gnu-g++", "qemu-aarch64-static", ()),
    ],
    ids=[platform.machine(), "arrays", "emulated arm64"],
)
def test_baseline_kernels_agree_with_loops(request, compiler, emulator, flags):
    for tool in filter(None, (compiler, emulator)):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    compile_flags = [*FLAGS, *flags]

    def compile_driver(folder):
        sources = DRIVER, SOURCES / "kernels/baseline.cpp"
        command = [compiler, *compile_flags, f"-I{SOURCES}", *sources, "-o", folder / "driver"]
        subprocess.run(command, check=True)

    made_of = [Path(__file__), *version_of(compiler), *compile_flags, DRIVER]
    made_of += sorted(path for path in SOURCES.rglob("*") if path.is_file())
    name = f"driver_{request.node.callspec.id.replace(' ', '_')}"
    program = kept(request, name, made_of, compile_driver) / "driver"
    command = [*filter(None, [emulator]), program]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout == "162 comparisons\n"
