"""A child process that times candidates (:mod:`graphprune.backends.tvm_trial`), watched from here.

It is started when first needed and again after it crashed or ran out of time. Starting takes seconds,
because TVM and torch are imported, so one child serves many candidates.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphprune.errors import BackendError

from .tvm_machine import Machine
from .tvm_schedules import Knobs

START_SECONDS = 300.0
TRIAL_SECONDS = 120.0
MODULE = "graphprune.backends.tvm_trial"


class Child:
    """Times candidates of functions for one machine, with one number of threads. A context manager.

    Attributes:
        crashes: how often the process had to be started again.
    """

    def __init__(self, machine: Machine, threads: int, module: str = "", seconds: float = 0.0):
        self.machine, self.threads = machine, threads
        self.module, self.seconds = module or MODULE, seconds or TRIAL_SECONDS
        self.crashes = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._answered = False
        self._folder = tempfile.TemporaryDirectory(prefix="graphprune-")
        self._log = Path(self._folder.name) / "log"

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._folder.cleanup()

    def keep(self, name: str, function: Any) -> str:
        """A function as a file that requests name."""
        import tvm

        path = Path(self._folder.name) / f"{name}.json"
        if not path.exists():
            path.write_text(tvm.ir.save_json(function), encoding="utf-8")
        return str(path)

    def times(
        self, function: str, knobs: Sequence[Knobs], worst: float | None = None, rounds: int | None = None
    ) -> tuple[list[float | None], list[str]]:
        """Milliseconds of each candidate, ``None`` where there is none, and why.

        Args:
            function: what :meth:`keep` gave.
            worst: what takes longer is timed once, milliseconds.
            rounds: how often each is timed, in turns.

        Raises:
            BackendError: the child does not even start.
        """
        request: dict[str, Any] = {
            "function": function, "knobs": [k.to_json() for k in knobs], "machine": dict(self.machine.llvm),
            "vector": self.machine.vector, "tile": self.machine.tile, "worst": worst,
            "threads": self.threads,
        }  # fmt: skip
        if rounds is not None:
            request["rounds"] = rounds
        reply, reason = self._ask(request, self.seconds * max(1, len(knobs)))
        if reply is None:
            self.crashes += 1
            return [None] * len(knobs), [reason] * len(knobs)
        return reply["ms"], reply["errors"]

    def _ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any] | None, str]:
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        if not self._answered:
            seconds += START_SECONDS
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, seconds)
        except BrokenPipeError:
            line = b""
        if line:
            self._answered = True
            return json.loads(line), ""
        late = line is None
        if not late:
            process.wait(timeout=START_SECONDS)  # its output has ended, so it is about to
        self._stop()
        reason = f"took more than {seconds:.0f} s" if late else _how(process.returncode)
        if not self._answered and not late and process.returncode > 0:
            said = self._log.read_text(errors="replace").strip().splitlines()
            raise BackendError(
                f"the process that times candidates does not start ({reason}): "
                f"{said[-1] if said else 'it said nothing'}"
            )
        self._answered = False
        return None, reason

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """A reply; empty when the process has ended, ``None`` when time is up."""
        assert process.stdout is not None
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            if not waiting.select(seconds):
                return None
        return process.stdout.readline()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "TVM_NUM_THREADS": str(self.threads), "TVM_BIND_THREADS": "0"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
            )  # fmt: skip
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _how(code: int) -> str:
    """How a process ended, in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
