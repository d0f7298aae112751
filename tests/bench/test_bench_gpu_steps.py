"""`bench/gpu.sh` and its steps: caps, failures, log and archive, without a GPU."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_check, gpu_steps, machine, run
from bench.gpu_steps import CALLS, Command, Step, run_steps

ROOT = Path(__file__).parents[2]


def python(label, code, needs=""):
    return Command(label, (sys.executable, "-c", code), needs)


def test_what_fails_is_counted_and_the_next_step_runs(tmp_path, capsys, monkeypatch):
    steps = (
        Step("one", 1, 20, (
            python("bad", "print('half a result'); raise SystemExit(3)"),
            python("good", "open('made', 'w').write('rows')"),
            python("absent", "", needs="no-such-program"),
            Command("nowhere", ("/no/such/program",)),
        )),
        Step("two", 1, 20, (python("after", "print('still here')"),)),
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    outcomes = run_steps("first", steps, 60.0, tmp_path)
    failures = {o.label: o.failure for o in outcomes if o.failure}
    assert failures["bad"] == "exit status 3"
    assert "no/such/program" in failures["nowhere"]
    assert len(failures) == 2
    out = capsys.readouterr().out
    for line in (
        "[bad] half a result", "[absent] left out: no no-such-program here", "[after] still here",
        "   one: bad: exit status 3", "   one: absent: left out: no no-such-program here",
    ):  # fmt: skip
        assert line in out.splitlines()
    assert (tmp_path / "first.log").read_text() == out
    with tarfile.open(tmp_path / "first.tar.gz") as tar:
        assert tar.getnames() == ["first.log", "made"]


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_step_ends_at_its_cap_with_all_its_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_steps, "_GRACE_S", 0.3)
    monkeypatch.setattr(gpu_steps, "_LEAST_S", 3.0)
    monkeypatch.setattr(gpu_steps, "_ARCHIVE_S", 0.0)
    steps = (
        Step("slow", 1, 3, (python("stubborn", STUBBORN), python("quick", "print('a row')"))),
        Step("next", 1, 5, (python("next", "import time; time.sleep(2); print('its turn')"),)),
        Step("late", 1, 5, (python("late", "print('never')"),)),
    )
    begin = time.monotonic()
    outcomes = run_steps("first", steps, 8.0, tmp_path)
    assert time.monotonic() - begin < 8.0
    failures = {o.label: o.failure for o in outcomes if o.failure}
    assert failures == {"stubborn": "out of time", "late": "not begun"}
    out = capsys.readouterr().out
    assert "[quick] a row" in out
    assert "[next] its turn" in out
    assert "never" not in out
    child = next(int(line.split()[-1]) for line in out.splitlines() if "[stubborn] " in line)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_all_that_are_late_share_one_grace(tmp_path, monkeypatch):
    """A step of twelve processes would else end twelve times as late."""
    done = []

    class Watched(gpu_steps.Process):
        def ask(self):
            done.append("ask")
            super().ask()

        def result(self):
            done.append("result")
            return super().result()

    monkeypatch.setattr(gpu_steps, "Process", Watched)
    monkeypatch.setattr(gpu_steps, "_GRACE_S", 0.3)
    monkeypatch.setattr(gpu_steps, "_LEAST_S", 0.0)
    late = (python(label, "import time; time.sleep(60)") for label in "abc")
    outcomes = run_steps("first", (Step("slow", 0.1, 0.2, tuple(late)),), 60.0, tmp_path)
    assert [o.failure for o in outcomes] == ["out of time"] * 3
    assert done == ["ask"] * 3 + ["result"] * 3


def test_sanitizers_look_at_the_kernels_of_the_path():
    """A name that no kernel has would let every kernel pass unseen."""
    sources = {
        "native": "csrc/cuda/small_batch.cu",
        "triton": "bstriplet_kernels/paths/triton/*_kernels.py",
        "gram": "bstriplet_kernels/paths/moments/*kernels.py",
    }
    for impl, source in sources.items():
        before = r"__global__ [^;{]*?" if impl == "native" else r"@triton\.jit[^\n]*\ndef "
        text = "".join(path.read_text() for path in ROOT.glob(source))
        found = re.findall(before + r"\b([a-z]\w+)\(", text)
        assert set(gpu_steps.KERNELS[impl]) == set(found)
        for command in gpu_steps.Commands("python", "cuda", ROOT).sanitized(impl):
            given = [a for a in command.arguments if a.startswith("kns=")]
            assert given == [f"kns={name}" for name in gpu_steps.KERNELS[impl]]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("call", CALLS)
def test_every_command_is_one_that_its_module_takes(call, device, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "_brought", lambda *_: ())
    limit_s, steps_of = CALLS[call]
    steps = steps_of("python", device, tmp_path)
    assert sum(step.expected_s for step in steps) <= limit_s - 20
    parsed = {"bench.gpu_check": gpu_check._parse, "bench.run": run._parse}
    seen = set()
    for step in steps:
        assert step.expected_s < step.cap_s
        assert len({command.label for command in step.commands}) == len(step.commands)
        for command in step.commands:
            module, *arguments = command.arguments[command.arguments.index("-m") + 1 :]
            seen.add(module)
            if module in parsed:
                parsed[module](arguments)
    assert {"bench.gpu_check", "bench.run"} <= seen


STUB = """#!/bin/sh
test ! -e pyproject.toml && test -e csrc/rows.h && test "$BSTRIPLET_NATIVE" = cuda || exit 1
touch bstriplet_kernels/_native.abi3.so bstriplet_kernels/_native_cuda.abi3.so
"""


def test_what_was_not_brought_is_built_apart_from_pyproject(copy, monkeypatch, tmp_path):
    """And the wheels that were brought are installed; on a processor nothing is missed."""
    monkeypatch.setattr(gpu_steps, "_ROOT", copy)
    monkeypatch.setattr(gpu_steps, "_PACKAGE", copy / "bstriplet_kernels")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    assert gpu_steps._brought(str(stub), "cpu") == ()
    (step,) = gpu_steps._brought(str(stub), "cuda")
    (outcome,) = gpu_steps.run_step(step, 60.0, gpu_steps.Log((tmp_path / "log").open("w")))
    assert outcome.failure == ""
    assert gpu_steps._brought(str(stub), "cuda") == ()
    (copy / "build/wheels").mkdir(parents=True)
    (copy / "build/wheels/liger_kernel-0.8.0-py3-none-any.whl").touch()
    ((install,),) = (step.commands for step in gpu_steps._brought("python", "cpu"))
    assert install.arguments[:4] == ("python", "-m", "pip", "install")
    assert install.arguments[-2].endswith("build/brought")
    assert install.arguments[-1].endswith("liger_kernel-0.8.0-py3-none-any.whl")


MAIN = """
import sys, time
from bench import gpu_steps
from bench.gpu_steps import Command, Step
sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
steps = (Step("one", 1, 30, (Command("sleeper", (sys.executable, "-c", sleeper)),)),)
gpu_steps.CALLS = {"first": (60.0, lambda python, device, results: steps)}
sys.exit(gpu_steps.main(["first", sys.argv[1], *sys.argv[2:]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_call_that_is_ended_ends_what_it_began(tmp_path):
    call = subprocess.Popen(
        [sys.executable, "-c", MAIN, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = next(int(line.split()[-1]) for line in call.stdout if line.startswith("[sleeper]"))
    call.terminate()
    assert call.wait(10) == 128 + signal.SIGTERM
    call.stdout.close()
    end = time.monotonic() + 10
    while is_running(child) and time.monotonic() < end:  # it is orphaned, and dies by itself
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process):
    """Whether there is such a process, and it is no zombie."""
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rsplit(")", 1)[1].split()[
            0
        ] != "Z"
    except FileNotFoundError:
        return False


def test_a_call_takes_its_seconds_from_its_limit_and_counts_failures(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MAIN, tmp_path, "--limit", "6"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "== one: not begun" in done.stdout
    assert "of 6 s, 1 failed" in done.stdout


def test_a_command_that_says_much_leaves_room_for_the_others(tmp_path, capsys):
    command = python("loud", "for n in range(200): print('line', n)")
    run_steps("first", (Step("one", 1, 20, (command,)),), 60.0, tmp_path)
    out = capsys.readouterr().out
    assert "line 59" in out
    assert "line 60" not in out
    assert "[loud] goes on in the log" in out
    assert "[loud] line 199" in (tmp_path / "first.log").read_text()


def test_cases_that_a_limit_left_out_are_no_failure(tmp_path, capsys):
    code = f"raise SystemExit({run._OUT_OF_TIME})"
    (outcome,) = run_steps(
        "second", (Step("one", 1, 20, (python("suite", code),)),), 60.0, tmp_path
    )
    assert outcome.failure == ""
    out = capsys.readouterr().out
    assert "[suite] not complete" in out
    assert "   one: suite: not complete" in out


@pytest.mark.parametrize("test", [*gpu_steps.TESTS, *gpu_steps.LEFT_OUT])
def test_the_tests_that_are_named_are_there(test):
    file, _, name = test.partition("::")
    assert f"def {name}" in (ROOT / file).read_text()


@pytest.fixture
def copy(tmp_path):
    """The files that travel, without .git, with steps that tell what they get."""
    folder = tmp_path / "copy"
    for name in ("bench", "bstriplet_kernels", "csrc"):
        left_out = shutil.ignore_patterns("__pycache__", "results", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    (folder / "bench/gpu_steps.py").write_text(
        "import os, sys; print(sys.argv[1:], os.environ['PYTHONPATH'], os.environ['BENCH_COMMIT'])"
    )
    return folder


def gpu_sh(folder, **variables):
    known = {k: v for k, v in os.environ.items() if k not in ("BENCH_COMMIT", "PYTHONPATH")}
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "first", "out"],
        cwd=folder, env=known | {"PYTHON": sys.executable, "DEVICE": "cpu"} | variables,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_copy_without_git_names_what_it_runs(copy):
    said = gpu_sh(copy, PYTHONPATH="/brought")
    path = f"{copy}:{copy}/python:/brought:{copy}/build/brought"
    assert said.startswith(f"['first', 'out', '--device', 'cpu'] {path} files-")
    assert gpu_sh(copy).split()[-1] == said.split()[-1]
    (copy / "csrc/rows.h").write_text("// changed")
    assert gpu_sh(copy).split()[-1] != said.split()[-1]
    assert gpu_sh(copy, BENCH_COMMIT="e34336ac49").split()[-1] == "e34336ac49"


def test_a_checkout_names_its_commit_and_what_differs_from_it(copy):
    def git(*arguments):
        names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(
            ["git", *names, *arguments], cwd=copy, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "all")
    head = git("rev-parse", "--short=10", "HEAD")
    assert gpu_sh(copy).split()[-1] == head
    (copy / "csrc/rows.h").write_text("// changed")
    assert gpu_sh(copy).split()[-1].startswith(f"{head}+files-")


def test_the_log_names_commit_card_and_libraries(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H100, 580.1, 81559 MiB\n")
    tool.chmod(0o755)
    (tmp_path / "_native_cuda.abi3.so").write_bytes(b"library")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("BENCH_COMMIT", "e34336ac49")
    monkeypatch.setattr(gpu_steps, "_PACKAGE", tmp_path)
    when, card = gpu_steps.surroundings()
    assert when.endswith("commit e34336ac49")
    assert card == "NVIDIA H100, 580.1, 81559 MiB"
    assert gpu_steps.libraries() == ["_native_cuda.abi3.so 00299a408d"]


def test_the_ceilings_of_a_device_are_printed(monkeypatch, capsys):
    """Each precision with the setting that it is measured in; tf32 is float32 with "high"."""
    asked = []

    def limits(device, dtype, threads):
        asked.append((dtype, torch.get_float32_matmul_precision()))
        return machine.Limits(1e12 * len(asked), 1e9)

    limits.cache_clear = lambda: None
    monkeypatch.setattr(machine, "limits", limits)
    machine.main("cpu")
    _, copied, *products = capsys.readouterr().out.splitlines()
    assert float(copied.split()[1]) > 0
    assert [line.split()[2] for line in products] == ["bfloat16:", "tf32:", "float32:", "float64:"]
    assert asked[:2] == [(torch.bfloat16, "highest"), (torch.float32, "high")]
    assert asked[2:] == [(torch.float32, "highest"), (torch.float64, "highest")]


def test_rows_name_the_commit_or_there_are_none(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    with pytest.raises(RuntimeError, match="set BENCH_COMMIT"):
        machine.commit()
    monkeypatch.setenv("BENCH_COMMIT", "e34336ac49")
    assert machine.commit() == "e34336ac49"
