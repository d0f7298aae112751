"""Suites end in time, on an assumed H100; what was measured is kept, whatever ends a run."""

import re
from dataclasses import replace

import pytest
import simulated_gpu
from made_up import make_row

from bench import forecast, run, table, targets, timing, worker
from bench.cases import Case
from bench.forecast import TimeLimit
from bench.measure import Job, LostProcess, Starting
from bench.suites import Part, Suite, suites
from bench.table import EAGER, GRAPH, OK
from bench.timing import Budget
from bench.worker import Lost, Worker

SMALL = Case(36, 1280, 3, device="cuda")
PARTS = (
    Part((SMALL,), ("naive", "eager", "native", "compiled naive")),
    Part((replace(SMALL, n=1024), replace(SMALL, n=4096)), ("naive", "auto")),
)
SUITE = Suite("tiny", "a test", PARTS, Budget(0.05, turn_s=25e-3))


@pytest.fixture
def gpu(monkeypatch):
    return simulated_gpu.install(monkeypatch)


@pytest.fixture
def a_worker(gpu):
    return simulated_gpu.SimulatedWorker(gpu)


@pytest.fixture
def command(gpu, monkeypatch, tmp_path):
    """Runs `bench.run` on the tiny suite; gives exit status and the folder of results."""
    monkeypatch.setattr(run, "Worker", lambda device: simulated_gpu.SimulatedWorker(gpu))
    monkeypatch.setattr(run, "suites", lambda *_: {"tiny": SUITE})

    def call(*options):
        status = run.main(["tiny", "--device", "cuda", "--results", str(tmp_path), *options])
        return status, tmp_path / "cuda-simulated-h100"

    return call


@pytest.mark.parametrize("name", ["targets", "paper", "crossover", "sweep"])
def test_a_suite_ends_within_two_minutes_on_a_gpu(name, gpu, a_worker):
    """With 512 calls in a turn and samples counted by turn it was 469 s (sweep) to 924."""
    suite = suites("cuda")[name]
    rows, left_out = run.run_suite(suite, a_worker, limit=TimeLimit(110))
    assert not left_out
    assert gpu.now < 110
    assert gpu.now == pytest.approx(forecast.run_seconds(run.jobs(suite)), rel=0.5)
    ours = [row for row in rows if row.provider == "auto"]
    assert len(ours) == 2 * len(suite.cases)
    assert all(row.is_measured and row.repeats >= 3 for row in ours)
    if name == "targets":
        measured = [v for v in targets.verdicts(rows) if v.figure is not None]
        assert len(measured) == 7  # the others are of an H200, and of the grid


def test_turns_of_a_gpu_are_long_beside_their_synchronisations(gpu, a_worker, monkeypatch):
    seconds = {EAGER: [], GRAPH: []}

    def watched(make, mode):
        def turn_of(calls):
            turn = make(calls)

            def timed(n):
                start = gpu.now
                samples = turn(n)
                if n > 1:
                    seconds[mode].append(gpu.now - start)
                return samples

            return timed

        return turn_of

    monkeypatch.setattr(timing, "cuda_turn", watched(timing.cuda_turn, EAGER))
    monkeypatch.setattr(timing, "graph_turn", watched(timing.graph_turn, GRAPH))
    run.run_suite(suites("cuda")["crossover"], a_worker)
    for of_mode in seconds.values():
        after_warm_up = sorted(of_mode)[len(of_mode) // 3 :]
        assert len(after_warm_up) > 150
        assert after_warm_up[0] > 20e-3
        assert after_warm_up[-1] < 50e-3


def test_what_compiles_comes_last_and_with_all_that_it_is_compared_with(gpu, a_worker):
    kept = []
    rows, _ = run.run_suite(SUITE, a_worker, kept.append)
    assert [(job.case.n, "compiled naive" in job.names) for job in run.jobs(SUITE)] == [
        (36, False), (1024, False), (4096, False), (36, True)
    ]  # fmt: skip
    assert [len(rows) for rows in kept] == [6, 10, 14, 16]
    assert [row.n for row in rows] == sorted(row.n for row in rows)
    assert len({(row.n, row.provider, row.mode) for row in rows}) == len(rows) == 16
    before = [row for row in kept[2] if row.n == SMALL.n]
    assert not any(row is other for row in before for other in rows)  # measured again, all of them


def test_a_case_that_cannot_be_measured_again_keeps_its_rows(gpu):
    class FakeWorker:
        def run(self, job):
            if "compiled naive" in job.names:
                return Lost("", "out of memory")
            return [make_row("tiny", job.case, name, "x", 1) for name in job.names]

    rows, _ = run.run_suite(SUITE, FakeWorker())
    found = {row.provider: row.status for row in rows if row.n == SMALL.n}
    assert found == {"naive": OK, "eager": OK, "native": OK, "compiled naive": "out of memory"}


def test_no_case_begins_that_would_not_end(gpu, command, capsys):
    status, folder = command("--limit", "30")
    assert status == 124
    assert gpu.now < 30
    assert [path.name for path in folder.iterdir()] == ["tiny.partial.csv"]
    assert "out of time, not complete: tiny" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="not complete: tiny"):
        rows = table.read_device(folder)
    assert {row.n for row in rows} == {36, 1024, 4096}
    assert "compiled naive" not in {row.provider for row in rows}
    first = rows[-1]

    processes = gpu.processes
    assert command("--limit", "100", "--missing") == (0, folder)
    assert gpu.processes == processes + 1
    assert [path.name for path in folder.iterdir()] == ["tiny.csv"]
    whole = table.read_device(folder)
    assert whole[-1] == first  # was not measured again
    assert "compiled naive" in {row.provider for row in whole}
    assert command("--missing")[0] == 0
    assert gpu.processes == processes + 1


def test_the_limit_is_told_in_seconds(gpu):
    limit = TimeLimit(100)
    (job, *_) = run.jobs(SUITE)
    first = limit.predict(job)
    limit.learn(job, 2 * first)
    assert limit.predict(job) == pytest.approx(2 * (first - 10))
    gpu.advance(60, "other work")
    assert limit.left() == pytest.approx(40)


@pytest.mark.parametrize("finished", [0, 1, 2, 3])
def test_finished_cases_survive_an_interruption(finished, gpu, command, monkeypatch, capsys):
    measured = []
    real = simulated_gpu.SimulatedWorker.run

    def interrupted(worker, job):
        if len(measured) == finished:
            raise KeyboardInterrupt
        measured.append(job)
        return real(worker, job)

    monkeypatch.setattr(simulated_gpu.SimulatedWorker, "run", interrupted)
    status, folder = command()
    assert status == 130
    assert "--missing goes on" in capsys.readouterr().out
    if finished:
        rows = table.read(table.partial(folder / "tiny.csv"))
        assert len(rows) == (6, 10, 14)[finished - 1]
    finished = 9
    assert command("--missing")[0] == 0
    assert len(measured) == 4  # each once
    assert len(table.read(folder / "tiny.csv")) == 16


@pytest.mark.parametrize(
    "change", [{"commit": "another"}, {"versions": "older"}, {"device": "another"}, "columns"]
)
def test_cases_of_other_code_are_measured_again(change, gpu, command, capsys):
    _, folder = command("--limit", "20")
    draft = folder / "tiny.partial.csv"
    if change == "columns":
        draft.write_text("provider,ms\nnaive,1\n")
    else:
        table.write(draft, [replace(row, **change) for row in table.read(draft)])
    assert command("--missing")[0] == 0
    assert "begun again" in capsys.readouterr().out
    rows = table.read_device(folder)
    assert len(rows) == 16
    assert len({(row.commit, row.versions, row.device) for row in rows}) == 1


def test_rows_of_another_number_of_threads_are_no_case_of_the_suite(gpu, command):
    _, folder = command("--limit", "20")
    draft = folder / "tiny.partial.csv"
    table.write(draft, [replace(row, threads=99) for row in table.read(draft)])
    assert command("--missing")[0] == 0
    assert {row.threads for row in table.read_device(folder)} == {SMALL.threads}


def test_code_that_no_commit_names_may_be_other_code(gpu, command, monkeypatch, capsys):
    monkeypatch.setattr(run.machine, "commit", lambda: "0123456789+")
    command("--limit", "20")
    assert command("--missing")[0] == 0
    assert "begun again" in capsys.readouterr().out


def test_an_illegal_access_ends_one_provider_and_not_the_others(gpu, a_worker):
    gpu.breaking = {"naive"}
    rows, _ = run.run_suite(SUITE, a_worker)
    status = {(row.provider, row.mode): row.status for row in rows if row.n == SMALL.n}
    assert status.pop(("naive", EAGER)) == (
        "AcceleratorError: CUDA error: an illegal memory access was encountered"
    )
    assert set(status.values()) == {OK}
    assert len(status) == 6
    assert all(row.is_measured for row in rows if row.provider == "auto")
    assert gpu.processes == 5  # one more after each of the four jobs


def test_a_case_prints_both_times_or_why_there_is_none(gpu, a_worker, capsys):
    gpu.breaking, gpu.breaking_capture = {"naive"}, {"eager"}
    run.run_suite(SUITE, a_worker)
    out = capsys.readouterr().out
    assert re.search(r"auto [\d.e-]+ ms \(replay [\d.e-]+ ms\)", out)
    assert re.search(r"eager [\d.e-]+ ms \(replay AcceleratorError: CUDA error: op", out)
    assert "naive [AcceleratorError: CUDA error: an illegal" in out


def test_a_capture_that_breaks_leaves_the_eager_time_and_the_others(gpu, a_worker):
    gpu.breaking_capture = {"eager"}
    rows, _ = run.run_suite(SUITE, a_worker)
    status = {(row.provider, row.mode): row.status for row in rows if row.n == SMALL.n}
    assert status.pop(("eager", GRAPH)) == (
        "AcceleratorError: CUDA error: operation failed during capture"
    )
    assert set(status.values()) == {OK}
    assert len(status) == 7
    assert gpu.processes == 3


def test_a_replay_that_breaks_ends_one_provider_of_one_mode(gpu, a_worker, monkeypatch):
    real = timing.interleave

    def breaks(turns, *rest):
        if not breaks.done and any("graph_turn" in turn.__qualname__ for turn in turns.values()):
            breaks.done = True
            raise timing.TurnError("naive") from RuntimeError("Triton Error [CUDA]: misaligned")
        return real(turns, *rest)

    breaks.done = False
    monkeypatch.setattr(timing, "interleave", breaks)
    suite = replace(SUITE, parts=PARTS[1:])
    rows, _ = run.run_suite(suite, a_worker)
    failed = [(row.n, row.provider, row.mode, row.status) for row in rows if row.status != OK]
    assert failed == [(1024, "naive", GRAPH, "RuntimeError: Triton Error [CUDA]: misaligned")]


def test_a_step_that_synchronises_is_never_captured(gpu, a_worker):
    """It would take the process with it, and with that the others' time."""
    suite = replace(SUITE, parts=(Part((SMALL,), ("pml SupCon", "auto")),))
    rows, _ = run.run_suite(suite, a_worker)
    by_mode = {row.mode: row for row in rows if row.provider == "pml SupCon"}
    assert by_mode[EAGER].is_measured
    assert by_mode[GRAPH].status == "RuntimeError: called a synchronizing CUDA operation"
    assert gpu.processes == 1


def _loses_its_gpu(connection, log, device):
    def measured(job, tell):
        tell(Starting("breaker", 30.0))
        raise LostProcess("breaker", "CUDA error: misaligned address", GRAPH)

    worker.measure = measured
    worker._serve(connection, log, device)


def test_a_process_that_lost_its_gpu_says_who_did_it_and_is_replaced():
    process = Worker("cuda", _loses_its_gpu)
    job = Job("tiny", Case(16, 8, 3), ("breaker",), {}, Budget())
    expected = Lost("breaker", "CUDA error: misaligned address", GRAPH)
    assert process.run(job) == expected
    assert process._process is None


def test_the_draft_of_a_killed_write_is_no_result(tmp_path):
    path = table.partial(tmp_path / "tiny.csv")
    table.write(path, [make_row("tiny", SMALL, "naive", "baseline", 1e-3)])
    path.with_suffix(".part").write_text("suite,provi")
    with pytest.warns(UserWarning, match="not complete: tiny"):
        assert len(table.read_device(tmp_path)) == 1
