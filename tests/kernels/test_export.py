"""Programs that went through torch.export: any batch, each by its best path, trained afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported import Model, exported, train
from oracle import batch

from bstriplet_kernels import BSTripletLoss, bstriplet_loss, plan
from bstriplet_kernels.paths import PATHS


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"similarity": "signed_square"},
        {"similarity": "linear"},
        {"impl": "gram", "reduction": "sum"},
    ],
)
def test_a_dynamic_batch_of_any_size_from_2(strict, options):
    model = Model(**options)
    program = exported(model, strict)
    for n in (2, 3, 36, 65, 1000, 3000):
        given = batch(n, 6, 3, n, torch.float32)
        for got, expected in zip(train(program, *given), train(model, *given), strict=True):
            torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="embeddings has 1 row"):
        program(torch.ones(1, 6), torch.zeros(1, dtype=torch.int64))


def test_each_size_goes_by_the_path_of_an_eager_call(monkeypatch):
    program = exported(Model())
    taken = []
    for name, path in PATHS.items():

        def forward(*args, name=name, path=path):
            taken.append(name)
            return path.forward(*args)

        monkeypatch.setitem(PATHS, name, path._replace(forward=forward))
    for n in (2, 36, 500, 20_000):
        x, labels = batch(n, 6, 3, n, torch.float32)
        program(x, labels)
        embeddings = torch.empty(n, 8)
        spec = plan.Spec(wants_gradient=True)
        assert taken.pop() == plan.choose(embeddings, None, spec)


def test_a_hundred_thousand_rows_take_linear_memory():
    """In a process of its own with little room: S alone would be 40 GB."""
    script = (
        "import resource, torch\n"
        "from exported import Model, exported, train\n"
        "from oracle import batch\n"
        "program = exported(Model())\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "loss, gradient = train(program, *batch(100_000, 6, 3, 0, torch.float32))\n"
        "more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - used\n"
        "assert loss.isfinite() and gradient.norm() > 0\n"
        "assert more < 1e8, f'{more:.3g} bytes for 100,000 rows'\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1] / "support",
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_exported_without_gradients_and_trained_all_the_same():
    model = Model()
    with torch.no_grad():
        program = exported(model)
    given = batch(20, 6, 3, 1, torch.float32)
    for got, expected in zip(train(program, *given), train(model, *given), strict=True):
        torch.testing.assert_close(got, expected)


def test_one_graph_serves_sizes_that_no_tracer_knows():
    """Rows that a mask picks: their number is a symbol without value while compiling."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def masked(x, labels, keep):
        rows = keep.nonzero().squeeze(1)
        return bstriplet_loss(x[rows], labels[rows])

    x, labels = batch(40, 6, 3, 0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for kept in (2, 17, 40):
            keep = torch.arange(40) < kept
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            losses = masked(leaves[0], labels, keep), bstriplet_loss(leaves[1][keep], labels[keep])
            torch.testing.assert_close(*losses)
            for loss in losses:
                loss.backward()
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        with pytest.raises(ValueError, match="embeddings has 1 row"):
            masked(x, labels, torch.arange(40) < 1)


def test_no_size_is_decided_by_the_plan_while_tracing(monkeypatch):
    """A trace that asked for the path would be pinned to it."""
    monkeypatch.setattr(plan, "choose", None)
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *given: (torch.zeros(()),)

    compiled = torch.compile(BSTripletLoss(), fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 40, 4000):
        compiled(*batch(n, 6, 3, n, torch.float32))
    assert len(graphs) == 1
