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
from launches import Launches, NotRun, on_fake_gpu
from oracle import TOLERANCE, Formula, assert_as_exact_as_plain, batch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_device import DEVICE, interpreted, on_device, runs_here

from bstriplet_kernels import autograd, bstriplet_loss
from bstriplet_kernels.cost import Work
from bstriplet_kernels.paths import PATHS, gpu
from bstriplet_kernels.paths.triton import blocks, pairs, pairs_cost, small
from bstriplet_kernels.spec import Spec, work_of

HERE = Path(__file__).parent


def gradient_of(x, labels, **options):
    x = x.detach().clone().requires_grad_()
    loss = bstriplet_loss(x, labels, impl="triton", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


@pytest.fixture(params=["tiles", "panels"])
def schedule(request, monkeypatch):
    """Both ways to go where one launch does not do, whatever is predicted; the smallest panels."""
    monkeypatch.setattr(pairs_cost, "by_panels", lambda *shape: request.param == "panels")
    monkeypatch.setattr(blocks, "PANEL_BYTES", 1)
    return request.param


CHOSEN = {
    "pairs and operators": [
        *("test_triton.py", "test_triton_counts.py"),
        *("test_operators.py", "test_tensors.py", "test_tracers.py"),
        "test_properties.py::test_as_exact_as_plain_torch_in_the_same_dtype",
        "test_properties.py::test_reference_embeddings_are_as_exact",
        "test_properties.py::test_nan_and_infinity_are_never_hidden",
    ],
    "moments and class sums": [
        *("test_moments_on_gpu.py", "test_moments_on_gpu_counts.py"),
        "test_class_sums_on_gpu.py",
    ],
}


@pytest.mark.skipif(gpu.interpreted(), reason="already there")
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
def test_in_the_interpreter(chosen):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
        + [
            "-k",
            "(triton or on_gpu) and not every_output",
        ]  # whose derivatives take a minute
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
    monkeypatch.setattr(gpu, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match=r"Triton is not installed .*pip install triton"):
        bstriplet_loss(x, torch.arange(2), impl="triton")


def test_refuses_tensors_where_no_kernel_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "the embeddings are on cpu" in PATHS["triton"].refuses(torch.ones(2, 2), None, Spec())
    assert "on meta" in PATHS["triton"].refuses(torch.ones(2, 2, device="meta"), None, Spec())


def test_refuses_gpus_before_tensor_cores_for_float32(monkeypatch):
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, is_refused in ((7, True), (8, False), (9, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, of=major: (of, 0))
        assert bool(PATHS["triton"].refuses(on_gpu, None, Spec())) is is_refused
        assert (gpu.kind.__wrapped__(on_gpu.device) == "hopper") is (major == 9)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert PATHS["triton"].refuses(on_gpu, None, Spec()) is None
    assert {small.precision(dtype) for dtype in (torch.float32, torch.float16)} == {"ieee"}


def test_launches_on_the_device_of_the_tensor(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or nullcontext()
    )
    for index in (0, 1):
        with gpu.current(SimpleNamespace(device=torch.device("cuda", index))):
            pass
    assert entered == [torch.device("cuda", 1)]


@pytest.fixture
def tensor_cores(monkeypatch):
    """Products as tensor cores form them; the interpreter's are exact. Returns their precisions.

    After every sixteen terms the sum is cut towards 0 to float32. A float32 operand is cut down to
    tf32, which "tf32x3" takes as the sum of two.
    """
    numpy = pytest.importorskip("numpy")
    from triton.runtime import interpreter

    precisions = set()

    def cut(exact):
        rounded = exact.astype(numpy.float32)
        nearer = numpy.nextafter(rounded, numpy.float32(0))
        return numpy.where(numpy.abs(rounded.astype(numpy.float64)) > abs(exact), nearer, rounded)

    def tf32(a, rounding=0):
        return ((numpy.ascontiguousarray(a).view(numpy.int32) + rounding) & -8192).view(a.dtype)

    def add_product(total, a, b):
        a, b = a.astype(numpy.float64), b.astype(numpy.float64)
        for k in range(0, a.shape[1], 16):
            total = cut(total.astype(numpy.float64) + a[:, k : k + 16] @ b[k : k + 16])
        return total

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total, operands = d.data, [a.data, b.data]
        precision = str(input_precision).rpartition(".")[2]
        if operands[0].dtype == numpy.float64:
            return interpreter.TensorHandle(total + operands[0] @ operands[1], d.dtype.scalar)
        if operands[0].dtype == numpy.float16:
            precision = "FLOAT16"
        elif precision == "TF32":
            operands = [tf32(x) for x in operands]
        else:
            big = [tf32(x, 4096) for x in operands]
            small = [tf32(x - y, 4096) for x, y in zip(operands, big, strict=True)]
            total = add_product(total, small[0], big[1])
            total = add_product(total, big[0], small[1])
            operands = big
        precisions.add(precision)
        return interpreter.TensorHandle(add_product(total, *operands), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    return precisions


def around_one_direction(n, d, spread):
    """Embeddings whose products have terms of one sign: cut sums then err in one direction."""
    x, _ = batch(n, d, 1, n, torch.float32, spread)
    return x, torch.arange(n) % 3


@interpreted
@pytest.mark.parametrize(("n", "d"), [(9, 45), (50, 1280)])
@pytest.mark.parametrize("spread", [0.03, 1.0])
def test_tensor_core_float32_is_as_exact_as_plain_in_one_launch(tensor_cores, n, d, spread):
    assert_as_exact_as_plain("triton", *around_one_direction(n, d, spread), Formula())
    assert tensor_cores == {"TF32", "TF32x3"}  # the interpreter's bfloat16 is float32


@interpreted
@pytest.mark.parametrize(
    ("n", "d", "spread"),
    [(70, 45, 0.03), (70, 45, 1.0), (70, 512, 0.03), (70, 512, 1.0), (600, 16, 0.03)],
)
def test_tensor_core_float32_is_as_exact_as_plain(tensor_cores, schedule, n, d, spread):
    assert_as_exact_as_plain("triton", *around_one_direction(n, d, spread), Formula())
    assert tensor_cores == {"FLOAT16"}


@pytest.fixture
def rounded_products():
    """torch is allowed to round float32 in products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD multiplies float32 as it is")
def test_one_launch_multiplies_as_torch_may(rounded_products):
    words = [small.precision(dtype) for dtype in TOLERANCE]
    assert words == ["ieee", "tf32", "tf32x3", "tf32x3"]
    torch.set_float32_matmul_precision("highest")
    assert small.precision(torch.float32) == "tf32x3"


@runs_here
def test_one_product_where_torch_may_round(schedule, rounded_products):
    x, labels = on_device(*batch(100, 70, 3, 0, torch.float32))
    rough = gradient_of(x, labels)
    torch.set_float32_matmul_precision("highest")
    for got, expected in zip(rough, gradient_of(x, labels), strict=True):
        error = (got - expected).norm() / expected.norm()
        assert 0 < error < 1e-3


@runs_here
@pytest.mark.parametrize("similarity", ["square", "signed_square"])
def test_one_launch_and_tiles_say_the_same(similarity):
    x, labels = on_device(*batch(small.ROWS, 37, 4, 0))
    loss, gradient = gradient_of(x, labels, similarity=similarity)
    rows, tiled = gradient_of(x, labels, similarity=similarity, reduction="none")
    torch.testing.assert_close(loss, rows.mean())
    torch.testing.assert_close(gradient, tiled / len(x))


TILED = ("prepare_rows", "half_tile_sums", "finish_rows", "weigh_rows", "tile_gradient")
TILED += ("normalise_gradient",)
KERNELS = (*TILED, "tile_sums", "reduce_losses", "tile_weights", "weighted_rows")
SMALL = ("batch_products", "loss_and_gradient")


def kernels():
    """Each kernel's module and name."""
    yield from ((pairs.kernels(), name) for name in KERNELS)
    yield from ((small.kernels(), name) for name in SMALL)


@runs_here
def test_one_launch_where_the_batch_is_small_and_two_in_float32(monkeypatch):
    calls = []
    for module, name in kernels():
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, Counted(kernel, name, calls))
    x, labels = on_device(*batch(36, 40, 3, 0))
    gradient_of(x, labels)
    assert calls == ["loss_and_gradient"]
    bstriplet_loss(x, labels, impl="triton")
    assert calls == ["loss_and_gradient"] * 2
    calls.clear()
    gradient_of(x.float(), labels)
    assert calls == ["batch_products", "loss_and_gradient"]
    calls.clear()
    gradient_of(x, labels, reduction="none")
    assert calls == list(TILED)


class Counted:
    """A kernel that notes its name whenever it is launched."""

    def __init__(self, kernel, name, calls):
        self.kernel, self.name, self.calls = kernel, name, calls

    def __getitem__(self, grid):
        self.calls.append(self.name)
        return self.kernel[grid]


@runs_here
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_columns_shared_out_among_programs_give_the_same(monkeypatch, schedule, parts):
    x, labels = batch(150, 20, 4, 0, torch.float32)
    for module in (blocks, pairs):
        monkeypatch.setattr(module, "parts", lambda *_: parts)
    assert_as_exact_as_plain("triton", *on_device(x, labels), Formula())


@interpreted
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_tile_of_weights_without_an_active_row_is_not_multiplied(monkeypatch, reduction):
    from triton.runtime import interpreter

    products = []
    plain = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda *arguments: products.append(1) or plain(*arguments),
    )
    monkeypatch.setattr(pairs_cost, "by_panels", lambda *shape: True)
    cut = blocks.weight_blocks(blocks.form_of(16, torch.float64, False, torch.device("cpu")))
    n = 2 * blocks.ROWS
    labels = torch.zeros(n, dtype=torch.int64)
    x = torch.zeros(n, 16, dtype=torch.float64)
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
    assert len(products) - forward_only == n // cut.n  # the first column of a symmetric panel
    assert_as_exact_as_plain("triton", x, labels, Formula(reduction=reduction))


@runs_here
@pytest.mark.parametrize("most", [0, 128])
def test_halved_sums_are_those_of_all_pairs(monkeypatch, most):
    monkeypatch.setattr(blocks, "MOST_HALVED_TILES", most)
    for dtype in (torch.float64, torch.float32):
        assert_as_exact_as_plain("triton", *on_device(*batch(300, 9, 4, 0, dtype)), Formula())


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
    ("formula", "with_ref", "of_one_panel"),
    [
        (Formula(), False, (150, 90, 133)),
        (Formula(0.3, "signed_square", "printed", "none"), False, (65, 200, 1)),
        (Formula(0.3, reduction="sum"), True, (65, 200, 1)),
        (Formula(0.9, "signed_square", "printed", "none"), True, (150, 90, 133)),
    ],
)
@pytest.mark.parametrize("size", [(150, 90, 133), (65, 200, 1)])
def test_panels_are_as_exact_as_plain(monkeypatch, dtype, formula, with_ref, of_one_panel, size):
    """Each formula with a panel for all rows in one size, and with the smallest in the other."""
    (n, m, d), panel_bytes = size, 1 << 25 if size == of_one_panel else 1
    monkeypatch.setattr(pairs_cost, "by_panels", lambda *shape: True)
    monkeypatch.setattr(blocks, "PANEL_BYTES", panel_bytes)
    x, labels = on_device(*batch(n, d, 4, n, dtype))
    ref = on_device(*batch(m, d, 5, m, dtype)) if with_ref else ()
    assert_as_exact_as_plain("triton", x, labels, formula, *ref)


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
def test_pairs_read_no_value_of_a_tensor(monkeypatch):
    """A fake tensor has no values: reading one, as a synchronisation would, raises."""
    for module, name in kernels():
        monkeypatch.setattr(module, name, NotRun())
    for by_panels in (False, True):
        monkeypatch.setattr(pairs_cost, "by_panels", lambda *shape, found=by_panels: found)
        for dtype in TOLERANCE:
            with FakeTensorMode():
                x, labels = torch.empty(200, 24, dtype=dtype), torch.empty(200, dtype=torch.int64)
                loss, rows, kept = PATHS["triton"].forward(x, None, labels, None, Spec())
                gradient, _ = PATHS["triton"].backward(
                    loss, x, None, labels, None, rows, kept.tensors, Spec()
                )
            assert gradient.shape == x.shape


def test_panels_are_of_bounded_size():
    for n, m in ((5120, 5120), (128, 128), (1 << 20, 1 << 20), (3072, 1 << 17)):
        for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)):
            form = blocks.form_of(128, dtype, dtype == torch.float32)
            step = blocks.panel_rows(form, n, m)
            assert step % blocks.ROWS == 0
            assert step * m * size <= max(blocks.PANEL_BYTES, blocks.ROWS * m * size)


def counted(n, m, d, dtype=torch.float32, wants_gradient=True):
    """Of a scalar loss on a GPU."""
    return PATHS["triton"].cost(Work(n, m, d, dtype, "mean", wants_gradient, "cuda"), [n])


def test_panels_are_taken_where_d_is_large():
    # half precision keeps S, and multiplies half of it once where float32 does all of it in all
    for dtype, products in ((torch.float32, 3), (torch.bfloat16, 0.75)):
        assert not pairs_cost.by_panels(4096, None, 128, dtype)
        assert pairs_cost.by_panels(4096, None, 2048, dtype)
        wide = counted(4096, None, 2048, dtype)
        least = products * 2 * 2 * 4096 * 4096 * 2048
        assert least < wide.flops <= 1.3 * least
        of_s = counted(4096, 4096, 2048, dtype, wants_gradient=False).flops
        assert of_s == (3 if dtype == torch.float32 else 1) * 2 * 4096 * 4096 * 2048
        assert counted(4096, None, 2048, dtype, wants_gradient=False).flops <= 0.52 * of_s


def test_panels_have_no_more_columns_than_32_bits_number():
    assert pairs_cost.by_panels(64, 1 << 24, 256, torch.bfloat16)
    for n, m in ((64, (1 << 24) + 1), (17_000_000, 64)):
        assert not pairs_cost.by_panels(n, m, 256, torch.bfloat16)


def test_cost_counts_what_is_launched():
    small = counted(36, None, 64)
    parts = 2 * 64 * 64 * 4 * 2
    assert small[:3] == (2 * 64 * 64 * (4 * 64 + 2 * 32), 4 * 36 * 64 * 4 + parts, 3)
    half = counted(36, None, 64, torch.bfloat16)
    assert half[:3] == (2 * 64 * 64 * 2 * (128 + 32), (2 + 4 + 4 + 2) * 36 * 64, 2)
    assert counted(36, None, 64, wants_gradient=False).launches == 2
    tiles = counted(128, None, 128)
    assert tiles.flops == 3 * 2 * 128 * (128 * 128 * 2 + 10 * 32 * 32)
    assert tiles.launches == 6
    both = counted(128, 256, 128)
    assert both.flops == 3 * 2 * 128 * 256 * 128 * 5
    assert both.launches == 10


@runs_here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_panels", [False, True], ids=["tiles", "panels"])
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(36, None, 1280), (1024, None, 128), (1024, None, 33), (8192, None, 512), (300, 500, 64)],
)
def test_predicted_launches_are_those_made(monkeypatch, n, m, d, by_panels, dtype):
    assert_predicted_launches(monkeypatch, n, m, d, by_panels, dtype, dtype)


@runs_here
@pytest.mark.parametrize("by_panels", [False, True], ids=["tiles", "panels"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ref_dtype", TOLERANCE)
def test_no_side_of_two_dtypes_is_widened_before(monkeypatch, by_panels, dtype, ref_dtype):
    assert_predicted_launches(monkeypatch, 300, 500, 64, by_panels, dtype, ref_dtype)


def assert_predicted_launches(monkeypatch, n, m, d, by_panels, dtype, ref_dtype):
    """On fake tensors of a GPU with an H100's processors."""
    kernel = NotRun()
    for module, name in kernels():
        monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(pairs_cost, "by_panels", lambda *_: by_panels)
    monkeypatch.setattr(gpu, "current", lambda _: nullcontext())
    monkeypatch.setattr(gpu, "processors", lambda _: 132)
    monkeypatch.setattr(gpu, "kind", lambda _: "hopper")
    with FakeTensorMode():
        x, labels = on_fake_gpu(n, d, dtype)
        others = (None, None) if m is None else on_fake_gpu(m, d, ref_dtype)
        both = x, others[0], labels, others[1]
        spec = Spec(wants_gradient=True)
        work = work_of(x, others[0], spec)
        with Launches() as forward:
            loss, rows, kept = PATHS["triton"].forward(*both, spec)
        launches = forward.launches + kernel.launches
        found = PATHS["triton"].cost(work._replace(wants_gradient=False), [n])
        assert found.launches == launches
        upstream = torch.empty_like(loss)
        with Launches() as backward:
            if kept.is_gradient:
                autograd._scaled(kept.tensors[0], upstream, dtype)
            else:
                given = upstream, *both, rows, kept.tensors, spec
                for side, gradient in zip(both, PATHS["triton"].backward(*given), strict=False):
                    _ = None if gradient is None else gradient.to(side.dtype)  # as the caller does
    launches = forward.launches + backward.launches + kernel.launches
    assert PATHS["triton"].cost(work, [n]).launches == launches
