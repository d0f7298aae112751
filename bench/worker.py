"""A process that measures for the runner, which may kill it for time or memory and go on."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from .measure import OUT_OF_MEMORY, Job, LostProcess, SpentProcess, Starting, measure
from .table import Row

_MEMORY_SHARE = 0.9
_PROBLEM_LIMIT_S = 300.0
_GRACE_S = 2.0
_SPENT, _KILLED_BY_SYSTEM = 75, -9


Serve = Callable[[Connection, str, str], None]


class Lost(NamedTuple):
    """A job that took its process with it: the provider at work ("": none), and why.

    mode: the mode that failed, where the provider may be measured in the other.
    """

    provider: str
    status: str
    mode: str = ""


class Worker:
    """Runs jobs in a process of its own, which is started when first needed.

    serve: what that process runs, with its end of the connection, a log file and the device.
    """

    def __init__(self, device: str, serve: Serve | None = None) -> None:
        self._device = device
        self._serve = serve or _serve
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        self._log = Path(self._folder.name) / "worker.log"

    def run(self, job: Job) -> list[Row] | Lost:
        """The job's rows, or what was lost; after a loss the next job gets a fresh process."""
        connection = self._start()
        connection.send(job)
        provider, limit, since = "", _PROBLEM_LIMIT_S, time.monotonic()
        while True:
            if not connection.poll(max(0.0, since + limit - time.monotonic())):
                self.stop()
                return Lost(provider, f"over {limit:g} s")
            try:
                message = connection.recv()
            except EOFError:
                return Lost(provider, self._reason_of_death())
            if isinstance(message, Lost):
                self.stop()
                return message
            if not isinstance(message, Starting):
                return message
            provider, limit, since = message.provider, message.limit_s, time.monotonic()

    def stop(self) -> None:
        """End the process: an idle one returns by itself, a busy one is killed."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.join(_GRACE_S)
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _start(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(
                target=self._serve, args=(theirs, str(self._log), self._device), daemon=True
            )
            self._process.start()
            theirs.close()
        return self._connection

    def _reason_of_death(self) -> str:
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode
        self.stop()
        if code in (_SPENT, _KILLED_BY_SYSTEM):
            return OUT_OF_MEMORY
        tail = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"crashed with exit status {code}: {''.join(tail)[:160]}"


def _serve(connection: Connection, log: str, device: str) -> None:
    """Answer jobs until the connection closes. Everything printed goes to the file `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if device == "cpu":
        _limit_memory()
    gc.freeze()  # torch's own objects: the collector runs in every case, and would walk them all
    tell: Callable[[Starting], None] = connection.send
    with contextlib.suppress(EOFError):
        while True:
            try:
                connection.send(measure(connection.recv(), tell))
            except SpentProcess:
                os._exit(_SPENT)
            except LostProcess as error:
                connection.send(Lost(error.provider, error.status, error.mode))
                os._exit(_SPENT)  # nothing may wait for the GPU on the way out


def _limit_memory() -> None:
    """Make an allocation beyond the machine's free memory fail, not the machine."""
    if sys.platform != "linux":
        return
    import resource

    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    most = int(_MEMORY_SHARE * available)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
