"""Fresh processes that speak in lines, and never for longer than they are given.

The parent writes a job as JSON. The process compiles and says "@compiled {FACTS}"; at the line "measure" the
GPU is its own: it says "@part {FIGURES}" whenever it has some, and "@done {FIGURES}" at the end. Other lines
are chatter. A kernel or a compiler that hangs costs its process, not what the process has said before.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import report

HERE = Path(__file__).parent
NO_TIME = "no time was left"


class Deadline:
    """The end of a budget of seconds; None: there is none."""

    def __init__(self, seconds: float | None = None):
        self.end = float("inf") if seconds is None else time.monotonic() + seconds

    def at_most(self, seconds: float, share: float = 1.0) -> float:
        """These seconds, or this share of what is left."""
        return max(0.0, min(seconds, share * (self.end - time.monotonic())))

    @property
    def seconds_left(self) -> float:
        return self.at_most(1e9)


class Worker:
    """The parent's handle on a process. `failure` says why it ended early, "" while it has not; `share` names
    what it is to measure.
    """

    def __init__(self, script: str, job: dict, flags: str = "", share: tuple[str, ...] = ()):
        paths = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
        # Processes share the GPU's memory: none may take most of it at its start.
        variables = {**os.environ, "PYTHONPATH": paths, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, str(HERE / script)], env=variables, **pipes)
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()
        self.share = share
        self.facts: dict = {}
        self.parts: list[dict] = []
        self.done: dict | None = None
        self.failure = ""
        self._say(json.dumps(job))

    def wait_compiled(self, seconds: float) -> None:
        answer = self._hear(("@compiled",), seconds, "compiling")
        if answer:
            self.facts = answer[1]

    def measure(self, seconds: Callable[[], float], on_part: Callable[[], None] = lambda: None) -> None:
        """Lets it measure; `seconds()` may pass between two of its lines."""
        if not self.failure:
            self._say("measure")
        while not self.failure and self.done is None:
            answer = self._hear(("@part", "@done"), seconds(), f"measuring, after {len(self.parts)} parts")
            if answer and answer[0] == "@part":
                self.parts.append(answer[1])
                on_part()
            elif answer:
                self.done = answer[1]
        self.close()

    def close(self, reason: str = "") -> None:
        """Ends the process, whatever it is at."""
        self.failure = self.failure or (reason if self.done is None else "")
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold on to it
            self.process.wait(timeout=10)
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin
            self.process.stdin.close()
        self.listener.join(timeout=10)

    def _say(self, line: str) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def _listen(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                self.lines.put(line)
        self.lines.put(None)

    def _hear(self, words: tuple[str, ...], seconds: float, doing: str) -> tuple[str, dict] | None:
        """The next line that begins with one of the words; None and a failure where none comes in time."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.close(f"killed: {doing}, it said nothing for {seconds:.0f} s")
                return None
            if line is None:
                self.failure = f"{doing}, it ended with exit code {self.process.wait()}"
                return None
            word, _, rest = line.partition(" ")
            if word in words:
                return word, json.loads(rest)


def run_in_turn(
    workers: list[Worker],
    deadline: Deadline,
    compile_seconds: float,
    part_seconds: float,
    update: Callable[[], None],
) -> None:
    """All compile at once; then each has the GPU to itself. update: called whenever one has said more.

    A process that the deadline ends has that as its failure.
    """
    try:
        compiling = Deadline(compile_seconds + 30)  # a process itself gives up a little earlier
        for worker in workers:
            worker.wait_compiled(deadline.at_most(compiling.seconds_left))
        for worker in workers:
            worker.measure(lambda: deadline.at_most(part_seconds), update)
            if worker.done is None and deadline.seconds_left == 0:
                worker.failure = NO_TIME
    finally:
        for worker in workers:
            worker.close("not reached")
        update()


def device_of(workers: list[Worker]) -> dict[str, Any]:
    """The device they say they use; {} before the first has said so."""
    facts = next((worker.facts for worker in workers if worker.facts), {})
    return {name: facts[name] for name in report.DEVICE if name in facts}


def result_by(future: Future, end: float, seconds: float) -> Any:
    """What a thread returns by `end` on the monotonic clock, or that it was not compiled within `seconds`."""
    try:
        return future.result(timeout=max(0.0, end - time.monotonic()))
    except TimeoutError:
        return f"not compiled within {seconds:.0f} s"


def say(word: str, figures: dict) -> None:
    """What a process tells its parent."""
    print(word, json.dumps(figures), flush=True)
