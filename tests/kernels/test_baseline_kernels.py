"""The portable kernels of csrc/ by a driver of their own: here, without vectors, and as arm64."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"
DRIVER = Path(__file__).with_name("baseline_kernels.cpp")
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
def test_baseline_kernels_agree_with_loops(tmp_path, compiler, emulator, flags):
    for tool in filter(None, (compiler, emulator)):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    program = tmp_path / "driver"
    sources = map(str, (DRIVER, SOURCES / "kernels/baseline.cpp"))
    compile_flags = [*FLAGS, *flags, f"-I{SOURCES}"]
    subprocess.run([compiler, *compile_flags, *sources, "-o", str(program)], check=True)
    command = [*filter(None, [emulator]), str(program)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout == "162 comparisons\n"
