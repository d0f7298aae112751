"""Builds the native operators of csrc/ where there is a compiler; the rest is in pyproject.toml.

BSTRIPLET_NATIVE decides what is built:

    unset   everything that can be; an install never fails for want of a compiler
    0       nothing
    cpu     the C++ part
    cuda    the C++ and the CUDA part
    1       the C++ part, and the CUDA part where there is nvcc

A part that was asked for and cannot be built is an error. One line says what else is left out.

The libraries use torch's stable ABI and no Python API: one build serves every torch from 2.11 on
and every Python from 3.10 on. The build finds torch without importing it, and needs no GPU. It
keeps objects in build/, in a folder per CXXFLAGS, and compiles again only what changed.

Tested on Linux: on x86-64 as a whole, on emulated arm64 the kernels alone. Builds on Windows and
macOS are untried.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WINDOWS = sys.platform == "win32"
WANTED = os.environ.get("BSTRIPLET_NATIVE")
BUILDS = "1", "cpu", "cuda"
# The AVX2 and AVX-512 kernels, and the choice among kernels, need builtins that MSVC lacks. A build
# on macOS may be for two architectures at once. Both get the portable kernels alone, as arm64 does;
# MSVC compiles these as plain loops.
X86_KERNELS = sys.platform == "linux" and platform.machine() == "x86_64"
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000")]  # 2.11
if X86_KERNELS:
    MACROS.append(("BSTRIPLET_X86_KERNELS", None))

FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    "-Wno-psabi",  # functions that take vectors are inlined, so their ABI does not matter
]
if WINDOWS:
    FLAGS = ["/std:c++17", "/O2", "/EHsc"]
SOURCE_FLAGS = {  # Windows builds none of these
    "csrc/kernels/avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/kernels/avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ],
    "csrc/cuda/operator.cpp": ["-DUSE_CUDA"],  # for the current stream in torch's headers
}
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc"),
    *(f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in (80, 90, 100)),
    "-gencode=arch=compute_100,code=compute_100",  # later chips compile this for themselves
]
OBJECTS = f"build/native-{zlib.crc32(os.environ.get('CXXFLAGS', '').encode()):08x}"


def torch_folder() -> Path | None:
    """The folder of torch, or None.

    Under build isolation torch cannot be imported, but the environment that pip installs into has
    it, and the interpreter is the same.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    return next((p for p in places if (p / "include/torch/csrc/stable").is_dir()), None)


def nvcc() -> str | None:
    """The CUDA compiler of CUDA_HOME, else the one on the PATH; none on Windows."""
    if WINDOWS:
        return None
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def left_out(part: str, reason: str, *wanted_by: str) -> None:
    """Say in one line that a part is not built, or fail if BSTRIPLET_NATIVE is in `wanted_by`."""
    if WANTED in wanted_by:
        sys.exit(f"bstriplet-kernels: BSTRIPLET_NATIVE={WANTED}, but no {part}: {reason}")
    print(f"bstriplet-kernels: {part} left out: {reason}", file=sys.stderr, flush=True)


def extensions() -> list[Extension]:
    """The libraries to build: those for which torch and, for CUDA, nvcc are there."""
    if WANTED not in (None, "0", *BUILDS):
        sys.exit(f"BSTRIPLET_NATIVE must be 0, 1, cpu or cuda, got {WANTED!r}")
    if WANTED == "0":
        left_out("native operator", "BSTRIPLET_NATIVE=0")
        return []
    torch = torch_folder()
    if torch is None:
        reason = "no torch >= 2.11 in this environment to build against"
        left_out("native operator", reason, *BUILDS)
        return []
    common = {
        "include_dirs": [str(torch / "include")],
        "library_dirs": [str(torch / "lib")],
        "define_macros": MACROS,
        "py_limited_api": True,
        "optional": True,
    }
    # The slowest to compile come first, so that all processors end together.
    drivers = [
        *("moments/sums", "cpu/batch_similarity", "moments/operators", "moments/gradient"),
        *("moments/means", "cpu/cpu", "operator", "schema"),
    ]
    kernels = ["avx512", "avx2", "baseline"] if X86_KERNELS else ["baseline"]
    found = [
        Extension(
            "bstriplet_kernels._native",
            sources=[
                *(f"csrc/{name}.cpp" for name in drivers),
                *(f"csrc/kernels/{name}.cpp" for name in kernels),
            ],
            libraries=["torch_cpu", "c10"],
            **common,
        )
    ]
    if WANTED == "cpu":
        return found
    if nvcc() is None:
        reason = "no nvcc in CUDA_HOME or on the PATH"
        left_out("CUDA part of the native operator", reason, "cuda")
        return found
    found.append(
        Extension(
            "bstriplet_kernels._native_cuda",
            sources=["csrc/cuda/small_batch.cu", "csrc/cuda/operator.cpp", "csrc/operator.cpp"],
            libraries=["torch_cuda", "torch_cpu", "c10"],
            **common,
        )
    )
    return found


class BuildNative(build_ext):
    """Compiles sources side by side, each with its own flags, if it or a header of it changed."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext`, or say why it is left out; fail where BSTRIPLET_NATIVE asks for it."""
        try:
            with ThreadPoolExecutor() as pool:
                objects = list(pool.map(lambda source: self.compiled(source, ext), ext.sources))
            target = self.get_ext_fullpath(ext.name)
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            if any(source.endswith(".cu") for source in ext.sources):
                link_cuda(objects, target, ext)  # nvcc finds its own run-time library
                return
            self.compiler.link_shared_object(
                objects,
                target,
                libraries=ext.libraries,
                library_dirs=ext.library_dirs,
                target_lang="c++",
            )
        except Exception as error:  # a missing or old compiler can raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            left_out(ext.name, reason, *BUILDS)

    def compiled(self, source: str, ext: Extension) -> str:
        """Compile a source unless its object file is up to date; returns the object file."""
        inputs = [Path(__file__), *with_headers(Path(source))]
        if source.endswith(".cu"):
            target = f"{OBJECTS}/{source}.o"
            if not newer(Path(target), inputs):
                compile_cuda(source, target, ext)
            return target
        (target,) = self.compiler.object_filenames([source], output_dir=OBJECTS)
        if not newer(Path(target), inputs):
            self.compiler.compile(
                [source],
                output_dir=OBJECTS,
                macros=ext.define_macros,
                include_dirs=["csrc", *ext.include_dirs],
                extra_postargs=FLAGS + SOURCE_FLAGS.get(source, []),
            )
        return target

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No symbols: torch loads the library, Python does not import it."""
        return []


def compile_cuda(source: str, target: str, ext: Extension) -> None:
    """Compile an object file by nvcc, for every chip that `NVCC_FLAGS` names."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    macros = [f"-D{name}={value}" if value else f"-D{name}" for name, value in ext.define_macros]
    includes = [option for folder in ext.include_dirs for option in ("-isystem", folder)]
    run_nvcc(*NVCC_FLAGS, *macros, *includes, "-c", source, "-o", target)


def link_cuda(objects: list[str], target: str, ext: Extension) -> None:
    """Link a shared library by nvcc, which adds CUDA's run-time library."""
    folders = [f"-L{folder}" for folder in ext.library_dirs]
    run_nvcc("-shared", *objects, "-o", target, *folders, *(f"-l{name}" for name in ext.libraries))


def run_nvcc(*arguments: str) -> None:
    """Run nvcc; raises RuntimeError with its output if it fails."""
    ran = subprocess.run([str(nvcc()), *arguments], capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(ran.stderr or ran.stdout)


def with_headers(source: Path) -> set[Path]:
    """A file of csrc/ with the headers of csrc/ that it includes, directly or not."""
    found, waiting = set(), [source]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            names = re.findall(r'^\s*#\s*include\s*"(.+?)"', file.read_text("utf-8"), re.MULTILINE)
            waiting += [Path("csrc", name) for name in names]
    return found


def newer(target: Path, inputs: Iterable[Path]) -> bool:
    """Whether the target exists and is newer than all inputs."""
    return target.exists() and all(i.stat().st_mtime < target.stat().st_mtime for i in inputs)


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
