"""Imports run one way: a reader of a module need not know those that use it."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "bstriplet_kernels"
HARNESS = ROOT / "python" / "bstriplet"
PUBLIC = {"bstriplet_kernels", "bstriplet_kernels.metric_learning", "bstriplet_kernels.doctor"}
LAYERS = ("spec", "reference", "paths", "checks", "plan", "operators", "autograd", "functional")
"""Of the loss, from the numbers up; none imports from those after it."""


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
    assert "bstriplet.runs" in harness
    for name, path in modules.items():
        assert not set(imported(path, harness)), name
