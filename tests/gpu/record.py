"""Runs pytest in processes that share one list of tests (claims.py), and records the outcome as it comes.

    python -m tests.gpu.record RESULT.json [pytest arguments]

A process whose test takes longer than TEST_SECONDS is killed, its test recorded as hung, and a fresh process
goes on with what is left; likewise after a crash. RESULT.json is rewritten as tests end: a run that is cut
off leaves what it found. JOBS: processes. MAX_SECONDS: of the whole run; what is left then is "not_run", and
LEFT_OF=RESULT.json runs that, and what failed, in a later run.
"""

import collections
import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.gpu.claims import POISONED

STARTS_IN_VAIN = 3  # processes that end before they have run a test; then no more are started


class Process:
    """One pytest process, the test it is at and since when."""

    def __init__(self, folder: Path, number: int, arguments: list[str]):
        self.events, self.log = folder / f"{number}.events", folder / f"{number}.log"
        claims = folder / "claims"
        claims.mkdir(exist_ok=True)
        self.events.touch()
        variables = {**os.environ, "JAXATTN_CLAIMS": str(claims), "JAXATTN_EVENTS": str(self.events)}
        command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.claims"]
        command += ["--continue-on-collection-errors", *arguments]
        with self.log.open("w") as log:
            pipes = {"stdout": log, "stderr": subprocess.STDOUT}
            self.popen = subprocess.Popen(command, env=variables, start_new_session=True, **pipes)
        self.test: str | None = None
        self.num_tests, self.position, self.since = 0, 0, time.monotonic()

    def new_events(self) -> list[dict]:
        whole, _, _ = self.events.read_bytes()[self.position :].rpartition(b"\n")
        if not whole:
            return []
        self.position += len(whole) + 1
        self.since = time.monotonic()
        return [json.loads(line) for line in whole.splitlines()]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold on to it
            self.popen.wait(timeout=20)


class Record:
    """What is known of every test; `path` always holds it."""

    def __init__(self, path: Path, command: str):
        self.path, self.start = path, time.monotonic()
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.facts: dict = {"command": command, "date": date}
        self.tests: list[str] | None = None
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def add(self, name: str, outcome: str, reason: str = "", text: str = "") -> None:
        self.outcomes[name] = outcome
        if outcome not in ("passed", "skipped"):
            self.reasons[name] = reason[:300]
            print(f"{outcome.upper()} {name}: {reason[:300]}", *text.splitlines()[-25:], sep="\n", flush=True)

    def named(self, outcome: str) -> dict[str, str]:
        return {name: reason for name, reason in self.reasons.items() if self.outcomes[name] == outcome}

    def write(self, is_complete: bool) -> dict:
        counts: dict[str, collections.Counter] = {}
        not_run = [name for name in self.tests or () if name not in self.outcomes]
        for name, outcome in [*self.outcomes.items(), *((name, "not_run") for name in not_run)]:
            counts.setdefault(Path(name.split("::")[0]).stem, collections.Counter())[outcome] += 1
        result = {
            **self.facts,
            "seconds": round(time.monotonic() - self.start, 1),
            "is_complete": is_complete,
            "total": dict(sum(counts.values(), collections.Counter())),
            "counts": {file: dict(count) for file, count in sorted(counts.items())},
            **{outcome: self.named(outcome) for outcome in ("failed", "hung", "crashed")},
            "not_run": not_run,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(result, indent=1) + "\n")
        draft.replace(self.path)
        return result


class Run:
    def __init__(self, record: Record, folder: Path, arguments: list[str], jobs: int, test_seconds: float):
        self.record, self.folder, self.arguments = record, folder, arguments
        self.test_seconds, self.in_vain, self.num_started = test_seconds, 0, 0
        self.processes = [self.fresh() for _ in range(jobs)]

    def fresh(self) -> Process:
        self.num_started += 1
        return Process(self.folder, self.num_started, self.arguments)

    def look(self) -> None:
        """Takes in what the processes say; replaces those that hang or broke."""
        for process in list(self.processes):
            has_ended = process.popen.poll() is not None  # before the events: none comes after
            for event in process.new_events():
                self.take(process, event)
            if not has_ended and time.monotonic() - process.since > self.limit(process):
                process.kill()
                has_ended = True
                self.lose(process, "hung", f"no end within {self.limit(process):.0f} s")
            elif has_ended and process.test is not None:
                self.lose(process, "crashed", f"the process ended with exit code {process.popen.returncode}")
            elif has_ended and process.popen.returncode == POISONED:
                self.replace(process)
            elif has_ended:
                self.processes.remove(process)
                if self.record.tests is None:
                    print(process.log.read_text()[-3000:], file=sys.stderr)

    def limit(self, process: Process) -> float:
        return self.test_seconds if process.test else max(self.test_seconds, 180)  # collecting imports JAX

    def take(self, process: Process, event: dict) -> None:
        if "collected" in event:
            self.record.tests = event["collected"]
            self.record.facts |= event["environment"]
        elif "start" in event:
            process.test = event["start"]
        else:
            process.test, process.num_tests = None, process.num_tests + 1
            self.record.add(*(event.get(key, "") for key in ("id", "outcome", "reason", "text")))

    def lose(self, process: Process, outcome: str, reason: str) -> None:
        if process.test is not None:
            self.record.add(process.test, outcome, reason, process.log.read_text(errors="replace"))
        self.replace(process)

    def replace(self, process: Process) -> None:
        self.processes.remove(process)
        self.in_vain += process.test is None and process.num_tests == 0
        tests = self.record.tests
        if self.in_vain < STARTS_IN_VAIN and (tests is None or len(self.record.outcomes) < len(tests)):
            self.processes.append(self.fresh())


def main(result: str, arguments: list[str]) -> int:
    jobs, test_seconds, max_seconds = (
        float(os.environ.get(name, default))
        for name, default in (("JOBS", 1), ("TEST_SECONDS", 120), ("MAX_SECONDS", "inf"))
    )
    command = os.environ.get("COMMAND") or shlex.join(["python", "-m", "tests.gpu.record", *sys.argv[1:]])
    record = Record(Path(result), f"JOBS={jobs:.0f} {command}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        run = Run(record, Path(folder), arguments, int(jobs), test_seconds)
        said = time.monotonic()
        try:
            while run.processes and time.monotonic() - record.start < max_seconds:
                time.sleep(0.2)
                run.look()
                total = record.write(is_complete=False)["total"]
                if time.monotonic() - said > 20:
                    said = time.monotonic()
                    print(f"{said - record.start:.0f} s: {total}", flush=True)
        finally:
            is_complete = not run.processes
            for process in run.processes:
                process.kill()
            total = record.write(is_complete)["total"]
    print(f"{result}: {total} in {time.monotonic() - record.start:.0f} s")
    return 0 if is_complete and record.tests and not set(total) - {"passed", "skipped"} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
