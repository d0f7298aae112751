"""What each Triton kernel takes on each architecture, compiled ahead of time: no GPU is needed.

python bench/triton_resources.py            print the table and write results/compile/…csv
python bench/triton_resources.py --check    fail on a spill or a misfit; write nothing

With --check the configurations must be those of the file and none of its rows may be at fault. What
takes most on Hopper by the file is compiled anew and printed: of each kernel one configuration, of
`loss_and_gradient` one per dtype; so is what takes least on one of the other architectures in turn.
These must be the file's rows, where Triton is the one that made the file (`MADE_BY`).

A row is a configuration that a launcher asks for; of second moments and class sums only the widest.
`step_barriers` are in one step of the innermost loop that multiplies (NVIDIA only). Spills are
ptxas' stack bytes on NVIDIA and spilled vector registers, in bytes, on AMD.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bstriplet_kernels.paths import gpu
from bstriplet_kernels.paths.moments import (
    class_sum_kernels,
    class_sums_on_gpu,
    on_gpu,
    wide_kernels,
)
from bstriplet_kernels.paths.moments import kernels as moment_kernels
from bstriplet_kernels.paths.triton import blocks, pair_kernels, pairs, small, small_kernels
from bstriplet_kernels.spec import Rows

RESULTS = Path(__file__).parent / "results" / "compile" / "triton_resources.csv"
MADE_BY = "3.8.0"
"""The version of Triton that the file's rows are of."""
PRODUCT = r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\.\S*?(m\d+n\d+k\d+|kind::\w+)\S*"
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TRITON_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
TYPES = {
    **dict.fromkeys(
        (
            *("n", "m", "d", "width", "n_rows", "column_rows", "row_tiles", "column_tiles"),
            *("parts", "tiles", "first", "own", "signed", "mean", "wants_gradient"),
            *("one_upstream", "run", "runs", "least", "classes", "stride", "steps"),
        ),
        "i32",
    ),
    **dict.fromkeys(("margin", "scale", "squared_eps"), "fp64"),
    "sigma": "fp32",
    **dict.fromkeys(("labels", "column_labels", "ref_labels", "order", "ref_order"), "*i64"),
    **dict.fromkeys(("small_rows", "columns_before", "middle_first", "middle_last"), "*i32"),
    **dict.fromkeys(("totals", "total"), "*fp64"),
    "similarities": "*fp16",
}
"""Arguments that have one type in all kernels; other pointers are of the dtype that is summed."""
OF_JOINT_BATCHES = ("ref_emb", "ref_labels", "ref_order", "columns_before")
EMBEDDINGS = ("embeddings", "ref_emb")
UNIT_STRIDES = ("stride_d", "ref_stride_d", "stride_label")  # of what is aligned
ALIGNED = ("d", "width", *EMBEDDINGS)
SPILLS = {
    "sm_80": {"class_moments": 200, "row_means": 24},
    "sm_90": {
        "half_tile_sums": 200,
        "class_moments": 300,
        "gradient_matrices": 260,
        "row_means": 1200,
        "row_gradients": 2300,
        "band_gradient": 48,
    },
    "sm_100": {"class_moments": 100, "row_means": 200, "row_gradients": 320, "band_gradient": 130},
    "gfx942": {"class_moments": 16},
}
"""Bytes a thread that a kernel may spill; 8 where none are given. Kernels spill a complete sum; on
a Hopper also a run's matrices on their way to shared memory, and the results of a block of rows.
Hopper's blocks are the fastest of those tried: smaller ones spill less and are slower."""
WIDTHS = (16, 128, 192, 512)
"""Padded D for which blocks differ."""


class Architecture(NamedTuple):
    """A GPU architecture to compile for, and the shared memory that one block may take there."""

    gpu: GPUTarget
    shared_limit: int
    kind: str

    @property
    def hopper(self) -> bool:
        return self.kind == "hopper"


ARCHITECTURES = {  # what sm_80 runs, its smaller siblings sm_86 and sm_89 run too: their limit
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 101_376, "other"),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 232_448, "hopper"),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 232_448, "blackwell"),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 65_536, "amd"),
}


_COLUMNS = (
    *("kernel", "dtype", "precision", "layout", "kind"),
    *("block_n", "block_m", "block_d", "block_v", "warps", "stages", "target"),
)


class Configuration(NamedTuple):
    """One kernel as its launcher asks for it; `layout` is how embeddings lie in memory."""

    kernel: str
    dtype: torch.dtype
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    layout: str = "aligned"

    @property
    def of_moments(self) -> bool:
        return "DP" in self.constants  # a padded D


def configurations(architecture: Architecture) -> list[Configuration]:
    """All that can be launched on an architecture."""
    found = []
    for dtype in TRITON_NAMES:
        found += _of_small(dtype, architecture)
        for width in WIDTHS:
            found += _of_pairs(dtype, width, architecture)
    for dtype in (torch.float32, torch.float64):
        rows = {"PHI_SCALE": 1.0, "BLOCK_N": 32, "BLOCK_T": 16}
        found.append(Configuration("finish_rows", dtype, rows))
        for kernel in ("reduce_losses", "weigh_rows"):
            found.append(Configuration(kernel, dtype, {"LARGEST": 13, "BLOCK_N": 2048}, 8))
    for depth, dtype, joint in (
        (128, torch.float32, False),
        (128, torch.float16, False),
        (256, torch.float32, False),
        (512, torch.float32, False),
        (128, torch.float32, True),
        (128, torch.float64, False),
    ):
        found += _of_depth(depth, dtype, joint, architecture)
    return found + _of_class_sums()


def _of_depth(
    depth: int, dtype: torch.dtype, joint: bool, architecture: Architecture
) -> list[Configuration]:
    """Kernels of moments of so many columns, backward of a scalar loss; half precision unsplit."""
    columns = 1 << 16 if joint else None
    sizes = on_gpu.Sizes(
        1 << 16, columns, depth, dtype == torch.float64, gpu.USUAL_PROCESSORS, architecture.kind
    )
    wide = sizes.wide
    shape = {
        **{"DP": depth, "SPLIT": dtype == torch.float32, "UNIFORM": True, "BY_ROW": False},
        **{"BY_Q": True, "TILE": sizes.tile, "HALVED": wide, "WIDE": wide, "JOINT": joint},
        **{"SCALED": sizes.scaled, "ROWS": 16, "DEPTH": on_gpu.TOTALS.depth},
        **{"SIZE": sizes.numbers, "WIDTH": sizes.tile if wide else depth},
    }
    held = architecture.hopper and not wide and depth <= on_gpu.WHOLE_DEPTH
    matrices = on_gpu.TOTALS._replace(warps=8 if wide else 4)
    found = []
    for kernel, cut in (
        ("split_rows", on_gpu.SPLIT_ROWS),
        ("add_totals", on_gpu.TOTALS),
        ("moment_matrices", matrices),
        ("gradient_matrices", matrices),
        *on_gpu.cuts_of(sizes)._asdict().items(),
    ):
        constants = {
            "BLOCK": cut.rows if wide else min(cut.rows, on_gpu.BLOCK_NUMBERS // depth),
            "BLOCK_D": min(sizes.scaled, cut.depth),
            "BLOCK_V": cut.depth,
            "BLOCK_K": depth if held else min(depth, cut.depth),
        }
        found.append(Configuration(kernel, dtype, shape | constants, cut.warps, cut.stages))
    return found


def _of_class_sums() -> list[Configuration]:
    """Kernels of class sums, forward and backward of a scalar loss, with and without ref_emb."""
    own = dict.fromkeys(("ref_emb", "ref_labels", "ref_gradient"))
    weighted = {"BY_Q": True, "NORMS": False}
    added = {"BLOCK": class_sums_on_gpu.ADDED, "DEPTH": class_sums_on_gpu.ADDED_RUNS}
    summed = {"ROWS": class_sums_on_gpu.SUMMED}
    one = {"OWN": True, "BY_ROW": False}
    found = []
    dtypes = torch.float64, torch.float32, torch.bfloat16
    for d, dtype in itertools.product((128, 2048), dtypes):
        block = {
            "ROWS": class_sums_on_gpu.block_rows(d, 8 if dtype == torch.float64 else 4),
            "BLOCK_D": class_sums_on_gpu.block_columns(d),
            "BLOCK": class_sums_on_gpu.FOUND,
            "WHOLE": True,
            "NORMS": True,
            "ref_stride_d": 1,
        }
        for kernel, more in (
            ("class_sums", summed | {"weights": None}),
            ("class_sums", summed | {"weights": None, "NORMS": False}),
            ("class_sums", summed | weighted),
            ("find_classes", own | {"NORMS": False}),
            ("find_classes", {}),
            ("add_class_parts", weighted | added),
            ("add_class_totals", weighted | added),
            ("linear_means", one),
            ("linear_means", one | {"OWN": False}),
            ("linear_gradients", own),
            ("linear_gradients", {}),
        ):
            warps = class_sums_on_gpu.sum_warps(d) if kernel == "class_sums" else 4
            found.append(Configuration(kernel, dtype, block | more, warps))
    return found


def _precisions(dtype: torch.dtype, architecture: Architecture) -> list[str]:
    """The names of float32 products under either of torch's settings."""
    if architecture.gpu.backend == "hip":
        return ["ieee"]
    before = torch.get_float32_matmul_precision()
    try:
        found = set()
        for allowed in ("highest", "high"):
            torch.set_float32_matmul_precision(allowed)
            found.add(small.precision(dtype))
        return sorted(found)
    finally:
        torch.set_float32_matmul_precision(before)


def _of_small(dtype: torch.dtype, architecture: Architecture) -> list[Configuration]:
    found = []
    cut = small.blocks_of(dtype, architecture.hopper)
    for layout in ("aligned", "strided"):
        if dtype == torch.float32 and architecture.gpu.backend == "cuda":
            found.append(
                Configuration("batch_products", dtype, cut.constants, cut.warps, layout=layout)
            )
        for precision in _precisions(dtype, architecture):
            summed = precision == "tf32x3" and dtype == torch.float32
            constants = {"PRECISION": precision, "SUMMED": summed, **cut.constants}
            found.append(
                Configuration("loss_and_gradient", dtype, constants, cut.warps, cut.stages, layout)
            )
    return found


def _of_pairs(dtype: torch.dtype, width: int, architecture: Architecture) -> list[Configuration]:
    """Kernels over pairs of rows, for both of torch's settings where these differ."""
    splits = (True, False) if dtype == torch.float32 else (False,)
    forms = (blocks.Form(dtype, width, split, 132, architecture.hopper) for split in splits)
    return [each for form in forms for each in _of_form(form)]


def _of_form(form: blocks.Form) -> list[Configuration]:
    dtype = form.dtype
    scaled = {**form.constants, "SCALE": form.scale, **blocks.row_blocks(form).constants}
    prepared = {"BLOCK_N": pairs.PREPARED, "BLOCK_M": pairs.LABELS, "COLUMNS": True}
    found = [
        Configuration("prepare_rows", dtype, scaled | prepared),
        Configuration("normalise_gradient", dtype, scaled),
    ]
    kept = ({"MIRRORED": True, "KEPT": True},) if dtype.itemsize == 2 else ()
    for kernel, cut, kinds in (
        ("tile_sums", blocks.sum_blocks(form), ({},)),
        *(("half_tile_sums", blocks.half_blocks(form, n), ({}, *kept)) for n in (256, 1024, 4096)),
        ("tile_gradient", blocks.gradient_blocks(form), ({},)),
        ("tile_weights", blocks.weight_blocks(form), ({"MIRRORED": True}, {"MIRRORED": False})),
        ("tile_weights", blocks.weight_blocks(form, kept=True), kept),
    ):
        whole = cut.d == form.width and cut.v in (0, form.width)
        constants = {"OWN": True, "SIGNED": False, "KEPT": False}
        constants |= form.constants | cut.constants | {"WHOLE": whole}
        for kind in kinds:
            each = Configuration(kernel, dtype, constants | kind, cut.warps, cut.stages)
            if each not in found:
                found.append(each)
    if form.split:
        cut = blocks.product_blocks(form)
        constants = {"SPLIT": True, **cut.constants}
        found.append(Configuration("weighted_rows", dtype, constants, cut.warps, cut.stages))
    return found


def described(name: str, configuration: Configuration) -> dict[str, Any]:
    """The columns that say which configuration a row is of, on which architecture."""
    constants = _constants(configuration)
    cut = {f"block_{x.lower()}": constants.get(f"BLOCK_{x}", "") for x in ("N", "M", "D", "V")}
    if configuration.of_moments:
        cut |= {"block_n": constants.get("BLOCK", ""), "block_v": configuration.constants["DP"]}
    return {
        "kernel": configuration.kernel,
        "dtype": TRITON_NAMES[configuration.dtype],
        "precision": constants.get("PRECISION", "split" if constants.get("SPLIT") else ""),
        "layout": configuration.layout,
        "kind": _kind(configuration, constants),
        **cut,
        "warps": configuration.warps,
        "stages": configuration.stages,
        "target": name,
    }


def compile_one(name: str, configuration: Configuration) -> dict[str, Any]:
    """The row of the table of one configuration on one architecture."""
    architecture = ARCHITECTURES[name]
    is_nvidia = architecture.gpu.backend == "cuda"
    source = _source(configuration, _constants(configuration))
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
    kernel = triton.compile(source, target=architecture.gpu, options=options)
    registers, spilled, instructions = _nvidia_usage(kernel) if is_nvidia else _amd_usage(kernel)
    return described(name, configuration) | {
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": kernel.metadata.shared,
        "step_barriers": _step_barriers(kernel.asm["ptx"]) if is_nvidia else "",
        "instructions": " ".join(instructions),
    }


def _constants(configuration: Configuration) -> dict[str, Any]:
    parameters = _kernel(configuration).arg_names
    return {k: v for k, v in configuration.constants.items() if k in parameters}


def _kind(configuration: Configuration, constants: dict[str, Any]) -> str:
    """The differences between configurations of a kernel with the same blocks."""
    kinds = [kind for kind in ("MIRRORED", "KEPT", "NORMS", "WHOLE") if constants.get(kind)]
    joint = "ref_stride_d" in constants and "ref_emb" not in constants
    joint |= configuration.constants.get("JOINT", False)
    return " ".join([kind.lower() for kind in kinds] + ["joint"] * joint)


def _kernel(configuration: Configuration) -> Any:
    modules: tuple[Any, ...] = pair_kernels, small_kernels, class_sum_kernels
    if configuration.of_moments:
        wide = (wide_kernels,) if configuration.constants["WIDE"] else ()
        modules = *wide, moment_kernels
    name = configuration.kernel
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def _source(configuration: Configuration, constants: dict[str, Any]) -> ASTSource:
    """The source as the just-in-time compiler would form it from the launcher's arguments."""
    kernel = _kernel(configuration)
    names, types = kernel.arg_names, _argument_types(configuration)
    aligned = configuration.layout == "aligned"
    if configuration.of_moments and not configuration.constants["JOINT"]:
        constants |= dict.fromkeys(set(OF_JOINT_BATCHES) & set(names))
    if aligned:
        constants |= {n: 1 for n in UNIT_STRIDES if n in names and n not in constants}
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    divisible = [["tt.divisibility", 16]]
    for index, name in enumerate(names):
        kind = types.get(name, "i32" if "stride" in name else _accumulator(configuration))
        signature[name] = kind = "constexpr" if name in constants else kind
        if isinstance(kind, tuple):
            attributes |= {(index, part): divisible for part in range(len(kind))}
        elif kind != "constexpr":
            is_divisible = kind[0] == "*" if name not in ALIGNED else aligned
            if is_divisible or (aligned and name in ("stride_n", "ref_stride_n")):
                attributes[(index,)] = divisible
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def _argument_types(configuration: Configuration) -> dict[str, Any]:
    """The types of a kernel's arguments by name, where they are not of the accumulator."""
    dtype, accumulator = configuration.dtype, _accumulator(configuration)
    element = "*" + TRITON_NAMES[dtype]
    types = TYPES | dict.fromkeys(EMBEDDINGS, element)
    means = {"means": Rows(accumulator, accumulator)}
    if configuration.of_moments:
        stored = "*fp64" if dtype == torch.float64 else "*fp16"
        flag = {torch.bool: "*i1", torch.int32: "*i32"}[on_gpu.flag_dtype(dtype)]
        matrices = on_gpu.Matrices(stored, stored, accumulator)
        return types | means | {
            **dict.fromkeys(("own", "others", "active", "back"), matrices),
            "rows": on_gpu.SortedRows(stored, stored, accumulator, "*i64", "*i32", "*i32"),
            "sums": on_gpu.Sums(accumulator, "*fp64", "*i32"),
            "weights": on_gpu.Weights(flag, accumulator),
            "is_active": flag,
        }  # fmt: skip
    if configuration.kernel in vars(class_sum_kernels):
        order = class_sums_on_gpu.ClassOrder("*i64", accumulator, *["*i32"] * 4)
        return types | means | {
            **dict.fromkeys(("rows", "columns", "side"), order),
            "is_active": "*i1",
            "sums": class_sums_on_gpu.Sums("*fp64", "*fp64"),
            "total": accumulator,
            "weights": class_sums_on_gpu.Weights("*i1", accumulator),
        }  # fmt: skip
    prepared = "*fp16" if dtype == torch.float32 else element
    return types | {
        **dict.fromkeys(
            ("side", "rows", "columns"), pairs.Side(prepared, prepared, accumulator, "*i32")
        ),
        "panel": pairs.Panel(prepared, prepared),
        "scale": accumulator,
        **dict.fromkeys(("row_weights", "column_weights"), pairs.Weights(*[accumulator] * 2)),
    }


def _accumulator(configuration: Configuration) -> str:
    return "*fp64" if configuration.dtype == torch.float64 else "*fp32"


def _nvidia_usage(kernel: Any) -> tuple[int, int, list[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        registers, stack = re.search(
            r"REG:(\d+) STACK:(\d+)", _cuobjdump("-res-usage", cubin.name)
        ).groups()
        if stack != "0" and not re.search(r"\b(STL|LDL)\b", _cuobjdump("-sass", cubin.name)):
            stack = "0"  # set aside by the compiler, then not used
    found = {(m[1], m[2], _types(m[0])) for m in re.finditer(PRODUCT, kernel.asm["ptx"])}
    return int(registers), int(stack), sorted(" ".join(f).strip().replace(" ", ".") for f in found)


def _cuobjdump(*arguments: str) -> str:
    command = [str(NVIDIA_TOOLS / "cuobjdump"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _step_barriers(ptx: str) -> int | str:
    """Barriers of a block's threads in the smallest loop with a product; "" without such a loop."""
    labels = {m[1]: m.end() for m in re.finditer(r"^(\$L__BB\d+_\d+):", ptx, re.MULTILINE)}
    jumps = re.finditer(r"\bbra(?:\.uni)?\s+(\$L__BB\d+_\d+);", ptx)
    loops = [
        ptx[labels[jump[1]] : jump.start()] for jump in jumps if labels[jump[1]] < jump.start()
    ]
    products = [loop for loop in loops if re.search(PRODUCT, loop)]
    if not products:
        return ""
    return len(re.findall(r"\b(?:bar|barrier)\.(?:cta\.)?sync\b", min(products, key=len)))


def _types(instruction: str) -> str:
    return ".".join(re.findall(r"\.(tf32|bf16|f16|f64)", instruction)[:1])


def _amd_usage(kernel: Any) -> tuple[int, int, list[str]]:
    assembly = kernel.asm["amdgcn"]
    registers, spilled = (
        int(re.search(rf"\.vgpr_{what}:\s+(\d+)", assembly)[1]) for what in ("count", "spill_count")
    )
    return registers, 4 * spilled, sorted(set(re.findall(r"v_mfma_\w+", assembly)))


Work = list[tuple[str, Configuration]]
"""Names of architectures, and what is compiled for them."""


def all_work() -> Work:
    """All configurations on all architectures."""
    return [
        (name, configuration)
        for name, architecture in ARCHITECTURES.items()
        for configuration in configurations(architecture)
    ]


def compiled(work: Work) -> list[dict[str, Any]]:
    """The rows of these, two compilers at a time."""
    with concurrent.futures.ProcessPoolExecutor(max_workers=2) as pool:
        return list(pool.map(compile_one, *zip(*work, strict=True), chunksize=4))


def sample(work: Work, rows: list[dict[str, Any]]) -> Work:
    """What takes most of each kernel on Hopper by the file's rows, and least on one other.

    Raises:
        SystemExit: the rows are of other configurations.
    """
    row_of = {_identity(row): row for row in rows}
    identities = [_identity(described(*item)) for item in work]
    if sorted(identities) != sorted(map(_identity, rows)):
        raise SystemExit(f"{RESULTS} is of other configurations: run this without --check")

    def taken(item: tuple[tuple[str, ...], Any]) -> tuple[int, int]:
        row = row_of[item[0]]
        return row["spilled_bytes"], row["registers"]

    kernels = list(dict.fromkeys(configuration.kernel for _, configuration in work))
    others = [name for name, architecture in ARCHITECTURES.items() if not architecture.hopper]
    chosen = {}
    for _, (name, configuration) in sorted(zip(identities, work, strict=True), key=taken):
        kernel = configuration.kernel
        if name == others[kernels.index(kernel) % len(others)]:
            chosen.setdefault((name, kernel, None), (name, configuration))
        elif ARCHITECTURES[name].hopper:
            small = kernel == "loss_and_gradient"
            form = (configuration.dtype, configuration.layout) if small else None
            chosen[name, kernel, form] = name, configuration
    return list(chosen.values())


def _identity(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in _COLUMNS)


def read() -> list[dict[str, Any]]:
    """The rows of the file."""
    with RESULTS.open(encoding="utf-8", newline="") as file:
        rows = [dict(row) for row in csv.DictReader(file)]
    numbers = ("registers", "spilled_bytes", "shared_bytes")
    return [row | {name: int(row[name]) for name in numbers} for row in rows]


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """Configurations that spill more than is allowed, or take too much shared memory."""
    return [
        f"{row['kernel']} {row['dtype']} {row['precision']} {row['kind']} {row['layout']} on "
        f"{row['target']}: {row['spilled_bytes']} bytes spilled, "
        f"{row['shared_bytes']} bytes of shared memory "
        f"(at most {ARCHITECTURES[row['target']].shared_limit})"
        for row in rows
        if row["spilled_bytes"] > SPILLS[row["target"]].get(row["kernel"], 8)
        or row["shared_bytes"] > ARCHITECTURES[row["target"]].shared_limit
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a fault")
    check = parser.parse_args().check
    work = all_work()
    committed = read() if check else []
    rows = compiled(sample(work, committed) if check else work)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    print(text.getvalue(), end="")
    if not check:
        RESULTS.write_text(text.getvalue())
    found = faults([*committed, *rows])
    if check and triton.__version__ == MADE_BY:
        known = {tuple(map(str, row.values())) for row in committed}
        new = [row for row in rows if tuple(map(str, row.values())) not in known]
        found += [f"{row} is no row of {RESULTS}: write it again" for row in new]
    print(*found, f"{len(rows)} compiled, {len(found)} at fault", sep="\n", file=sys.stderr)
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main())
