"""A process for each target of a benchmark; where memory is too small for all at once, some come for their turns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pocketsam.benchmarks.targets import Target

# Only where a worker can ask to die with its parent: one that is paused would never notice.
CAN_PAUSE = sys.platform == "linux"


class Worker:
    """A target's process.

    Attributes:
        cache: folder that compiled models are kept in, of the engines and of torch.compile.
        facts: of the opening, or ``problem``.
    """

    def __init__(self, target: Target, cache: Path) -> None:
        self.target, self.cache = target, cache
        self.open()

    def open(self) -> None:
        """Start the process, open the target and call both graphs once."""
        command = [sys.executable, "-m", "pocketsam.benchmarks.worker", json.dumps(asdict(self.target))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, encoding="utf-8",
                                        env={**os.environ, "POCKETSAM_CACHE": str(self.cache),
                                             "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor")})
        self.facts = self._read()
        self._pause()

    def time(self, graph: str, count: int) -> dict[str, Any]:
        """``times``: milliseconds of ``count`` calls, readback included; ``peak_mb``."""
        assert self.process.stdin is not None
        self._go_on()
        try:
            self.process.stdin.write(f"{graph} {count}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"problem": self._ended()}
        return self._read()

    def rest(self) -> None:
        """The turn is over: threads of some engines spin on, which would slow the next target."""
        self._pause()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdout.close()
        # A line that the process died too early to read is flushed once more.
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return dict(json.loads(line)) if line else {"problem": self._ended()}

    def _pause(self) -> None:
        if CAN_PAUSE:
            self.process.send_signal(signal.SIGSTOP)

    def _go_on(self) -> None:
        if CAN_PAUSE:
            self.process.send_signal(signal.SIGCONT)

    def _ended(self) -> str:
        return f"the process ended with exit status {self.process.wait()}"


class Guest(Worker):
    """A target that is open during its turns only. The calls of its opening warm it up each time."""

    def __init__(self, worker: Worker) -> None:
        self.target, self.cache, self.process, self.facts = worker.target, worker.cache, worker.process, worker.facts
        self._here = True
        self.rest()

    def time(self, graph: str, count: int) -> dict[str, Any]:
        """As of a worker; opens the target first if it is away."""
        if not self._here:
            # What is told of the opening stays that of the first one.
            facts = self.facts
            self.open()
            self._here, opened, self.facts = True, self.facts, facts
            if "problem" in opened:
                return opened
        return super().time(graph, count)

    def rest(self) -> None:
        """Leave."""
        self.close()

    def close(self) -> None:
        """End the process if there is one."""
        if self._here:
            super().close()
        self._here = False


def available_mb() -> float | None:
    """Memory that programs can still have, in 10^6 bytes; None where the system does not tell."""
    file = Path("/proc/meminfo")
    lines = file.read_text("ascii").splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("MemAvailable:")), None)
