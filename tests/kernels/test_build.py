"""setup.py: what is built, what is left out and said, and what a changed header compiles again."""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path):
    """What a build needs of the sources, in a folder of its own."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "bstriplet_kernels", "python/bstriplet"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__*__")
        )
    return tmp_path


def build(tree, **variables):
    """Run `setup.py build` without a compiler."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("BSTRIPLET_NATIVE", "CUDA_HOME")
    }
    environment |= {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "PATH": "/nonexistent"}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build"],
        cwd=tree,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_the_rest_is_built_and_said(tree):
    ran = build(tree)
    assert ran.returncode == 0, ran.stderr
    said = [line for line in ran.stderr.splitlines() if "left out" in line]
    assert [line.split(" left out: ")[0] for line in said] == [
        "bstriplet-kernels: CUDA part of the native operator",
        "bstriplet-kernels: bstriplet_kernels._native",
    ]
    assert "/nonexistent/c" in said[1]
    built = {path.name for path in (tree / "build").rglob("*")}
    assert {"functional.py", "loop.py", "py.typed", "report.html.j2", "table1.csv"} <= built
    assert len(list((tree / "build").rglob("py.typed"))) == 2
    assert not [name for name in built if name.startswith("_native")]


@pytest.mark.parametrize("wanted", ["1", "cpu", "cuda", "yes"])
def test_what_is_asked_for_and_cannot_be_built_is_an_error(tree, wanted):
    ran = build(tree, BSTRIPLET_NATIVE=wanted)
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    if wanted == "yes":
        assert last == "BSTRIPLET_NATIVE must be 0, 1, cpu or cuda, got 'yes'"
    else:
        assert last.startswith(f"bstriplet-kernels: BSTRIPLET_NATIVE={wanted}, but no ")
        assert ("nvcc" if wanted == "cuda" else "/nonexistent/c") in last


@pytest.mark.parametrize(
    ("platform_name", "machine", "expected"),
    [
        ("linux", "x86_64", {"avx512", "avx2", "baseline"}),
        ("linux", "aarch64", {"baseline"}),
        ("darwin", "x86_64", {"baseline"}),
        ("darwin", "arm64", {"baseline"}),
        ("win32", "AMD64", {"baseline"}),
    ],
)
def test_each_platform_gets_kernels_that_its_compiler_knows(
    monkeypatch, platform_name, machine, expected
):
    made = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: made.update(arguments))
    monkeypatch.setattr(sys, "platform", platform_name)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv("BSTRIPLET_NATIVE", "cpu")
    monkeypatch.chdir(ROOT)
    build = runpy.run_path("setup.py")
    (native,) = made["ext_modules"]
    assert {Path(s).stem for s in native.sources if "kernels" in Path(s).parts} == expected
    assert ("BSTRIPLET_X86_KERNELS" in dict(native.define_macros)) == ("avx2" in expected)
    style = "/" if platform_name == "win32" else "-"
    flags = [
        *build["FLAGS"],
        *(f for s in native.sources for f in build["SOURCE_FLAGS"].get(s, ())),
    ]
    assert all(flag.startswith(style) for flag in flags)


def test_a_source_is_compiled_again_for_the_headers_that_it_includes(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("BSTRIPLET_NATIVE", "0")
    monkeypatch.chdir(ROOT)
    with_headers = runpy.run_path("setup.py")["with_headers"]
    found = {path.as_posix() for path in with_headers(Path("csrc/kernels/avx2.cpp"))}
    names = (
        "avx2.cpp",
        "table.h",
        "kernels.h",
        "vec.h",
        "tiles.h",
        "halves.h",
        "pairs.h",
        "unit_rows.h",
    )
    assert found == {f"csrc/kernels/{name}" for name in names}
    arithmetic = (
        *(f"moments/{name}.cpp" for name in ("sums", "means", "gradient")),
        *("kernels/baseline.cpp", "cuda/small_batch.cu"),
    )
    for name in arithmetic:  # torch's headers are most of what there is to compile
        read = [path.read_text("utf-8") for path in with_headers(Path("csrc") / name)]
        assert not [text for text in read if "<torch/" in text]
