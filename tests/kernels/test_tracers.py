"""Pairs of (transform, tracer, path, variant) out of `tracers`: none may give a wrong gradient."""

import itertools

import pytest
import torch
import tracers
from tracers import Case

pytestmark = pytest.mark.usefixtures("brief_kernels")
ASKED_FOR = (
    *("backward", "grad", "vjp", "jacrev", "jacrev(jacrev)", "vmap(grad)", "grad_and_value"),
    *("jvp", "hessian", "export", "make_fx", "bare operator", "bare operator, grad"),
)


def pairwise():
    """Cases in which any two choices occur together, taken greedily."""
    choices = (ASKED_FOR, tracers.MODES, tracers.PATHS, tracers.VARIANTS)
    every = [Case(*choice) for choice in itertools.product(*choices)]
    open_pairs = {pair for case in every for pair in pairs(case)}
    found = []
    while open_pairs:
        best = max(every, key=lambda case: len(open_pairs.intersection(pairs(case))))
        open_pairs.difference_update(pairs(best))
        found.append(best)
    return sorted(found)


def pairs(case):
    return list(itertools.combinations(enumerate(case), 2))


@pytest.mark.parametrize("case", pairwise(), ids=" / ".join)
def test_every_pair_of_choices(case):
    torch.use_deterministic_algorithms(False)  # inductor would compile for each case anew
    assert tracers.verdict(case) == "right"


@pytest.mark.parametrize("path", tracers.PATHS)
@pytest.mark.parametrize("transform", tracers.TRANSFORMS)
def test_every_transform_eagerly(transform, path):
    for variant in tracers.VARIANTS:
        assert tracers.verdict(Case(transform, "eager", path, variant)) == "right", variant


def test_a_gradient_that_vanishes_is_seen(monkeypatch):
    """The judge itself: a loss that is cut off the graph, and one that raises."""
    case = Case("grad", "eager", "auto", "plain")
    monkeypatch.setattr(tracers, "ours", lambda *choice: lambda x, *rest: 0 * x.sum())
    assert tracers.verdict(case).startswith("WRONG: 0, not")
    monkeypatch.setattr(tracers, "ours", lambda *choice: lambda x, *rest: x.no_such_name)
    assert tracers.verdict(case).startswith("error: AttributeError")
