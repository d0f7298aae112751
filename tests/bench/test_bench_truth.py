"""What judges the others: the truth, the providers' formulas, the gate, the made-up inputs."""

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import cases, counting, floors, gate, providers, truth
from bench.cases import FORWARD, Case, make_problem
from bstriplet_kernels.reference import naive_loss

small_cases = st.builds(
    lambda n, d, c, balance, active: Case(n, d, min(c, n), "float64", balance=balance,
                                          active=active),
    st.integers(2, 40), st.integers(1, 12), st.integers(1, 9),
    st.sampled_from(["even", "zipf", "dominant"]), st.sampled_from([None, 0.5, 1.0]),
)  # fmt: skip


@given(small_cases)
def test_truth_is_the_naive_form_in_float64(case):
    x, labels, margin = make_problem(case)[1:]
    loss = naive_loss(x, labels, margin)
    (gradient,) = torch.autograd.grad(loss, x)
    found = truth.evaluate(x, labels, margin)
    assert found.loss == pytest.approx(loss.item(), abs=1e-12)
    error = (found.gradient - gradient[found.rows]).norm().item()
    assert error <= 1e-10 * (gradient.norm().item() + found.scale)
    assert len(found.rows) == case.n


@pytest.mark.parametrize("rows", [3, 13])  # of a panel; classes without a moment matrix need 8
def test_truth_in_panels_is_the_truth(rows, monkeypatch):
    x, labels, margin = make_problem(Case(300, 8, 60, "float64", balance="zipf"))[1:]
    whole = truth.evaluate(x, labels, margin)
    monkeypatch.setattr(truth, "_PANEL_ELEMENTS", 8 * rows)
    parts = truth.evaluate(x, labels, margin)
    assert parts.loss == pytest.approx(whole.loss, abs=1e-14)
    torch.testing.assert_close(parts.gradient, whole.gradient, rtol=1e-11, atol=1e-14)


def test_truth_of_many_rows_is_a_sample_of_them(monkeypatch):
    x, labels, margin = make_problem(Case(300, 8, 5, "float64"))[1:]
    every = truth.evaluate(x, labels, margin)
    monkeypatch.setattr(truth, "_PAIRS", 300 * 20)
    some = truth.evaluate(x, labels, margin)
    assert len(some.rows) == 20
    assert some.loss == every.loss
    torch.testing.assert_close(some.gradient, every.gradient[some.rows])


def test_two_evaluations_that_differ_judge_nothing(monkeypatch):
    x, labels, margin = make_problem(Case(12, 4, 3, "float64"))[1:]
    right = truth.contrasts
    monkeypatch.setattr(truth, "contrasts", lambda x, y: 1.001 * right(x, y))
    with pytest.raises(ArithmeticError, match="differ by"):
        truth.evaluate(x, labels, margin)


@given(small_cases)
def test_eager_form_is_the_naive_form(case):
    x, labels, margin = make_problem(case)[1:]
    eager = providers.eager_loss(x, labels, margin)
    torch.testing.assert_close(eager, naive_loss(x, labels, margin), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("panel", [7, 1000])
def test_tiled_supcon_is_metric_learnings(panel, monkeypatch):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, labels, _ = make_problem(Case(30, 6, 4, "float64"))[1:]
    monkeypatch.setattr(providers.TiledSupCon, "PAIRS", 30 * panel)
    ours = providers.TiledSupCon.apply(x, labels)
    theirs = losses.SupConLoss()(x, labels)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", sorted(providers.providers()))
@pytest.mark.parametrize("operation", [FORWARD, cases.FORWARD_BACKWARD])
def test_every_provider_that_does_not_compile_passes_the_gate(name, operation):
    provider = providers.providers()[name]
    problem = make_problem(Case(24, 16, 3, operation=operation))
    if provider.group == providers.COMPILED or provider.missing:
        pytest.skip("compiles for seconds, or is not installed")
    if provider.group == providers.OURS and _refused(provider, problem):
        pytest.skip("does not take this input here")
    result = provider.make(problem)(problem.x, problem.labels)
    errors = gate.Gate(problem).judge(provider, *result)
    assert errors.reason_to_refuse(torch.float32) is None


def _refused(provider, problem):
    try:
        provider.make(problem)(problem.x, problem.labels)
    except ValueError as error:
        return "does not take" in str(error)
    return False


@pytest.mark.parametrize("wrong", ["loss", "gradient", "sign", "no gradient", "nan"])
@pytest.mark.parametrize("judge", ["truth", "itself"])
def test_gate_refuses_what_is_slightly_wrong(wrong, judge):
    problem = make_problem(Case(24, 16, 3))
    make = partial(providers._of_margin, naive_loss)
    provider = providers.Provider("x", providers.PEER, make, judge)
    loss, gradient = make(problem)(problem.x, problem.labels)
    change = {
        "loss": lambda: (loss * 1.0001, gradient),
        "gradient": lambda: (loss, gradient * 1.0001),
        "sign": lambda: (loss, -gradient),
        "no gradient": lambda: (loss, None),
        "nan": lambda: (loss * torch.nan, gradient),
    }[wrong]
    judged = gate.Gate(problem).judge(provider, *change())
    assert judged.reason_to_refuse(torch.float32) is not None
    right = gate.Gate(problem).judge(provider, loss, gradient)
    assert right.reason_to_refuse(torch.float32) is None


def test_peer_of_many_rows_is_judged_on_the_first(monkeypatch):
    monkeypatch.setattr(gate, "_MOST_ROWS", 10)
    problem = make_problem(Case(24, 16, 3))
    seen = []

    def make(problem):
        seen.append((len(problem.x), problem.x.dtype))
        return providers._of_margin(naive_loss, problem)

    provider = providers.Provider("x", providers.PEER, make, "itself")
    errors = gate.Gate(problem).judge(provider, *make(problem)(problem.x, problem.labels))
    assert seen == [(24, torch.float32), (10, torch.float32), (10, torch.float64)]
    assert errors.reason_to_refuse(torch.float32) is None


def test_a_peer_without_a_triplet_inside_its_margin_is_right():
    """Its loss and gradient are 0: no relative error is of that."""

    def nothing(problem):
        return lambda x, labels: (x.sum() * 0, torch.zeros_like(x))

    problem = make_problem(Case(6, 16, 3))
    provider = providers.Provider("x", providers.PEER, nothing, "itself")
    judged = gate.Gate(problem).judge(provider, *nothing(problem)(problem.x, problem.labels))
    assert judged == gate.Errors(0.0, 0.0)


@pytest.mark.parametrize("active", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_active_rows_is_as_asked(active):
    problem = make_problem(Case(200, 16, 4, active=active))
    found = truth.evaluate(problem.x, problem.labels, problem.margin)
    assert found.active == pytest.approx(active, abs=0.01)


def test_inputs_repeat_and_balance_is_as_asked():
    case = Case(1000, 8, 10)
    a, b = make_problem(case), make_problem(case)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.labels, b.labels)
    assert a.labels.bincount().tolist() == [100] * 10
    dominant = make_problem(replace(case, balance="dominant")).labels.bincount()
    assert dominant[0] > 950
    assert dominant.min() >= 1
    zipf = make_problem(replace(case, balance="zipf")).labels.bincount()
    assert zipf[0] > 3 * zipf[4]
    assert zipf.min() >= 1
    assert (a.x != 0).all()


@pytest.mark.parametrize(("n", "d", "c"), [(40, 8, 2), (40, 8, 20), (41, 64, 9), (96, 33, 96)])
@pytest.mark.parametrize("operation", [FORWARD, cases.FORWARD_BACKWARD])
def test_floors_do_no_less_than_they_say(n, d, c, operation):
    problem = make_problem(Case(n, d, c, operation=operation))
    sizes = problem.labels.bincount()
    small = sizes[(sizes < d) & (sizes > 1)]
    backward = operation == cases.FORWARD_BACKWARD
    least = {
        floors.pair_products: (1 + 2 * backward) * n * n * d,
        floors.moment_products: (2 + 2 * backward) * n * d * d
        + (2 + 2 * backward) * int(small.square().sum()) * d,
    }
    for floor, expected in least.items():
        step = floor(problem)
        with counting.Operations() as operations:
            step(problem.x, problem.labels)
        assert expected <= operations.flops <= 2 * expected


def test_moves_of_rows_bring_every_row_home():
    problem = make_problem(Case(700, 900, 5))
    assert torch.equal(floors.row_moves(problem)(problem.x, problem.labels)[1], problem.x)
    forward = make_problem(Case(36, 8, 3, operation=FORWARD))
    assert floors.row_moves(forward)(forward.x, forward.labels) == (None, None)


def test_liger_is_infonce_of_the_same_rows(monkeypatch):
    """Its own module is not needed to be told apart from another loss."""

    class Fused:
        def __call__(self, weight, rows, target):
            return torch.nn.functional.cross_entropy(rows @ weight.T, target)

    module = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=Fused)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=module))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    problem = make_problem(Case(24, 16, 3))
    provider = providers.Provider("Liger", providers.PEER, providers._liger, "itself")
    result = provider.make(problem)(problem.x, problem.labels)
    errors = gate.Gate(problem).judge(provider, *result)
    assert errors.reason_to_refuse(torch.float32) is None
