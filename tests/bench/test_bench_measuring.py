"""Timing in turns, counting, rows, the process that may be lost, and the runner around it."""

import gc
import itertools
import multiprocessing
import os
import re
import subprocess
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from made_up import make_row

from bench import counting, machine, measure, providers, run, steps, table, timing
from bench.cases import FORWARD, TRAINING_STEP, Case, make_problem
from bench.measure import Job, Starting
from bench.suites import DEFAULT, Part, Suite, suites
from bench.timing import Budget
from bench.worker import _SPENT, Lost, Worker
from bstriplet_kernels import bstriplet_loss

CASE = Case(16, 8, 3)
QUICK = Budget(0.002)


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch):
    """The machine's best rates are not what these tests are about."""
    monkeypatch.setattr(machine, "limits", lambda *_: machine.Limits(1e11, 1e10))


class Clock:
    """Time that passes only where a test says so."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def interleaved(clock, takes, budget, call_s=None):
    """The variants' turns in order (name, calls), and their samples; takes: seconds of a call."""
    made = []

    def turn(name):
        def calls(n):
            made.append((name, n))
            clock.now += n * takes[name]
            return [takes[name]] * n

        return calls

    turns = {name: turn(name) for name in takes}
    return made, timing.interleave(turns, call_s or takes, budget)


def test_interleaving_takes_turns_until_the_seconds_are_spent(clock):
    takes = {"slow": 0.5, "fast": 1e-3, "slower": 2.5, "slowest": 20.0}
    made, samples = interleaved(clock, takes, Budget(0.05, least=3))
    counts = {name: len(found) for name, found in samples.items()}
    assert counts == {"slow": 3, "fast": pytest.approx(50, abs=2), "slower": 1, "slowest": 0}
    assert made[0] == ("fast", 2)  # its warm-up turn
    rounds = [name for name, _ in made[1:]]
    assert set(rounds[:3]) == {"slow", "fast", "slower"}
    last_slow = max(i for i, name in enumerate(rounds) if name == "slow")
    assert rounds[:last_slow].count("fast") >= 2


def test_a_variant_ends_with_its_most_samples(clock):
    _, samples = interleaved(clock, {"fast": 1e-3}, Budget(0.05, most=10))
    assert len(samples["fast"]) == 10


def test_a_warm_up_plans_the_turns_that_follow(clock):
    """A replay is far shorter than the eager call by which it was planned."""
    budget = Budget(0.1, turn_s=25e-3)
    made, _ = interleaved(clock, {"replay": 1e-5}, budget, {"replay": 1e-4})
    assert made[0] == ("replay", 250)
    assert {n for _, n in made[1:]} == {2500}


def test_a_slow_beginning_does_not_plan_the_turns(clock):
    """The first turn of a process may take many times longer, by what is loaded then."""
    made = []

    def turn(n):
        made.append(n)
        took = 20e-3 if len(made) == 1 else 1e-4
        clock.now += took * n
        return [took]

    timing.interleave({"eager": turn}, {"eager": 30e-3}, Budget(0.1, turn_s=25e-3))
    assert made[0] == 1
    assert set(made[2:]) == {250}


def test_who_fails_in_a_turn_is_named():
    def fails(n):
        raise RuntimeError("no")

    turns = {"sound": lambda n: [1.0], "unsound": fails}
    with pytest.raises(timing.TurnError) as caught:
        timing.interleave(turns, {"sound": 1.0, "unsound": 1.0}, Budget(0.05))
    assert caught.value.name == "unsound"
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_turn_times_every_call():
    samples = timing.cpu_turn(lambda: time.sleep(0.002))(3)
    assert len(samples) == 3
    assert min(samples) >= 0.002


def test_expected_seconds_forgets_a_cold_first_call():
    waits = itertools.chain([0.15], itertools.repeat(0.0))
    assert timing.expected_seconds(lambda: time.sleep(next(waits)), "cpu") < 0.01


def test_products_and_bytes_are_counted():
    x = torch.randn(6, 5)
    with counting.Operations() as operations:
        s = x @ x.T
        (s * 2).sum()
    assert operations.flops == 2 * 6 * 6 * 5 + 36 + 36
    assert operations.bytes == 4 * ((30 + 30 + 36) + (36 + 36) + (36 + 1))


def test_moving_rows_counts_the_rows_that_move():
    x, home = torch.randn(100, 5), torch.empty(100, 5)
    chosen, panel = torch.arange(7), torch.empty(7, 5)
    with counting.Operations() as operations:
        torch.index_select(x, 0, chosen, out=panel)
        home.index_copy_(0, chosen, panel)
    assert operations.flops == 0
    assert operations.bytes == 2 * 2 * panel.nbytes


def test_peak_memory_is_the_peak_and_not_the_sum():
    def call():
        for _ in range(3):
            block = torch.ones(1 << 20)
            del block
        return torch.ones(1 << 18)

    call()
    result, memory = counting.peak_memory(call, "cpu")
    assert len(result) == 1 << 18
    assert memory.allocator == 4 << 20
    if memory.resident is not None:
        assert 3 << 20 < memory.resident < 30 << 20


def test_one_case_gives_a_row_for_each_provider():
    names = ("empty function", "naive", "pml triplet", "native", "gram", "auto", "missing one")
    known = providers.providers()
    names = tuple(name for name in names if name in known)
    told = []
    job = Job("test", CASE, names, {"naive": "over 60 s at N = 8"}, QUICK)
    rows = measure.measure(job, told.append)
    assert [row.provider for row in rows] == list(names)
    by_name = {row.provider: row for row in rows}
    assert by_name["naive"].status == "over 60 s at N = 8"
    assert not by_name["naive"].is_measured
    for name in set(names) - {"naive", "pml triplet"}:
        row = by_name[name]
        assert row.status == table.OK
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.repeats >= 3
        assert row.eq8_flops == (64 + 9 + 8 + 3 + 3) * 256 + 21 * 16
        assert row.flops is not None
        assert row.bytes is not None
    assert by_name["gram"].gradient_error < 1e-5
    assert by_name["gram"].active_share == 1
    assert by_name["auto"].path in known
    assert all(isinstance(message, Starting) for message in told)
    assert {m.provider for m in told} >= {"gram", "auto", ""}


def test_what_is_wrong_or_broken_gets_no_time(monkeypatch):
    def wrong(problem):
        right = known["naive"].make(problem)
        return lambda x, y: (right(x, y)[0], 1.01 * right(x, y)[1])

    def broken(problem):
        raise RuntimeError("no such thing\nand a second line")

    def hungry(problem):
        return lambda x, y: torch.empty(1 << 60)

    known = dict(providers.providers())
    for name, make in (("wrong", wrong), ("broken", broken), ("hungry", hungry)):
        known[name] = providers.Provider(name, providers.PEER, make)
    monkeypatch.setattr(measure, "providers", lambda: known)
    names = ("wrong", "broken", "hungry", "naive")
    rows = measure.measure(Job("test", CASE, names, {}, QUICK), lambda _: None)
    assert rows[0].status.startswith("wrong: gradient is off by")
    assert rows[1].status == "RuntimeError: no such thing"
    assert rows[2].status == "out of memory"
    assert [row.is_measured for row in rows] == [False, False, False, True]

    monkeypatch.setattr(measure, "unreturned_memory", lambda: 17 << 30)
    told = []
    with pytest.raises(measure.SpentProcess):
        measure.measure(Job("test", CASE, names, {}, QUICK), told.append)
    assert told[-1].provider == "hungry"
    assert not measure._is_spent("cuda")


@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
def test_a_worker_leaves_nothing_behind():
    worker = Worker("cpu")
    folder = worker._log.parent
    assert folder.is_dir()
    del worker
    gc.collect()
    assert not folder.exists()


def test_a_call_has_the_time_that_the_budget_gives():
    told = []
    measure.measure(Job("test", CASE, ("naive",), {}, replace(QUICK, limit_s=123.0)), told.append)
    assert {message.limit_s for message in told if message.provider == "naive"} == {123.0}


def test_what_starts_the_profiler_is_not_the_calls_time(monkeypatch):
    def slow_to_start(call, device):
        time.sleep(0.6)
        return measure_memory(call, device)

    measure_memory = measure.peak_memory
    monkeypatch.setattr(measure, "peak_memory", slow_to_start)
    budget = Budget(0.01, least=1)
    (row,) = measure.measure(Job("test", CASE, ("empty function",), {}, budget), lambda _: None)
    assert row.repeats > 1


def test_results_do_not_make_the_code_another(tmp_path, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name in ("bench/results/rows.csv", "bench/run.py", "csrc/a.cpp", "bstriplet_kernels/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "bench/results/rows.csv").write_text("new")
    assert re.fullmatch("[0-9a-f]{10}", machine.commit())
    (tmp_path / "bench/run.py").write_text("new")
    assert re.fullmatch(r"[0-9a-f]{10}\+", machine.commit())


def test_half_the_rows_are_the_first_half():
    problem = make_problem(Case(40, 8, 3))
    loss, gradient = providers.providers()[providers.HALF].make(problem)(problem.x, problem.labels)
    x, labels = problem.x.detach()[:20].requires_grad_(), problem.labels[:20]
    expected = bstriplet_loss(x, labels, margin=problem.margin)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])


def test_a_training_step_with_and_without_the_loss():
    pytest.importorskip("timm")
    case = Case(2, 1024, 2, operation=TRAINING_STEP, backbone="mobilenetv3_small_100")
    job = Job("test", case, tuple(steps.providers()), {}, Budget(0.0, least=1, most=1))
    rows = measure.measure(job, lambda _: None)
    assert [row.status for row in rows] == [table.OK] * 3
    assert all(row.flops > 1e7 and row.peak_bytes > 1e6 for row in rows)
    wrong = job._replace(case=replace(case, d=99), names=("CE",))
    assert "not 99" in measure.measure(wrong, lambda _: None)[0].status
    unknown = job._replace(case=replace(case, backbone="no_such_net"), names=("CE",))
    assert "no_such_net" in measure.measure(unknown, lambda _: None)[0].status


def _hangs(connection, log, device):
    connection.recv()
    connection.send(Starting("sleeper", 0.2))
    time.sleep(60)


def _crashes(connection, log, device):
    connection.recv()
    connection.send(Starting("crasher", 30.0))
    with open(log, "w") as stream:
        stream.write("first\nlast words\n")
    os._exit(3)


def _is_spent(connection, log, device):
    connection.recv()
    connection.send(Starting("hoarder", 30.0))
    os._exit(_SPENT)


def test_a_process_that_hangs_or_dies_is_reported_and_replaced(monkeypatch):
    forked = multiprocessing.get_context("forkserver")  # from one that has imported torch
    forked.set_forkserver_preload(["torch", "bench.worker"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forked)
    job = Job("test", CASE, ("x",), {}, QUICK)
    for target, lost in (
        (_is_spent, Lost("hoarder", "out of memory")),
        (_hangs, Lost("sleeper", "over 0.2 s")),
        (_crashes, Lost("crasher", "crashed with exit status 3: last words")),
    ):
        worker = Worker("cpu", target)
        assert worker.run(job) == lost
        assert worker._process is None  # the next job starts another


def test_the_framework_from_case_to_file_in_its_own_process(tmp_path, capsys):
    """Real process, real measurements, and one provider that really runs out of memory."""
    groups = (providers.FLOOR, providers.BASELINE, providers.OURS)
    big = Case(1 << 18, 2, 2, operation=FORWARD)
    part = Part((CASE, big, replace(big, n=1 << 19)), groups)
    suite = Suite("tiny", "a test", (part,), QUICK)
    worker = Worker("cpu")
    try:
        rows, _ = run.run_suite(suite, worker)
    finally:
        worker.stop()
    path = tmp_path / "cpu-test" / "tiny.csv"
    table.write(path, rows)
    assert [r.status for r in rows if r.n == 16 and r.group != "ours"] == [table.OK] * 6
    naive = [row.status for row in rows if row.provider == "naive"]
    assert naive == [table.OK, "out of memory", f"out of memory at N = {1 << 18}"]
    gram = [row for row in rows if row.provider == "gram"]
    assert [row.is_measured for row in gram] == [True] * 3
    assert gram[2].resident_bytes is None or gram[2].resident_bytes < 200 << 20
    written = table.read_device(path.parent)
    assert [row.provider for row in written] == [row.provider for row in rows]
    assert written[0].p50_ms == pytest.approx(rows[0].p50_ms, rel=1e-5)
    assert "naive [out of memory]" in capsys.readouterr().out


def test_a_lost_provider_gets_a_row_and_the_others_are_measured_again():
    class FakeWorker:
        def run(self, job):
            if "naive" not in job.skip:
                return Lost("naive", "over 60 s")
            return [make_row("test", CASE, name, "x", 1, status=job.skip.get(name, "ok"))
                    for name in job.names]  # fmt: skip

    known = providers.providers()
    job = Job("test", CASE, ("naive", "auto"), {}, QUICK)
    rows = run._run_job(job, known, FakeWorker())
    assert [(r.provider, r.status) for r in rows] == [("naive", "over 60 s"), ("auto", "ok")]


def test_a_problem_that_cannot_be_made_is_a_row_for_each():
    class FakeWorker:
        def run(self, job):
            return Lost("", "out of memory")

    job = Job("test", CASE, ("naive", "auto"), {}, QUICK)
    rows = run._run_job(job, providers.providers(), FakeWorker())
    assert {(r.provider, r.status) for r in rows} == {
        ("naive", "out of memory"), ("auto", "out of memory")
    }  # fmt: skip


def test_a_part_runs_the_groups_and_names_that_it_wants():
    case, other = CASE, replace(CASE, n=18)
    suite = Suite("s", "a test", (Part((case,), ("floor",)), Part((other,), ("gram",))))
    asked = []

    class FakeWorker:
        def run(self, job):
            asked.append(job.names)
            return [make_row("s", job.case, name, "x", 1) for name in job.names]

    run.run_suite(suite, FakeWorker())
    assert asked == [
        ("empty function", "products of pairs", "products of moments", "moves of rows"), ("gram",)
    ]  # fmt: skip
    assert suite.cases == (case, other)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.csv"
    first = [make_row("s", CASE, "naive", "baseline", 1e-3, flops=None)]
    table.write(path, first)
    assert table.read(path)[0].flops is None

    def interrupted():
        yield first[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.write(path, interrupted())
    assert len(table.read(path)) == 1
    assert not list(tmp_path.glob("*.part"))
    table.write(path, first * 2)
    assert len(table.read(path)) == 2


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "Intel Xeon Platinum 8481C"),
        ("Intel(R) Xeon(R) Processor", "Intel Xeon"),
        ("AMD EPYC", "AMD EPYC"),
        ("AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763"),
    ],
)
def test_a_processor_is_named_without_marks(given, plain):
    assert machine.plain_name(given) == plain


def test_processors_of_one_name_are_told_apart_by_their_instructions(monkeypatch):
    monkeypatch.setattr(machine, "_processor", lambda: "AMD EPYC")
    slugs = set()
    for instructions in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda i=instructions: i)
        slugs.add(machine.device_slug("cpu").partition("-cores")[0][:-2])
    assert slugs == {"cpu-amd-epyc-avx2", "cpu-amd-epyc-avx512"}


def test_devices_are_never_mixed(tmp_path):
    row = make_row("s", CASE, "naive", "baseline", 1e-3)
    table.write(tmp_path / "a.csv", [row])
    table.write(tmp_path / "b.csv", [replace(row, device="another")])
    with pytest.raises(ValueError, match="mixes devices: another, test machine"):
        table.read_device(tmp_path)
    (tmp_path / "b.csv").write_text("provider,ms\nnaive,1\n")
    with pytest.raises(ValueError, match=r"b\.csv is not a result of this version"):
        table.read_device(tmp_path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_are_sound(device):
    known = suites(device)
    assert set(DEFAULT) <= set(known) | {"threads"}
    assert len(known["crossover"].cases) == (60 if device == "cpu" else 38)
    for suite in known.values():
        assert len(set(suite.cases)) == len(suite.cases)
        assert all(case.device == device for case in suite.cases)
        assert all(case.n >= 2 and 1 <= case.c <= max(2, case.n // 2) for case in suite.cases)


def test_unknown_suites_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["swep", "--device", "cpu"])
    assert "unknown suite 'swep'; known are" in capsys.readouterr().err


def test_the_gpu_way_runs_every_line_with_a_pretended_gpu(monkeypatch):
    """Rotation, eager turns and graph replay, on tensors that are in truth on the CPU."""

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        replays = 0

        def replay(self):
            Graph.replays += 1

    @contextmanager
    def context(_):
        yield

    for name, fake in {
        "synchronize": lambda *_: None, "reset_peak_memory_stats": lambda *_: None,
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 1 << 20,
        "Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "graph": context,
        "stream": context, "get_device_name": lambda *_: "pretended",
        "set_sync_debug_mode": lambda *_: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(machine, "second_level_cache", lambda _: 5000)
    make = measure.make_problem
    monkeypatch.setattr(
        measure, "make_problem",
        lambda case: make(replace(case, device="cpu"))._replace(case=case),
    )  # fmt: skip
    case = replace(CASE, device="cuda")
    rows = measure.measure(Job("test", case, ("naive", "auto"), {}, QUICK), lambda _: None)
    assert [(r.provider, r.mode, r.status) for r in rows] == [
        (name, mode, table.OK) for name in ("naive", "auto") for mode in (table.EAGER, table.GRAPH)
    ]
    assert all(row.peak_bytes == 1 << 20 and row.resident_bytes is None for row in rows)
    assert Graph.replays > 0
    problem = make(CASE)._replace(case=case)  # of 512 bytes
    monkeypatch.setattr(machine, "second_level_cache", lambda _: 1024)
    assert len(measure._rotated(problem)) * 512 > 2 * 1024
    monkeypatch.setattr(machine, "second_level_cache", lambda _: 1 << 20)
    assert len(measure._rotated(problem)) == 16


def test_a_step_that_cannot_be_captured_says_so(monkeypatch):
    def no_graph(_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def turn(candidate, problem, buffers, mode):
        return no_graph(candidate) if mode == table.GRAPH else timing.cpu_turn(lambda: None)

    monkeypatch.setattr(measure, "_turn", turn)
    monkeypatch.setattr(measure, "_rotated", lambda problem: [])
    monkeypatch.setattr(measure, "_is_usable", lambda device: True)
    make = measure.make_problem
    job = Job("test", CASE, ("naive",), {}, QUICK)
    problem = make(CASE)._replace(case=replace(CASE, device="cuda"))
    row = make_row("test", CASE, "naive", "baseline", 1e-3, p50_ms=None)
    provider = providers.providers()["naive"]
    candidate = measure._Candidate(provider, row, provider.make(make(CASE)), 1e-3)
    measure._time([candidate], problem, job, lambda _: None)
    eager, graph = measure._rows(candidate)
    assert eager.is_measured
    assert graph.status == "RuntimeError: operation not permitted when stream is capturing"
    assert graph.p50_ms is None
