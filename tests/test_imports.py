"""Imports run one way: a reader of a module need not know those that use it."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import bstriplet
import pytest
import timm

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "bstriplet_kernels"
HARNESS = ROOT / "python" / "bstriplet"
PUBLIC = {"bstriplet_kernels", "bstriplet_kernels.metric_learning", "bstriplet_kernels.doctor"}
LAYERS = ("spec", "reference", "paths", "checks", "plan", "operators", "autograd", "functional")
"""Of the loss, from the numbers up; none imports from those after it."""
FLOORS = (
    ("errors", "loss_registry"),
    ("text", "paper"),
    ("storage", "config"),
    ("data", "models", "mining", "group_batches"),
    ("sampler",),
    ("training",),
    ("study",),
    ("report",),
    ("cli",),
)
"""Of the harness, from the ground up: a room imports from the floors below its own, and itself."""


def name_of(path):
    """The module's dotted name from the package's parent on."""
    parts = path.relative_to(KERNELS.parent if KERNELS in path.parents else HARNESS.parent).parts
    return ".".join(parts).removesuffix(".py").removesuffix(".__init__")


def imported(path, modules):
    """The modules of the package that a file imports, within its functions too."""
    name, is_package = name_of(path), path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")[: -node.level + is_package or None]
                base = ".".join((*parents, *base.split("."))).rstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in modules:
                    yield inner
                elif base in modules:
                    yield base


@functools.cache
def graph(folder):
    """Each module of a package, and what it imports of it."""
    modules = {name_of(path): path for path in sorted(folder.rglob("*.py"))}
    return {name: set(imported(path, modules)) - {name} for name, path in modules.items()}


def test_the_loss_has_no_cycle_of_imports():
    found = graph(KERNELS)
    assert (
        "bstriplet_kernels.paths.triton.blocks"
        in found["bstriplet_kernels.paths.triton.pairs_cost"]
    )
    list(graphlib.TopologicalSorter(found).static_order())


@pytest.mark.parametrize("layer", range(len(LAYERS)), ids=LAYERS)
def test_no_layer_of_the_loss_knows_those_above(layer):
    above = {f"bstriplet_kernels.{name}" for name in LAYERS[layer + 1 :]}
    for name, others in graph(KERNELS).items():
        if name.split(".")[1:2] == [LAYERS[layer]]:
            assert not {other for other in others if ".".join(other.split(".")[:2]) in above}, name


def test_the_harness_reaches_the_loss_by_its_public_names_alone():
    modules = {name_of(path): path for path in KERNELS.rglob("*.py")}
    for path in HARNESS.rglob("*.py"):
        assert set(imported(path, modules)) <= PUBLIC, path
    harness = {name_of(path) for path in HARNESS.rglob("*.py")}
    assert "bstriplet.training.loop" in harness
    for name, path in modules.items():
        assert not set(imported(path, harness)), name


def test_the_harness_has_no_cycle_of_imports():
    found = graph(HARNESS)
    assert "bstriplet.data.layouts" in found["bstriplet.data.dataset"]
    list(graphlib.TopologicalSorter(found).static_order())


def test_every_module_of_the_harness_has_a_floor():
    named = {name.split(".")[1] for name in graph(HARNESS) if "." in name}
    assert named == {room for floor in FLOORS for room in floor} | {"__main__"}


@pytest.mark.parametrize("height", range(len(FLOORS)), ids=lambda height: FLOORS[height][0])
def test_no_floor_of_the_harness_knows_those_above_or_beside(height):
    floor = FLOORS[height]
    allowed = {room for below in FLOORS[:height] for room in below}
    for name, others in graph(HARNESS).items():
        room = name.split(".")[1:2]
        if room and room[0] in floor:
            assert {other.split(".")[1] for other in others} <= allowed | {room[0]}, name


def test_public_names_import_little():
    code = """if True:
        import sys
        import bstriplet
        assert {"GroupBatchSampler", "mine_groups"} < set(dir(bstriplet))
        print(*sys.modules)
        from bstriplet import GroupBatchSampler, mine_groups
        print(*sys.modules)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    package, names = map(set, map(str.split, run.stdout.splitlines()))
    assert not {"torch", "numpy", "sklearn"} & package
    assert {"torch", "sklearn"} < names
    assert not {"timm", "matplotlib", "jinja2"} & names
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bstriplet.nothing


def test_importing_the_models_registers_them_with_timm():
    """timm registers a model where its module is imported: the package must import both."""
    imported_by = graph(HARNESS)["bstriplet.models"]
    assert {"bstriplet.models.peleenet", "bstriplet.models.shufflenet"} == imported_by
    import bstriplet.models  # noqa: F401

    assert timm.list_models(["shufflenet_v2", "peleenet"]) == ["peleenet", "shufflenet_v2"]
