"""What is particular to impl="triton"; what every path must do is tested with the others.

Kernels need a GPU or Triton's interpreter, which must be chosen before Triton is imported: where
there is neither, one test runs this file, and the properties of every path, in a child that has it.
"""

import mmap
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launches import Launches, on_fake_gpu
from oracle import TOLERANCE, Options, assert_as_exact_as_plain, batch
from torch._subclasses.fake_tensor import FakeTensorMode

from bstriplet_kernels import autograd, available_impls, bstriplet_loss
from bstriplet_kernels.cost import Work
from bstriplet_kernels.paths import fused, panels
from bstriplet_kernels.spec import Gradients, Spec

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_here = pytest.mark.skipif(
    "triton" not in available_impls(), reason="needs a GPU or TRITON_INTERPRET=1"
)
interpreted = pytest.mark.skipif(
    not (fused.interpreted() and "triton" in available_impls()), reason="needs TRITON_INTERPRET=1"
)


def on_device(*tensors):
    return tuple(t.to(DEVICE) for t in tensors)


def gradient_of(x, labels, **options):
    x = x.detach().clone().requires_grad_()
    loss = bstriplet_loss(x, labels, impl="triton", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


@pytest.fixture(params=["tiles", "panels"])
def schedule(request, monkeypatch):
    """Both ways to go where one launch does not do, whatever is predicted; panels of 64 rows."""
    monkeypatch.setattr(fused, "by_panels", lambda *shape: request.param == "panels")
    monkeypatch.setattr(panels, "PANEL_NUMBERS", 1)
    monkeypatch.setattr(panels, "_FEWEST_ROWS", 64)
    return request.param


@pytest.mark.skipif(fused.interpreted(), reason="already there")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    chosen = [
        *("test_triton.py", "test_gram_triton.py", "test_operators.py", "test_tensors.py"),
        "test_tracers.py",
        "test_properties.py::test_as_exact_as_plain_torch_in_the_same_dtype",
        "test_properties.py::test_reference_embeddings_are_as_exact",
        "test_properties.py::test_nan_and_infinity_are_never_hidden",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        + ["-k", "triton and not every_output"]  # whose numerical derivatives take a minute here
        + [str(HERE / name) for name in chosen],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "BSTRIPLET_EXAMPLES": "2"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


def test_says_what_is_missing_and_how_to_get_it(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    x = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"needs a GPU .*TRITON_INTERPRET=1"):
        bstriplet_loss(x, torch.arange(2), impl="triton")
    monkeypatch.setattr(fused, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match=r"Triton is not installed .*pip install triton"):
        bstriplet_loss(x, torch.arange(2), impl="triton")


def test_refuses_tensors_where_no_kernel_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "the embeddings are on cpu" in fused.refuses(torch.ones(2, 2), None, Spec())
    assert "on meta" in fused.refuses(torch.ones(2, 2, device="meta"), None, Spec())


def test_refuses_gpus_before_tensor_cores_for_float32(monkeypatch):
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", None)
    for major, is_refused in ((7, True), (8, False), (9, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, of=major: (of, 0))
        assert bool(fused.refuses(on_gpu, None, Spec())) is is_refused
        assert fused._is_hopper.__wrapped__(on_gpu.device) is (major == 9)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert fused.refuses(on_gpu, None, Spec()) is None
    assert {fused.precision(dtype) for dtype in (torch.float32, torch.float16)} == {"ieee"}


def test_launches_on_the_device_of_the_tensor(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or nullcontext()
    )
    for index in (0, 1):
        with fused._on_device_of(SimpleNamespace(device=torch.device("cuda", index))):
            pass
    assert entered == [torch.device("cuda", 1)]


@interpreted
@pytest.mark.parametrize("n", [9, 50, 70])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("spread", [0.03, 1.0])
def test_tensor_core_float32_is_as_exact_as_plain(monkeypatch, n, reduction, spread):
    """The interpreter multiplies float32 exactly; here it does as tensor cores do.

    They cut a float32 operand down to tf32, which "tf32x3" takes as the sum of two.
    """
    numpy = pytest.importorskip("numpy")
    from triton.runtime import interpreter

    products = []

    def tf32(a):
        return ((a.view(numpy.int32) + 0x1000) & -8192).view(numpy.float32)

    def cut(a):
        return (numpy.ascontiguousarray(a).view(numpy.int32) & -8192).view(numpy.float32)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        products.append(str(input_precision).rpartition(".")[2])
        if products[-1] == "TF32":
            return interpreter.TensorHandle(d.data + cut(a.data) @ cut(b.data), d.dtype.scalar)
        big = [tf32(x.data) for x in (a, b)]
        small = [tf32(x.data - y) for x, y in zip((a, b), big, strict=True)]
        total = d.data + small[0] @ big[1] + big[0] @ small[1] + big[0] @ big[1]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    for seed in range(3):
        x, labels = batch(n, 45, 3, seed, torch.float32, spread)
        assert_as_exact_as_plain("triton", x, labels, Options(reduction=reduction))
    in_one_launch = n <= fused.SMALL_ROWS and reduction == "mean"
    assert set(products) == ({"TF32", "TF32x3"} if in_one_launch else {"TF32x3"})


@runs_here
@pytest.mark.parametrize(
    ("dtype", "setting", "small", "tiles"),
    [
        (torch.float32, "highest", "tf32x3", "tf32x3"),
        (torch.float32, "high", "tf32", "tf32"),
        (torch.float64, "high", "ieee", "ieee"),
        (torch.bfloat16, "highest", "tf32x3", "tf32"),
    ],
)
@pytest.mark.skipif(torch.version.hip is not None, reason="AMD multiplies float32 as it is")
def test_float32_products_follow_torch(dtype, setting, small, tiles):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert (fused.precision(dtype, small=True), fused.precision(dtype)) == (small, tiles)
    finally:
        torch.set_float32_matmul_precision(before)


@runs_here
@pytest.mark.parametrize("similarity", ["square", "signed_square"])
def test_one_launch_and_tiles_say_the_same(similarity):
    x, labels = on_device(*batch(fused.SMALL_ROWS, 37, 4, 0))
    loss, gradient = gradient_of(x, labels, similarity=similarity)
    rows, tiled = gradient_of(x, labels, similarity=similarity, reduction="none")
    torch.testing.assert_close(loss, rows.mean())
    torch.testing.assert_close(gradient, tiled / len(x))


TILED = ("inverse_norms", "row_sums", "finish_rows", "tile_gradient")


@runs_here
def test_no_launch_more_than_one_where_the_batch_is_small(monkeypatch):
    calls = []
    launched = fused._tiles()
    for name in ("loss_and_gradient", *TILED):
        kernel = getattr(launched, name)
        monkeypatch.setattr(launched, name, Counted(kernel, name, calls))
    x, labels = on_device(*batch(36, 40, 3, 0))
    gradient_of(x, labels)
    assert calls == ["loss_and_gradient"]
    bstriplet_loss(x, labels, impl="triton")
    assert calls == ["loss_and_gradient"] * 2
    calls.clear()
    gradient_of(x, labels, reduction="none")
    assert calls == ["inverse_norms", "row_sums", "finish_rows", "tile_gradient"]


class Counted:
    """A kernel that notes its name whenever it is launched."""

    def __init__(self, kernel, name, calls):
        self.kernel, self.name, self.calls = kernel, name, calls

    def __getitem__(self, grid):
        self.calls.append(self.name)
        return self.kernel[grid]


@runs_here
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_columns_shared_out_among_programs_give_the_same(monkeypatch, parts):
    x, labels = batch(150, 20, 4, 0, torch.float32)
    monkeypatch.setattr(fused, "_parts", lambda programs, tiles, device: parts)
    assert_as_exact_as_plain("triton", *on_device(x, labels), Options())


@runs_here
def test_rows_that_lie_badly_are_copied_and_others_are_not():
    aligned = torch.ones(70, 48, device=DEVICE)
    for rows in (aligned, aligned[:, :32], aligned[::2], aligned[:1].expand(9, -1)):
        assert fused._aligned(rows) is rows
    for rows in (aligned.T, aligned[:, :47], aligned[:, 1:33], torch.ones(3, 5, device=DEVICE)):
        copy = fused._aligned(rows)
        assert copy.shape[1] % 16 == 0
        assert torch.equal(copy[:, : rows.shape[1]], rows)
        assert not copy[:, rows.shape[1] :].any()


@interpreted
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_tile_without_an_active_row_is_passed_over(monkeypatch, reduction):
    from triton.runtime import interpreter

    products = []
    plain = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda *arguments: products.append(1) or plain(*arguments),
    )
    n = 4 * fused.gradient_blocks(torch.float32, False).n
    labels = torch.zeros(n, dtype=torch.int64)
    x = torch.zeros(n, 16)
    x[:, 0] = 1  # one class, one direction: h_i = margin - 1 < 0 for every row
    loss, gradient = gradient_of(x, labels, reduction=reduction)
    assert not loss.any()
    assert not gradient.any()
    forward_only = len(products)
    x[:2, 1] = torch.tensor([5.0, -5.0])  # two rows of the first tile become active
    labels[:2] = 1
    products.clear()
    loss, gradient = gradient_of(x, labels, reduction=reduction)
    assert gradient[:2].any()
    # every tile of S once for the row sums; then the first row of tiles and the first column
    row_blocks, blocks = (f(x.dtype, False) for f in (fused.row_blocks, fused.gradient_blocks))
    assert forward_only == (n // row_blocks.n) * (n // row_blocks.m)
    rows, columns = n // blocks.n, n // blocks.m
    assert len(products) - forward_only == 2 * (columns + rows - 1)
    assert_as_exact_as_plain("triton", x, labels, Options(reduction=reduction))


@runs_here
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_addresses_beyond_31_bits(schedule, reduction):
    """Rows 2^29 elements apart, in memory that is reserved and, but for the rows, never touched."""
    x, labels = batch(6, 16, 2, 0, torch.float16)
    stride = 2**29
    if DEVICE == "cpu":
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            memory = torch.frombuffer(mmap.mmap(-1, 2 * 6 * stride, flags), dtype=torch.float16)
        except (OSError, AttributeError, ValueError) as error:
            pytest.skip(f"no address space for it: {error}")
    elif torch.cuda.mem_get_info()[0] < 2 * 7 * stride:
        pytest.skip("not enough memory")
    else:
        memory = torch.empty(6 * stride, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided((6, 16), (stride, 1))
    far.copy_(x)
    x, labels = on_device(x, labels)
    for got, expected in zip(
        gradients_in_place(far, labels, reduction),
        gradients_in_place(x, labels, reduction),
        strict=True,
    ):
        assert torch.equal(got, expected)


def gradients_in_place(x, labels, reduction):
    leaf = x.detach().requires_grad_()
    loss = bstriplet_loss(leaf, labels, impl="triton", reduction=reduction)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@runs_here
@pytest.mark.parametrize("tensor", ["labels", "upstream"])
def test_expanded_and_strided_vectors(schedule, tensor):
    x, labels = on_device(*batch(20, 7, 2, 0))
    upstream = torch.full((20,), 0.5, dtype=x.dtype, device=DEVICE)
    for reduction in ("mean", "none"):
        results = []
        for strided in (False, True):
            y, up = labels, upstream if reduction == "none" else upstream[0]
            if strided and tensor == "labels":
                y = torch.stack((labels, labels + 1), dim=1)[:, 0]
            if strided and tensor == "upstream":
                up = upstream[:1].expand(20) if reduction == "none" else up
            leaf = x.clone().requires_grad_()
            loss = bstriplet_loss(leaf, y, impl="triton", reduction=reduction)
            results.append(torch.autograd.grad(loss, leaf, up)[0])
        assert torch.equal(*results)


@runs_here
@pytest.mark.parametrize("n", [40, 70])
def test_float16_gradient_survives_a_loss_scale(schedule, n):
    """dL/df is below float16's range; times the scale of mixed precision it is in it."""
    x, labels = on_device(*batch(n, 64, 3, 0, torch.float16))
    x = 200 * x
    leaf = x.clone().requires_grad_()
    loss = bstriplet_loss(leaf, labels, impl="triton")
    (got,) = torch.autograd.grad(loss, leaf, torch.tensor(65536.0, device=DEVICE))
    exact = x.double().requires_grad_()
    reference = bstriplet_loss(exact, labels, impl="reference")
    (truth,) = torch.autograd.grad(65536 * reference, exact)
    assert (got.double() - truth).norm() <= 2e-3 * truth.norm()


@runs_here
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("options", "with_ref"),
    [
        (Options(), False),
        (Options(0.3, "signed_square", "printed", "none"), False),
        (Options(0.3, reduction="sum"), True),
        (Options(0.9, "signed_square", "printed", "none"), True),
    ],
)
@pytest.mark.parametrize(("n", "m", "d"), [(150, 90, 33), (65, 200, 1)])
def test_panels_are_as_exact_as_plain(monkeypatch, dtype, options, with_ref, n, m, d):
    monkeypatch.setattr(fused, "by_panels", lambda *shape: True)
    monkeypatch.setattr(panels, "PANEL_NUMBERS", 64 * n)  # three panels, the last one cut short
    monkeypatch.setattr(panels, "_FEWEST_ROWS", 64)
    x, labels = on_device(*batch(n, d, 4, n, dtype))
    ref = on_device(*batch(m, d, 5, m, dtype)) if with_ref else ()
    assert_as_exact_as_plain("triton", x, labels, options, *ref)


@runs_here
def test_norms_from_1e_minus_10_to_1e15_and_zero_rows(schedule):
    x, labels = batch(140, 12, 3, 0)
    unit = torch.nn.functional.normalize(x, dim=1)
    norm = 10.0 ** torch.randint(-10, 16, (140, 1), generator=torch.Generator().manual_seed(0))
    unit[7] = 0
    true_loss, true_gradient = gradient_of(*on_device(unit, labels))
    loss, gradient = gradient_of(*on_device((unit * norm).float(), labels))
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=0)
    error = gradient.double().cpu() * norm - true_gradient.cpu()
    assert error.norm() <= 1e-5 * true_gradient.norm()
    assert not gradient[7].any()


@runs_here
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_what_is_no_number_is_not_hidden(schedule, bad):
    x, labels = on_device(*batch(100, 20, 3, 0, torch.float32))
    x[70, 3] = bad
    loss, gradient = gradient_of(x, labels)
    assert loss.isnan()
    assert gradient.isnan().any()


@runs_here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_bits_again(schedule, dtype):
    x, labels = on_device(*batch(100, 40, 3, 0, dtype))
    first, again = (gradient_of(x, labels) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@runs_here
def test_an_inactive_tile_of_a_panel_is_not_read():
    raw = torch.full((64, 64), torch.nan, device=DEVICE)
    labels, ones = torch.zeros(64, dtype=torch.int64, device=DEVICE), torch.ones(64).to(DEVICE)
    for pull, expected in ((torch.zeros(2, 64), 0), (torch.eye(2, 64), 1)):
        weights = torch.empty_like(raw)
        vectors = (labels, labels, ones, ones, pull.to(DEVICE), pull.to(DEVICE))
        sizes = (64, 64, 64, 64, 64, 64, 0, 0)
        fused._tiles().panel_weights[1, 1](
            raw, weights, *vectors, *sizes, BLOCK_N=panels.BLOCK_N, BLOCK_M=panels.BLOCK_M
        )
        assert weights.isnan().all() if expected else not weights.any()


@runs_here
def test_panels_read_no_value_of_a_tensor(monkeypatch):
    """A fake tensor has no values: reading one, as a synchronisation would, raises."""
    kernels = fused._tiles()
    for name in ("panel_sums", "panel_weights"):
        monkeypatch.setattr(kernels, name, Unlaunched())
    monkeypatch.setattr(panels, "PANEL_NUMBERS", 64 * 200)
    monkeypatch.setattr(panels, "_FEWEST_ROWS", 64)
    for dtype in TOLERANCE:
        with FakeTensorMode():
            x, labels = torch.empty(200, 24, dtype=dtype), torch.empty(200, dtype=torch.int64)
            inverse = torch.empty(200, dtype=fused.accumulation_dtype(x))
            side = panels.make_side(x, labels, inverse)
            sums = panels.row_sums(side, side, True, False)
            gradient = panels.gradient(side, sums[:2], side, sums[:2], True, False)
        assert gradient.shape == (200, 32)


class Unlaunched:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


def test_panels_hold_half_of_s_and_little_memory():
    for n, m in ((5000, 5000), (100, 7), (1 << 20, 1 << 20), (3000, 1 << 17)):
        step = panels.panel_rows(n, m)
        assert step * m <= max(panels.PANEL_NUMBERS, 128 * m) + 64 * m
        assert panels.pairs(n, m, False) == n * m
        own = sum((min(k + step, n) - k) * (n - k) for k in range(0, n, step))
        assert panels.pairs(n, n, True) == own if n == m else True
    assert panels.pairs(1 << 14, 1 << 14, True) < 0.52 * (1 << 28)


def counted(n, m, d, dtype=torch.float32, wants_gradient=True):
    """Of a scalar loss on a GPU."""
    return fused.operations(Work(n, m, d, dtype, "mean", wants_gradient, "cuda"), [n])


def test_panels_are_taken_where_d_is_large():
    for dtype in (torch.float32, torch.bfloat16):
        assert not fused.by_panels(4096, None, 128, dtype)
        assert not fused.by_panels(100, None, 1280, dtype)
        assert fused.by_panels(4096, None, 2048, dtype)
        wide = counted(4096, None, 2048, dtype)
        least = 2 * 2 * 4096 * 4096 * 2048
        assert least < wide.flops <= 1.3 * least
        assert counted(4096, 4096, 2048, dtype, wants_gradient=False).flops == least / 2


def test_cost_counts_what_is_launched():
    small = counted(36, None, 64)
    assert small[:3] == (2 * 2 * 64 * 64 * (64 + 32), 4 * 36 * 64 * 4, 2)
    assert counted(36, None, 64, torch.bfloat16).bytes == (2 + 4 + 4 + 2) * 36 * 64
    assert counted(36, None, 64, wants_gradient=False).launches == 1
    tiles = counted(128, None, 128)
    assert tiles.flops == 2 * 128 * 128 * 128 * 3
    assert tiles.launches == 5
    both = counted(128, 256, 128)
    assert both.flops == 2 * 128 * 256 * 128 * 5
    assert both.launches == 9


class NotRun:
    """A kernel that is counted, not run."""

    def __init__(self):
        self.launches = 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        self.launches += 1


@runs_here
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_panels", [False, True], ids=["tiles", "panels"])
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(36, None, 1280), (1024, None, 128), (1024, None, 33), (8192, None, 512), (300, 500, 64)],
)
def test_predicted_launches_are_those_made(monkeypatch, n, m, d, by_panels, dtype):
    """On fake tensors of a GPU with an H100's processors."""
    kernel = NotRun()
    for name in (*TILED, "loss_and_gradient", "panel_sums", "panel_weights"):
        monkeypatch.setattr(fused._tiles(), name, kernel)
    monkeypatch.setattr(fused, "by_panels", lambda *_: by_panels)
    monkeypatch.setattr(fused, "_on_device_of", lambda _: nullcontext())
    monkeypatch.setattr(fused, "processors", lambda _: 132)
    monkeypatch.setattr(fused, "_is_hopper", lambda _: False)
    with FakeTensorMode():
        x, labels = on_fake_gpu(n, d, dtype)
        others = (None, None) if m is None else on_fake_gpu(m, d, dtype)
        both = x, others[0], labels, others[1]
        spec = Spec(wants_gradient=True)
        with Launches() as forward:
            loss, rows, state = fused.forward(*both, spec)
        launches = forward.launches + kernel.launches
        assert counted(n, m, d, dtype, wants_gradient=False).launches == launches
        upstream = torch.empty_like(loss)
        with Launches() as backward:
            if type(state) is Gradients:
                autograd._scaled(state[0], upstream, dtype)
            else:
                for gradient in fused.backward(upstream, *both, rows, state, spec):
                    _ = None if gradient is None else gradient.to(dtype)  # as the caller does
    launches = forward.launches + backward.launches + kernel.launches
    assert counted(n, m, d, dtype).launches == launches
