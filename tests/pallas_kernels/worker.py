"""A child process that runs kernel cases under a time limit: a deadlocked kernel must fail one test, not hang
them all.

The parent writes a case's name to the child's stdin and reads one line of JSON from its stdout, so that many
cases share one start of JAX. A child that does not answer in time is killed; the next case gets a fresh one.

    python -m tests.pallas_kernels.worker interpret|compile
"""

import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


class Worker:
    """The parent's handle on a child that serves one tier; starts it when first asked."""

    def __init__(self, tier: str, python: str = sys.executable):
        self.tier = tier
        self.command = [python, "-m", "tests.pallas_kernels.worker", tier]
        self.process: subprocess.Popen | None = None
        self.answers: queue.Queue[str] = queue.Queue()

    def run(self, case: str, limit_seconds: float) -> dict:
        """The child's answer to a case; AssertionError with its traceback, or when the time is over."""
        process = self._start()
        assert process.stdin is not None
        process.stdin.write(case + "\n")
        process.stdin.flush()
        try:
            answer = json.loads(self.answers.get(timeout=limit_seconds))
        except queue.Empty:
            self.close()
            raise AssertionError(f"{case}: no answer within {limit_seconds} s; a deadlock?") from None
        assert "error" not in answer, answer["error"]
        return answer

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _start(self) -> subprocess.Popen:
        if self.process is None or self.process.poll() is not None:
            self.answers = queue.Queue()
            # NPROC: threads of XLA's pool; fewer than a kernel has warpgroups, and their callbacks deadlock.
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "32"}
            if self.tier == "compile":
                environment["XLA_FLAGS"] = ""  # those of the tests are of a CPU; this compiles what ships
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=ROOT,
                env=environment,
            )
            threading.Thread(target=_forward, args=(self.process.stdout, self.answers), daemon=True).start()
        return self.process


def _forward(lines, answers: queue.Queue) -> None:
    for line in lines:
        if line.startswith("{"):
            answers.put(line)
    answers.put(json.dumps({"error": "the worker ended"}))


def _interpret(name: str) -> dict:
    from tests.pallas_kernels import tables

    tables.INTERPRET[name]()
    return {}


def _compile(name: str) -> dict:
    from tests.pallas_kernels import hopper, tables

    case = tables.COMPILE[name]
    compiled = hopper.compile_for_hopper(
        case.function, case.specs, case.donate, case.num_devices, case.partition
    )
    answer = compiled._asdict() | {"kernels": [kernel._asdict() for kernel in compiled.kernels]}
    return answer if case.keep_hlo or case.pads_nothing else answer | {"hlo": ""}


def main(tier: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not look like an answer
    if tier == "compile":
        from tests.pallas_kernels import hopper

        hopper.setup()
    serve = {"interpret": _interpret, "compile": _compile}[tier]
    for line in sys.stdin:
        try:
            answer = serve(line.strip())
        except BaseException:
            answer = {"error": traceback.format_exc()[-6000:]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
