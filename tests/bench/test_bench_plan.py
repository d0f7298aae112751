"""The plan's constants, as they are fitted and as rows of results judge them."""

import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from made_up import make_row

from bench import calibrate, measure, providers, table, targets
from bench.cases import DTYPES, Case, Problem
from bench.suites import suites
from bstriplet_kernels import plan
from bstriplet_kernels.cost import Constants, Cost
from bstriplet_kernels.paths import PATHS, native
from bstriplet_kernels.paths.moments import on_gpu
from bstriplet_kernels.paths.triton import pairs_cost, small

MOST = 1.3
"""The time of a choice over that of the fastest path, at most, at any point of the grid."""

TRUE = {
    "native": Constants(3e-5, 5e-13, 1e-12, 5e-6),
    small.SCHEDULE: Constants(3e-5, 1e-12, 1e-12, 7e-6),
    pairs_cost.TILES: Constants(6e-5, 2e-15, 3e-13, 5e-6, half=4e-15),
    pairs_cost.PANELS: Constants(6e-5, 2.2e-15, 3e-13, 5e-6, half=2e-15),
    on_gpu.SCHEDULE: Constants(1e-4, 6e-15, 3e-13, 5e-6, half=5e-15),
    "reference": Constants(5e-5, 2.2e-14, 4e-13, 5e-6, half=2.1e-14),
}
"""A GPU that never was: eager. A graph's replay has a fifth of its launches' time, and no call."""


def gpu_rows(noise, seed=0):
    """What the suite `crossover` measures on it, in both modes, off by up to so much."""
    rows, draw = [], random.Random(seed)
    for case in suites("cuda")["crossover"].cases:
        work = plan.Work(case.n, None, case.d, DTYPES[case.dtype], device="cuda")
        names = ["gram"] + ["reference"] * (case.n <= 2048)
        names += ["native", "triton"] if case.n <= 64 else [pairs_cost.TILES, pairs_cost.PANELS]
        for name in names:
            path = name.split()[0]
            with providers.forced(name):
                counted = PATHS[path].cost(work, [case.n // case.c] * case.c)
            ran = counted.schedule or path
            eager = TRUE[ran]
            replay = eager._replace(call=2e-6, launch=eager.launch / 5)
            group = "ours" if name in PATHS else "schedule"
            more = {"path": ran, "flops": counted.flops, "bytes": counted.bytes}
            for mode, constants in ((table.EAGER, eager), (table.GRAPH, replay)):
                seconds = constants.seconds(counted, work.dtype)
                seconds *= 1 + noise * draw.uniform(-1, 1)
                rows.append(make_row("crossover", case, name, group, seconds, mode=mode,
                                     launches=counted.launches, **more))  # fmt: skip
    return rows


def planned_choices(rows, kind):
    """The time of what the plan takes today over the fastest path's, for each point of the grid.

    kind: of device. The plan chooses among what was timed there; infinite where a schedule that it
    takes has no time. With each ratio a row of the point.
    """
    ratios = []
    for first, *others in targets.points(rows):
        times = {row.path: row.ms for row in (first, *others) if row.provider != targets.OURS}
        takers = tuple(path for path in PATHS if any(name.split()[0] == path for name in times))
        work = plan.Work(first.n, None, first.d, DTYPES[first.dtype], device=kind)
        path = plan.fastest(takers, work)
        chosen = PATHS[path].cost(work, [first.n // first.c] * first.c).schedule or path
        ratios.append((times.get(chosen, math.inf) / min(times.values()), first))
    return ratios


@pytest.fixture
def fitted(tmp_path, monkeypatch):
    """The constants of a module that was written from such rows, in force."""
    monkeypatch.setattr(calibrate, "TARGET", tmp_path / "calibration.py")
    monkeypatch.setattr(calibrate, "ROOT", tmp_path)
    monkeypatch.setattr(calibrate, "CONSTANTS", {})
    table.write(tmp_path / "cuda-made-up" / "crossover.csv", gpu_rows(0.1))
    assert calibrate.main([str(tmp_path / "cuda-made-up")]) == 0
    scope = {"__package__": "bstriplet_kernels"}
    exec((tmp_path / "calibration.py").read_text(), scope)
    for module in (plan, pairs_cost):
        monkeypatch.setattr(module, "CONSTANTS", scope["CONSTANTS"])
    return scope["CONSTANTS"]["cuda"]


def test_a_gpus_constants_are_found_again(fitted):
    assert set(fitted) == set(TRUE)
    for row in calibrate.usable(gpu_rows(0)):
        assert row.mode == table.EAGER
        counted = Cost(row.flops, row.bytes, row.launches, 0)
        predicted = fitted[row.path].seconds(counted, DTYPES[row.dtype])
        assert predicted == pytest.approx(1e-3 * row.ms, rel=0.1)
    for name in (pairs_cost.TILES, pairs_cost.PANELS, on_gpu.SCHEDULE):
        assert fitted[name].flop == pytest.approx(TRUE[name].flop, rel=0.15)
        assert fitted[name].half == pytest.approx(TRUE[name].half, rel=0.15)


def test_launches_have_a_constant_where_they_vary():
    true, draw, case = Constants(2e-5, 1e-13, 1e-12, 5e-6), random.Random(0), Case(64, 64, 2)
    rows = []
    for _ in range(40):
        counted = Cost(*(round(10 ** draw.uniform(a, a + 3)) for a in (7, 6, 0)), 0)
        seconds = true.seconds(counted, torch.float32) * draw.uniform(0.95, 1.05)
        rows.append(make_row("crossover", case, "gram", "ours", seconds, flops=counted.flops,
                             bytes=counted.bytes, launches=counted.launches))  # fmt: skip
    assert calibrate.fit(rows).constants[:4] == pytest.approx(true[:4], rel=0.1)
    constant = [replace(row, launches=7) for row in rows]
    assert calibrate.fit(constant).constants.launch == 0
    assert ", launch=" in calibrate.module({"cuda": (rows[0], {"gram": calibrate.fit(rows)})})
    assert "launch" not in calibrate.module({"cuda": (rows[0], {"gram": calibrate.fit(constant)})})


def test_the_plan_follows_the_constants_of_a_gpu(fitted):
    choices = planned_choices(gpu_rows(0), "cuda")
    assert len(choices) == len(suites("cuda")["crossover"].cases)
    assert max(choices, key=lambda found: found[0])[0] <= MOST  # for three classes, it assumes
    chosen = set()
    for n, d, dtype in (
        (36, 1280, torch.float32), (1000, 128, torch.float32), (8192, 1280, torch.float32),
        (1 << 17, 32, torch.bfloat16), (8192, 1280, torch.bfloat16),
    ):  # fmt: skip
        work = plan.Work(n, None, d, dtype, device="cuda")
        takers = ("reference", "triton", "gram", *(["native"] if n <= 64 else []))
        path = plan.fastest(takers, work)
        chosen.add(PATHS[path].cost(work, [n]).schedule or path)
    schedules = pairs_cost.TILES, pairs_cost.PANELS, on_gpu.SCHEDULE
    assert chosen == {"native", *schedules}


def test_too_few_rows_of_half_precision_leave_one_rate(capsys):
    rows = calibrate.usable(gpu_rows(0))
    without = calibrate.fit_paths([row for row in rows if row.dtype == "float32"])
    half = [row for row in rows if row.dtype == "bfloat16"][:5]
    capsys.readouterr()
    few = calibrate.fit_paths([row for row in rows if row.dtype == "float32"] + half)
    assert few == without
    assert all(found.constants.half is None for found in few.values())
    assert "too few: predicted as float32" in capsys.readouterr().out
    rows = [row for row in rows if row.path != on_gpu.SCHEDULE or row.dtype == "bfloat16"]
    assert on_gpu.SCHEDULE not in calibrate.fit_paths(rows)
    few = f"{on_gpu.SCHEDULE}: 0 rows in float32, too few: assumed to be slow"
    assert few in capsys.readouterr().out


@pytest.mark.parametrize(
    "folder",
    [folder for folder in table.devices() if (folder / "crossover.csv").exists()],
    ids=lambda folder: folder.name,
)
def test_no_committed_choice_is_far_from_the_fastest(monkeypatch, folder):
    """By the committed constants, on the devices that they are of and on others; all is built."""
    monkeypatch.setattr(native, "missing", lambda: None)
    rows = table.read(folder / "crossover.csv")
    choices = planned_choices(rows, folder.name.split("-")[0])
    assert len(choices) == len({(row.n, row.d, row.c, row.dtype) for row in rows})
    ratio, row = max(choices, key=lambda found: found[0])
    assert ratio <= MOST, f"{ratio:.2f} x the fastest at N = {row.n}, D = {row.d}, {row.dtype}"


def test_committed_constants_are_those_of_committed_rows():
    """`python -m bench.calibrate` on the folders that the module names writes it again."""
    text, fits = calibrate.TARGET.read_text(), {}
    for folder in table.devices():
        rows = calibrate.usable(table.read_device(folder))
        if rows and f"# {rows[0].device}, " in text:
            fits[folder.name.split("-")[0]] = (rows[0], calibrate.fit_paths(rows))
    scope = {"__package__": "bstriplet_kernels"}
    exec(calibrate.module(fits), scope)
    assert scope["CONSTANTS"].keys() == plan.CONSTANTS.keys()
    for kind, paths in plan.CONSTANTS.items():
        again = scope["CONSTANTS"][kind]
        assert again.keys() == paths.keys()
        for path, constants in paths.items():
            assert again[path][:4] == pytest.approx(constants[:4], rel=1e-2)
            assert (again[path].half or 0) == pytest.approx(constants.half or 0, rel=1e-2)


def test_a_schedule_is_forced_where_it_runs_and_where_it_is_counted(monkeypatch):
    case = Case(256, 64, 4, device="cuda")
    problem = Problem(case, torch.empty(0), torch.arange(256) % 4, 0.9)
    chosen = pairs_cost.by_panels
    monkeypatch.setattr(
        providers, "_ours", lambda impl, of: lambda *_: (impl, pairs_cost.by_panels())
    )
    for name, by_panels in ((pairs_cost.TILES, False), (pairs_cost.PANELS, True)):
        assert providers._scheduled(name, problem)(None, None) == ("triton", by_panels)
        assert pairs_cost.by_panels is chosen
        provider = providers.Provider(name, providers.SCHEDULE, partial(providers._scheduled, name))
        found = measure._counted(provider, measure._path(provider, problem), problem)
        assert found["path"] == name
        assert found["launches"] > 0
        assert pairs_cost.by_panels is chosen
