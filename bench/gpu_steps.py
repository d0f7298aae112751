"""The steps of `bench/gpu.sh first` and `second`: each in processes of its own, within its time.

Steps are in order of priority. This imports neither torch nor this package: it must run where they
do not.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = _ROOT / "bstriplet_kernels"
_GRACE_S = 3.0  # between being asked to end and being killed
_LAST_LINES_S = 0.5  # for what a process that ended has yet to say
_ARCHIVE_S = 1.0 + _GRACE_S  # kept for what comes after the last step's cap
_LEAST_S = 5.0  # a step for which less is left is not begun
_SHOWN_LINES = 60  # of one command on the screen, of which only a short tail may be seen
_MOST_FAILURES = 100  # an exit status has eight bits
DTYPES = ("float32", "float64", "float16", "bfloat16")
_SANITIZER = "compute-sanitizer --error-exitcode 1 --report-api-errors no"  # torch probes the API
KERNELS = {
    "native": ("batch_similarity_kernel",),
    "triton": (
        "batch_products", "loss_and_gradient", "prepare_rows", "tile_sums", "half_tile_sums",
        "finish_rows", "reduce_losses", "weigh_rows", "tile_gradient", "tile_weights",
        "weighted_rows", "normalise_gradient",
    ),
    "gram": (
        "split_rows", "class_moments", "add_totals", "moment_matrices", "gradient_matrices",
        "band_sums", "band_gradient", "row_means", "row_gradients", "find_classes", "class_sums",
        "add_class_parts", "add_class_totals", "linear_means", "linear_gradients",
    ),
}  # fmt: skip
"""What a sanitizer looks at: a path's own kernels, by a part of their names."""
_UNCACHED = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")  # each tensor then ends at its last byte
_FEW_THREADS = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
"""For commands side by side; a suite of timings runs alone, with all threads."""
INCOMPLETE = 124  # what bench.run returns where its limit left cases out
BACKBONES = ("mobilenetv3_small_100", "efficientnet_b1", "shufflenet_v2", "peleenet")
_TIMED = ("targets", "crossover", "paper", "sweep")  # by the second call
TESTS = (
    "tests/kernels/test_triton.py",
    "tests/kernels/test_moments_on_gpu.py",
    "tests/kernels/test_class_sums_on_gpu.py",
    "tests/kernels/test_native.py",
    "tests/kernels/test_metric_learning.py",
)
LEFT_OUT = ("tests/kernels/test_triton.py::test_in_the_interpreter",)


# Apart from pyproject.toml, which an old setuptools cannot read.
_BUILD = """
cd "$1" && mkdir -p build/apart/bstriplet_kernels && cp -r csrc setup.py build/apart &&
cd build/apart && BSTRIPLET_NATIVE=cuda "$0" setup.py -q build_ext --inplace &&
cp bstriplet_kernels/_native* "$1/bstriplet_kernels"
"""


class Command(NamedTuple):
    """What one process runs: its label in the log, its arguments, the program that it needs."""

    label: str
    arguments: tuple[str, ...]
    needs: str = ""


class Step(NamedTuple):
    """Commands that run side by side, the seconds that they should take, and the most they may."""

    name: str
    expected_s: float
    cap_s: float
    commands: tuple[Command, ...]


class Outcome(NamedTuple):
    """How a command ended. failure: "" where there was none. remark: what else to tell."""

    step: str
    label: str
    failure: str
    seconds: float
    remark: str = ""


def first(python: str, device: str, results: Path) -> tuple[Step, ...]:
    """The first call: the cluster kernel, then Triton and the moments, then eight cases of each."""
    make = Commands(python, device, results)
    rest = ("bits", "waits", "capture", "launches", "device") if device == "cuda" else ("bits",)
    moments = ("moments",) if device == "cuda" else ()
    native = (
        *make.exact("native"),
        make.check("native", *rest),
        make.module("bstriplet_kernels", label="doctor"),
    )
    others = (
        *make.exact("triton"),
        make.check("triton", *rest),
        *make.exact("gram"),
        make.check("gram", *rest, *moments),
        *make.sanitized("native"),
    )
    return (
        *_brought(python, device),
        Step("the card", 12, 60, (make.module("bench.machine", device, label="ceilings"),)),
        Step("native is right", 15, 45, native),
        Step("native is fast", 15, 35, (make.run(25, "small"),)),
        Step("Triton and moments are right", 45, 90, others),
        Step("eight cases", 75, 95, (make.run(85, "first"),)),
    )


def second(python: str, device: str, results: Path) -> tuple[Step, ...]:
    """The second call: every check, then the suites of timings."""
    make = Commands(python, device, results)
    impls = ("native", "triton", "gram")
    mended = (
        *(one for impl in impls for one in make.exact(impl, DTYPES[::3])),
        *(make.check(impl, "compile") for impl in impls),
        *(tool for impl in impls for tool in make.sanitized(impl)),
        *make.sanitized("triton", "bfloat16"),
        *(make.compiled(suite) for suite in _TIMED),
    )
    loops = (Step("training loops", 35, 50, (make.loops(),)),) if device == "cuda" else ()
    return (
        *_brought(python, device),
        Step("what was mended is right", 60, 75, mended),
        Step("targets", 70, 95, (make.run(90, "targets"),)),
        Step("crossover", 65, 95, (make.run(90, "crossover"),)),
        Step("what is missing", 60, 85, (make.run(80, "--missing", "targets", "paper", "sweep"),)),
        Step("tests", 35, 60, (make.tests(),)),
        *loops,
    )


CALLS: dict[str, tuple[float, Callable[[str, str, Path], tuple[Step, ...]]]] = {
    "first": (260.0, first),
    "second": (400.0, second),
}
"""The seconds of each call in all, and its steps."""


@dataclass(frozen=True)
class Commands:
    """The commands of both calls, for one interpreter, device and folder of results."""

    python: str
    device: str
    results: Path

    def module(self, name: str, *arguments: str, label: str = "") -> Command:
        """Runs a module."""
        return Command(label or name.split(".")[-1], (self.python, "-m", name, *arguments))

    def check(self, impl: str, *names: str, dtype: str = "", similarity: str = "") -> Command:
        """Some checks of a path, by default in all dtypes and similarities."""
        options = ["--device", self.device, "--impl", impl]
        options += ["--dtype", dtype] if dtype else []
        options += ["--similarity", similarity] if similarity else []
        options += ["--quick"] if self.device == "cpu" else []
        label = " ".join(filter(None, (impl, dtype or "checks", similarity)))
        return self.module("bench.gpu_check", *options, "--check", *names, label=label)

    def exact(self, impl: str, dtypes: Sequence[str] = DTYPES) -> tuple[Command, ...]:
        """A check in each dtype; for moments also in each similarity, which has its own kernels."""
        similarities = ("square", "linear") if impl == "gram" else ("",)
        return tuple(
            self.check(impl, "exact", dtype=dtype, similarity=similarity)
            for dtype, similarity in itertools.product(dtypes, similarities)
        )

    def sanitized(self, impl: str, dtype: str = "float32") -> tuple[Command, ...]:
        """Looks for races and stray accesses in one path's kernels; on a GPU."""
        if self.device != "cuda":
            return ()
        check = self.check(impl, "exact", dtype=dtype).arguments
        of_path = tuple(o for name in KERNELS[impl] for o in ("--kernel-name", f"kns={name}"))
        sanitizer = (*_SANITIZER.split(), *of_path, "--tool")
        label = impl if dtype == "float32" else f"{impl} {dtype}"
        return tuple(
            Command(
                f"{label} {tool}",
                (*prefix, *sanitizer, tool, *check, "--quick"),
                "compute-sanitizer",
            )
            for tool, prefix in (("racecheck", ()), ("memcheck", _UNCACHED))
        )

    def run(self, limit: int, *suites: str) -> Command:
        """Measures suites, in so many seconds."""
        options = ("--device", self.device, "--results", str(self.results), "--limit", str(limit))
        return self.module("bench.run", *options, *suites, label=suites[-1])

    def compiled(self, suite: str) -> Command:
        """Runs a suite to compile its kernels; the results are thrown away."""
        folder = str(_ROOT / "build/compiled")
        options = ("--device", self.device, "--results", folder, "--seconds", "0.001")
        return self.module("bench.run", *options, "--limit", "65", suite, label=f"{suite} compiled")

    def loops(self) -> Command:
        """Images a second of a training step of each backbone."""
        folder = str(self.results.parent / "training_loop")
        options = ("--steps", "10", "--rounds", "3", "--results", folder)
        return self.module("studies.training_loop", "--backbone", *BACKBONES, *options)

    def tests(self) -> Command:
        """Tests of the GPU's kernels, without one whose interpreter needs an older numpy."""
        left_out = (option for name in LEFT_OUT for option in ("--deselect", name))
        return self.module("pytest", "-q", "-n", "8", *TESTS, *left_out, label="tests")


def _brought(python: str, device: str) -> tuple[Step, ...]:
    """Installs the wheels that were brought, then builds the libraries that were not."""
    steps = []
    if wheels := sorted(map(str, (_ROOT / "build/wheels").glob("*.whl"))):
        options = ("-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target")
        target = str(_ROOT / "build/brought")
        install = (python, "-m", "pip", "install", *options, target, *wheels)
        steps.append(Step("wheels", 10, 60, (Command("wheels", install),)))
    libraries = [list(_PACKAGE.glob(f"{name}.*so")) for name in ("_native", "_native_cuda")]
    if device == "cuda" and not all(libraries):
        build = ("bash", "-c", _BUILD, python, str(_ROOT))
        steps.append(Step("libraries", 60, 120, (Command("build", build),)))
    return tuple(steps)


class Log:
    """What is printed, here and in a file, line by line."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._lock = file, threading.Lock()
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Since the call began."""
        return time.monotonic() - self._start

    def say(self, text: str, is_shown: bool = True) -> None:
        """Write a line at once; only to the file where it is not shown."""
        with self._lock:
            for stream in (sys.stdout, self._file) if is_shown else (self._file,):
                stream.write(f"{text}\n")
                stream.flush()


class Process:
    """A command at work: its lines go to the log as they come."""

    def __init__(self, command: Command, log: Log, is_alone: bool) -> None:
        self.label, self._log = command.label, log
        self._begin, self._ended = time.monotonic(), 0.0
        self._process = subprocess.Popen(
            command.arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that its own processes end with it
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | ({} if is_alone else _FEW_THREADS),
        )
        self._reader = threading.Thread(target=self._relay, daemon=True)
        self._reader.start()

    def ends(self, until: float) -> bool:
        """Whether it has ended by then."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, until - time.monotonic()))
        return self._process.returncode is not None

    def ask(self) -> None:
        """Ask the process and its own to end, as Ctrl-C does: what is complete is kept."""
        if self._process.poll() is None:
            self._signal(signal.SIGINT)

    def result(self) -> tuple[int | None, float]:
        """Its exit status, None where it had none yet, and its seconds; the rest is killed."""
        code = self._process.returncode
        self.kill()
        self._reader.join(_LAST_LINES_S)
        return code, (self._ended or time.monotonic()) - self._begin

    def kill(self) -> None:
        """Kill what is left. Not waited for: a driver may hold a process that hung a GPU."""
        self._signal(signal.SIGKILL)
        self._process.poll()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _relay(self) -> None:
        assert self._process.stdout is not None
        for n, line in enumerate(self._process.stdout):
            self._log.say(f"[{self.label}] {line.rstrip()}", is_shown=n < _SHOWN_LINES)
            if n == _SHOWN_LINES:
                self._log.say(f"[{self.label}] goes on in the log")
        self._ended = time.monotonic()


def run_step(step: Step, left_s: float, log: Log) -> list[Outcome]:
    """Run a step's commands side by side, in the time that it has; how each ended."""
    limit = min(step.cap_s, left_s)
    if limit < _LEAST_S:
        log.say(f"== {step.name}: not begun, {max(0.0, left_s):.0f} s are left")
        return [Outcome(step.name, c.label, "not begun", 0.0) for c in step.commands]
    log.say(f"== {step.name}: {step.expected_s:.0f} s expected, {limit:.0f} s at most")
    begin, found = time.monotonic(), list[Outcome]()
    running: list[Process] = []

    def tell(process: Process, is_late: bool) -> None:
        code, seconds = process.result()
        remark = "not complete" if code == INCOMPLETE else ""
        failure = "out of time" if is_late else f"exit status {code}" if code and not remark else ""
        log.say(f"[{process.label}] {failure or remark or 'done'}, {seconds:.1f} s")
        found.append(Outcome(step.name, process.label, failure, seconds, remark))

    try:
        for command in step.commands:
            if command.needs and shutil.which(command.needs) is None:
                remark = f"left out: no {command.needs} here"
                log.say(f"[{command.label}] {remark}")
                found.append(Outcome(step.name, command.label, "", 0.0, remark))
                continue
            try:
                running.append(Process(command, log, is_alone=len(step.commands) == 1))
            except OSError as error:
                found.append(Outcome(step.name, command.label, str(error), 0.0))
        late = []
        for process in running:
            if process.ends(begin + limit):
                tell(process, is_late=False)
            else:
                late.append(process)
        for process in late:  # all at once, so that they share one grace
            process.ask()
        for process in late:
            process.ends(begin + limit + _GRACE_S)
        for process in late:
            process.kill()
        for process in late:
            tell(process, is_late=True)
    finally:
        for process in running:
            process.kill()
    log.say(f"== {step.name}: {time.monotonic() - begin:.0f} s")
    return found


def surroundings() -> Iterator[str]:
    """The time, the commit and the card that the log is of."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    yield f"{now} commit {os.environ.get('BENCH_COMMIT', 'as git has it')}"
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total"
        command = ("nvidia-smi", query, "--format=csv,noheader")
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=10)
            yield (asked.stdout or asked.stderr).strip()
        except subprocess.TimeoutExpired:
            yield "nvidia-smi does not answer"


def libraries() -> list[str]:
    """Checksums of the native libraries: no commit tells what they were built from."""
    return [
        f"{library.name} {hashlib.sha1(library.read_bytes()).hexdigest()[:10]}"
        for library in sorted(_PACKAGE.glob("_native*.so"))
    ]


def archive(folder: Path, target: Path) -> None:
    """Archive all files of a folder but archives, whole or not at all."""
    draft = target.with_suffix(".part")
    with tarfile.open(draft, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path != draft and not path.name.endswith(".tar.gz"):
                tar.add(path, path.relative_to(folder))
    draft.replace(target)


def run_steps(name: str, steps: Sequence[Step], limit_s: float, folder: Path) -> list[Outcome]:
    """Run every step in turn; leave NAME.log and NAME.tar.gz in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    with (folder / f"{name}.log").open("w") as file:
        log = Log(file)
        for line in surroundings():
            log.say(line)
        told: list[str] = []
        for step in steps:
            for line in libraries():  # a step may have built them
                if line not in told:
                    log.say(line)
                    told.append(line)
            outcomes += run_step(step, limit_s - _ARCHIVE_S - log.seconds(), log)
            archive(folder, folder / f"{name}.tar.gz")
        failed = sum(bool(outcome.failure) for outcome in outcomes)
        log.say(f"== {name}: {log.seconds():.0f} of {limit_s:.0f} s, {failed} failed")
        for outcome in outcomes:
            if text := outcome.failure or outcome.remark:
                log.say(f"   {outcome.step}: {outcome.label}: {text}")
    archive(folder, folder / f"{name}.tar.gz")
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """The number of commands that failed."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh", description="Checks and timings of a GPU."
    )
    parser.add_argument("call", choices=tuple(CALLS))
    parser.add_argument("folder", type=Path, help="for the log, the results and one archive of all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses")
    parser.add_argument("--limit", type=float, help="seconds in all, in place of the call's own")
    options = parser.parse_args(arguments)
    limit_s, steps_of = CALLS[options.call]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    steps = steps_of(sys.executable, options.device, options.folder / "results")
    outcomes = run_steps(options.call, steps, options.limit or limit_s, options.folder)
    return min(_MOST_FAILURES, sum(bool(outcome.failure) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
