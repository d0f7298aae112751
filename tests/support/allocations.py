"""Run as a program under counting_allocator.cpp: [explained, allocated] of each case of schedules.

Schedules with their cases come as JSON on stdin, and with the pairs they leave on stdout.
"""

import contextlib
import ctypes
import gc
import json
import sys
import threading
from typing import NamedTuple
from unittest import mock

import quick_interpreter
import torch

from bstriplet_kernels import bstriplet_loss
from bstriplet_kernels.cost import Work
from bstriplet_kernels.paths import PATHS, moments, native
from bstriplet_kernels.paths.moments import anywhere
from bstriplet_kernels.paths.triton import pairs


class Case(NamedTuple):
    """n rows of d numbers, against m others where that is not None.

    dominating: one class has 7 of 10 rows. margin: at 0.9 all rows have h > 0, at 0 half of them.
    """

    n: int
    d: int
    classes: int
    m: int | None = None
    dtype: str = "float32"
    ref_dtype: str | None = None
    reduction: str = "mean"
    margin: float = 0.9
    dominating: bool = False
    backward: bool = True
    threads: int = 1


def class_labels(case, n):
    """Labels [n] of equal shares but for a dominating class."""
    labels = torch.arange(n) % case.classes
    if case.dominating:
        labels[torch.arange(n) % 10 < 7] = 0
    return labels


def explained(schedule, case):
    """The plan's figure."""
    columns = class_labels(case, case.n if case.m is None else case.m)
    dtype, side_dtypes = getattr(torch, case.dtype), ()
    if case.ref_dtype is not None:
        side_dtypes = dtype, getattr(torch, case.ref_dtype)
        dtype = torch.promote_types(*side_dtypes)
    device = "cuda" if schedule == "anywhere" else "cpu"
    what = case.reduction, case.backward, device, similarity_of(schedule), side_dtypes
    work = Work(case.n, case.m, case.d, dtype, *what)
    sizes = columns.unique(return_counts=True)[1].tolist()
    return PATHS[path_of(schedule)].cost(work, sizes).extra_memory


def allocated(schedule, case, allocator):
    """Peak bytes of forward and backward.

    In a thread of its own, since csrc/ keeps each thread's scratch for the next call.
    """
    torch.manual_seed(0)
    x = torch.randn(case.n, case.d).to(getattr(torch, case.dtype)).requires_grad_(case.backward)
    labels, keywords, peak = class_labels(case, case.n), {}, []
    if case.m is not None:
        ref = torch.randn(case.m, case.d).to(getattr(torch, case.ref_dtype or case.dtype))
        keywords["ref_emb"] = ref.requires_grad_(case.backward)
        keywords["ref_labels"] = class_labels(case, case.m)
    keywords.update(reduction=case.reduction, margin=case.margin, impl=path_of(schedule))
    keywords.update(similarity=similarity_of(schedule))

    def count():
        allocator.start_counting()
        loss = bstriplet_loss(x, labels, **keywords)
        if case.backward:
            loss.sum().backward()
        peak.append(allocator.stop_counting())

    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    return peak[0]


def collected(function):
    """Without what Triton's interpreter keeps of a launch, in cycles; a GPU's launch does not."""

    def call(*arguments):
        result = function(*arguments)
        gc.collect()
        return result

    return call


def path_of(schedule):
    """What `impl` takes."""
    return schedule if schedule in PATHS else "gram"


def similarity_of(schedule):
    """What `similarity` takes."""
    return "linear" if schedule == "class_sums" else "square"


@contextlib.contextmanager
def forced(schedule):
    """Make the schedule the one that runs."""
    with contextlib.ExitStack() as forces:
        if schedule == "on_cpu":
            forces.enter_context(mock.patch.object(native, "missing", return_value="taken away"))
        if schedule == "anywhere":
            forces.enter_context(mock.patch.object(moments, "schedule_of", return_value=anywhere))
        if schedule == "triton":
            quick_interpreter.install()
            normalised = collected(pairs._normalised)
            forces.enter_context(mock.patch.object(pairs, "_normalised", normalised))
        yield


def measured(schedule, cases, allocator):
    """[explained, allocated] of each case."""
    with forced(schedule):
        torch.set_num_threads(1)
        allocated(schedule, Case(8, 4, 2), allocator)  # what a first call brings along
        found = []
        for case in cases:
            torch.set_num_threads(case.threads)
            found.append((explained(schedule, case), allocated(schedule, case, allocator)))
        return found


def main():
    """Explain and measure, schedule by schedule."""
    allocator = ctypes.CDLL(None)
    allocator.stop_counting.restype = ctypes.c_size_t
    allocator.start_counting()
    torch.empty(1000)
    assert allocator.stop_counting() == 4000, "torch's allocator is not the one that is counted"
    found = {
        schedule: measured(schedule, [Case(*values) for values in cases], allocator)
        for schedule, cases in json.load(sys.stdin).items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
