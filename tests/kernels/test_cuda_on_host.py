"""The CUDA kernel of csrc/ without a GPU: the same source compiled as C++, each thread a fibre.

Both of its forms, eight blocks in a cluster and plain, are held against the reference, and a race
detector looks at every access to memory; `tests/support/cuda_on_host/` says how. Under `make asan`
the same cases run with AddressSanitizer in the detector's place.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kept import kept, version_of

from bstriplet_kernels import reference
from bstriplet_kernels.spec import SIGNED_SQUARE, SQUARE, Spec, accumulation_dtype

SUPPORT = Path(__file__).parents[1] / "support/cuda_on_host"
CSRC = Path(__file__).parents[2] / "csrc"
KERNEL = CSRC / "cuda/small_batch.cu"
ELEMENTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # in csrc's order
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}  # of the accumulation dtype
ROWS, COLUMNS = (1, 2, 3, 17, 36, 63, 64), (1, 5, 8, 70, 257, 1280)
ROWS_OF_MANY_COLUMNS = (1, 17, 36)  # of the 1,280 that the paper has
LAYOUTS = ("plain", "transposed", "spread")
LABELS = ("random", "one class", "all different")
PLAIN, CLUSTERS, ROOM_FOR_NONE, ROOM_FOR_ONE, EIGHTS = range(
    5
)  # devices of cuda_on_host/cuda_runtime.h
ADDRESS_SANITIZER = "libasan" in os.environ.get("LD_PRELOAD", "")
WATCHED_COLUMNS = 257  # looking for races takes ten times as long

PROBE = "#include <bit>\nshort bits(_Float16 x) { return std::bit_cast<short>(x); }"


def has_compiler():
    """Whether there is a g++ of C++20 that knows half precision."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        return False
    command = ("g++", "-std=c++20", "-fsyntax-only", "-x", "c++", "-")
    return subprocess.run(command, input=PROBE, text=True, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs g++ 12 or later on Linux")


class StridedRows(ctypes.Structure):
    """csrc/rows.h's."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("element", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "column_stride")),
    )


class KernelSpec(ctypes.Structure):
    """csrc/spec.h's `Spec`."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("margin", "sigma", "squared_eps", "scale")),
        *((name, ctypes.c_bool) for name in ("is_signed", "gradient")),
    )


class SmallBatch(ctypes.Structure):
    """csrc/cuda/small_batch.h's."""

    _fields_ = (
        ("embeddings", StridedRows),
        ("labels", ctypes.c_void_p),
        ("label_stride", ctypes.c_int64),
        ("upstream", ctypes.c_void_p),
        ("upstream_stride", ctypes.c_int64),
        ("spec", KernelSpec),
        *((name, ctypes.c_void_p) for name in ("loss", "means", "grad")),
    )


@pytest.fixture(scope="session")
def library(request):
    """The kernel, instrumented, and what it runs on, which is not."""
    made_of = [Path(__file__), *version_of("g++"), str(ADDRESS_SANITIZER)]
    made_of += sorted(p for parent in (SUPPORT, CSRC) for p in parent.rglob("*") if p.is_file())
    folder = kept(request, "cuda_on_host", made_of, compile_library)
    found = ctypes.CDLL(str(folder / "cuda_on_host.so"))
    found.launch_on_host.restype = ctypes.c_char_p
    return found


def compile_library(folder):
    compiler = ("g++", "-std=c++20", "-O2", "-g", "-fPIC", "-pthread", "-Wall")
    includes = (f"-I{SUPPORT}", f"-I{CSRC}")
    checks = "-fsanitize=undefined", "-fno-sanitize-recover=all"
    sanitizer = "-fsanitize=address" if ADDRESS_SANITIZER else "-fsanitize=thread"
    kernel = (*checks, sanitizer, "-Wno-unknown-pragmas", "-x", "c++")
    sources = {
        KERNEL: kernel,
        **{SUPPORT / f"{name}.cpp": () for name in ("fibres", "races", "driver")},
    }
    running = [
        subprocess.Popen([*compiler, *includes, *flags, "-c", source], cwd=folder)
        for source, flags in sources.items()
    ]
    assert sum(process.wait() for process in running) == 0
    objects = [f"{source.stem}.o" for source in sources]
    # Not by -fsanitize=thread: races.cpp has what the instrumented code calls.
    linked = "-fsanitize=address,undefined" if ADDRESS_SANITIZER else "-fsanitize=undefined"
    target = folder / "cuda_on_host.so"
    subprocess.run(
        ["g++", "-shared", "-pthread", *objects, linked, "-Wl,--no-undefined", "-o", target],
        cwd=folder,
        check=True,
    )


def launch(library, device, x, labels, spec, upstream=None, without_line=0, watched=True):
    """(loss, means, gradient, races) of one launch, with NaN wherever it wrote nothing."""
    n, d = x.shape
    dtype = accumulation_dtype(x)
    loss, means, grad = (
        torch.full(shape, torch.nan, dtype=dtype)
        for shape in ((), (2, n), (n if spec.wants_gradient else 0, d))
    )
    batch = SmallBatch(
        StridedRows(x.data_ptr(), ELEMENTS.index(x.dtype), n, d, *x.stride()),
        labels.data_ptr(), labels.stride(0),
        None if upstream is None else upstream.data_ptr(),
        0 if upstream is None else upstream.stride(0),
        KernelSpec(
            spec.margin, spec.sigma, spec.eps**2, 1 / n if spec.reduction == "mean" else 1,
            spec.signed, spec.wants_gradient,
        ),
        loss.data_ptr(), means.data_ptr(), grad.data_ptr(),
    )  # fmt: skip
    races = ctypes.c_int(0)
    error = library.launch_on_host(
        ctypes.byref(batch),
        device,
        without_line,
        ctypes.byref(races) if watched else None,
    )
    assert error is None, error
    return loss, means, grad, races.value


def make_batch(n, d, dtype, layout="plain", classes="random", seed=0):
    """Rows of which one is zero, with any strides, and labels with any stride."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    if n > 3:
        x[n // 2] = 0
    if layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "spread":
        wide = torch.full((2 * n, 3 * d), torch.nan, dtype=dtype)
        wide[::2, 1::3] = x
        x = wide[::2, 1::3]
    labels = {
        "random": torch.randint(-1, 2, (n,), generator=generator) * 2**40,
        "one class": torch.full((n,), 7),
        "all different": torch.arange(n),
    }[classes]
    return x, labels.repeat_interleave(2)[::2]


def assert_right(got, x, labels, spec, upstream):
    """Loss, means and gradient within the accumulation's tolerance of the reference in float64."""
    loss, means, grad, _ = got
    n, tolerance = len(x), TOLERANCE[loss.dtype]
    exact = x.double()
    truth, rows, _ = reference.forward(exact, None, labels, None, spec)
    total = n if spec.reduction == "sum" else 1
    assert abs(loss.double() - truth) <= tolerance * total
    assert (means.double() - torch.stack((rows.positive, rows.negative))).norm() <= tolerance * n
    if not spec.wants_gradient:
        return
    per_row = torch.full((n,), total / n) if upstream is None else upstream
    per_row_spec = spec._replace(reduction="none")
    expected, _ = reference.backward(
        per_row.double(), exact, None, labels, None, None, (), per_row_spec
    )
    norms = exact.norm(dim=1)  # what cancels in a row is of the size of its own share
    size = total * per_row.abs().max() * n / total / norms[norms > 0].min()
    assert (grad.double() - expected).norm() <= tolerance * (expected.norm() + size)


def cases():
    """Every number of rows with every number of columns but the last; the rest is drawn."""
    draw = random.Random(0)
    for n, d in itertools.product(ROWS, COLUMNS):
        options = {
            "margin": draw.choice((0.3, 0.9)),
            "sigma": draw.choice((1.0, -1.0)),
            "similarity": draw.choice([SQUARE, SIGNED_SQUARE]),
            "reduction": draw.choice(("mean", "sum")),
            "wants_gradient": draw.random() < 0.8,
        }
        case = n, d, draw.choice(ELEMENTS), draw.choice(LAYOUTS), draw.choice(LABELS), options
        if d < COLUMNS[-1] or n in ROWS_OF_MANY_COLUMNS:
            yield case


@pytest.mark.parametrize("device", [PLAIN, CLUSTERS, EIGHTS], ids=["plain", "clusters", "eights"])
@pytest.mark.parametrize(
    ("n", "d", "dtype", "layout", "classes", "options"), [*cases()], ids=lambda v: str(v)[:14]
)
def test_agrees_with_the_reference(library, device, n, d, dtype, layout, classes, options):
    x, labels = make_batch(n, d, dtype, layout, classes, seed=n * d)
    spec = Spec(**options)
    upstream = None
    if n % 2 == 1:
        upstream = torch.linspace(-1, 2, 2 * n, dtype=accumulation_dtype(x))[::2]
    got = launch(library, device, x, labels, spec, upstream, watched=d <= WATCHED_COLUMNS)
    assert_right(got, x, labels, spec, upstream)
    assert got[3] == 0


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("device", [PLAIN, CLUSTERS])
def test_same_bits_twice_whatever_the_gradient(library, device, dtype):
    x, labels = make_batch(36, 300, dtype)
    spec = Spec(wants_gradient=True)
    first, second = (launch(library, device, x, labels, spec, watched=False) for _ in range(2))
    assert all(map(torch.equal, first[:3], second[:3]))
    alone = launch(library, device, x, labels, Spec(), watched=False)
    assert all(map(torch.equal, first[:2], alone[:2]))


@pytest.mark.parametrize(("device", "same"), [(ROOM_FOR_NONE, PLAIN), (ROOM_FOR_ONE, CLUSTERS)])
def test_small_devices(library, device, same):
    """Without room for a cluster the plain form; with little room fewer clusters, the same bits."""
    x, labels = make_batch(20, 600, torch.float32)
    spec = Spec(wants_gradient=True)
    got, expected = (launch(library, k, x, labels, spec, watched=False) for k in (device, same))
    assert all(map(torch.equal, got[:3], expected[:3]))
    assert not torch.isnan(got[2]).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("device", [PLAIN, CLUSTERS])
def test_what_is_not_finite_is_not_hidden(library, device, bad):
    x, labels = make_batch(9, 33, torch.float32)
    x[2, 5] = bad
    loss, _, grad, _ = launch(library, device, x, labels, Spec(wants_gradient=True))
    assert loss.isnan()
    assert grad[2].isnan().all()


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e20), (torch.float64, 1e160)])
@pytest.mark.parametrize("device", [PLAIN, CLUSTERS])
def test_a_square_that_overflows_is_not_hidden(library, device, dtype, large):
    """1 / inf would be 0: a zero row, and a finite loss."""
    x, labels = make_batch(9, 33, dtype)
    x[2] = large
    loss, _, grad, _ = launch(library, device, x, labels, Spec(wants_gradient=True))
    assert loss.isnan()
    assert grad[2].isnan().all()


@pytest.mark.parametrize("device", [PLAIN, CLUSTERS])
def test_rows_at_an_edge(library, device):
    """No gradient where h is exactly 0, nor of a row whose norm is exactly eps."""
    x, labels = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]]), torch.tensor([5, 5])
    spec = Spec(margin=0.25, wants_gradient=True)
    loss, means, grad, _ = launch(library, device, x, labels, spec)
    assert means[0].tolist() == [0.25, 0.25]
    assert loss == 0
    assert grad.eq(0).all()
    for eps in (0.5, 0.0):
        x[0, 0] = eps
        loss, means, grad, _ = launch(library, device, x, labels, spec._replace(eps=eps))
        assert means.eq(0).all()
        assert loss == 0.25
        assert grad.eq(0).all()


BARRIERS = [
    line
    for line, text in enumerate(KERNEL.read_text("utf-8").splitlines(), 1)
    if "__syncthreads();" in text or "wait_for_start();" in text
]


needs_detector = pytest.mark.skipif(
    ADDRESS_SANITIZER, reason="there is no race detector in this build"
)


def races(library, without_line=0):
    """How many races each launch finds, by a device each with its number of columns."""
    # A share is one chunk, or two; in the one team a part is two as well.
    for device, d in ((PLAIN, 40), (PLAIN, 130), (ROOM_FOR_ONE, 2080)):
        x, labels = make_batch(9, d, torch.float64)
        yield launch(library, device, x, labels, Spec(wants_gradient=True), None, without_line)[3]


@needs_detector
def test_there_is_no_race(library):
    assert [*races(library)] == [0, 0, 0]


@needs_detector
@pytest.mark.parametrize("line", BARRIERS)
def test_every_barrier_is_missed(library, line):
    """The check of the check: without any one of the barriers there is a race."""
    assert any(races(library, line))
