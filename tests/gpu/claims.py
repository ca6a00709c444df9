"""A pytest plugin for processes that share one list of tests: each runs what no other has claimed.

A claim is a file in the folder JAXATTN_CLAIMS that only one process can create. What happens goes, line by
line, to JAXATTN_EVENTS as JSON: record.py reads it while this process may hang or be killed. LEFT_OF: a
record; then only what it does not call passed is run.
"""

import hashlib
import json
import os
import platform
import sys
from importlib import metadata

import pytest

POISONED = 77  # exit code of a process whose GPU context an error has ended: every later call would fail
POISON = ("CUDA_ERROR_ILLEGAL", "CUDA_ERROR_LAUNCH", "CUDA_ERROR_MISALIGNED", "CUDA_ERROR_ECC")
VERSIONS = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "numpy", "pytest")
WORST_LAST = ("passed", "skipped", "failed")


class Sharing:
    def __init__(self, folder: str, events: str):
        self.folder = folder
        self.events = os.open(events, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.reports: list[pytest.TestReport] = []
        self.only = _left_of(os.environ.get("LEFT_OF"))

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.only is not None:
            items[:] = [item for item in items if item.nodeid in self.only]

    def say(self, **event) -> None:
        os.write(self.events, (json.dumps(event) + "\n").encode())

    def claim(self, name: str) -> bool:
        path = os.path.join(self.folder, hashlib.sha1(name.encode()).hexdigest())
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            text = str(report.longrepr)
            self.say(id=report.nodeid, outcome="failed", seconds=0, reason=_last_line(text), text=text)

    def pytest_runtestloop(self, session) -> bool:
        items = _interleaved(session.items)
        self.say(collected=[item.nodeid for item in items], environment=_environment())
        for item in items:
            if session.shouldstop or session.shouldfail:
                break
            if session.config.option.collectonly or not self.claim(item.nodeid):
                continue
            self.say(start=item.nodeid)
            self.reports = []
            # Without a next item everything is torn down: another process may have claimed the next.
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if self.finish(item.nodeid):
                pytest.exit("the GPU's context is lost", returncode=POISONED)
        return True

    def pytest_runtest_logreport(self, report) -> None:
        self.reports.append(report)

    def finish(self, name: str) -> bool:
        """Says how a test ended; True where nothing after it can run in this process."""
        worst = max(self.reports, key=lambda report: WORST_LAST.index(report.outcome))
        seconds = round(sum(report.duration for report in self.reports), 2)
        event = {"id": name, "outcome": worst.outcome, "seconds": seconds}
        text = worst.longreprtext if worst.failed else ""
        if worst.failed:
            crash = getattr(worst.longrepr, "reprcrash", None)
            event |= {"reason": crash.message.splitlines()[0] if crash else _last_line(text), "text": text}
        self.say(**event)
        return any(word in text for word in POISON)


def _left_of(record: str | None) -> set[str] | None:
    """The tests that a run recorded as anything but passed or skipped."""
    if not record:
        return None
    with open(record) as file:
        found = json.load(file)
    return {name for outcome in ("failed", "hung", "crashed", "not_run") for name in found[outcome]}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _interleaved(items: list) -> list:
    """Tests of all files side by side, so that a run that is cut off has seen some of each."""
    files: dict = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    places = {item: i / len(file) for file in files.values() for i, item in enumerate(file)}
    return sorted(items, key=places.__getitem__)


def _environment() -> dict:
    """Device and versions, where the tests have imported JAX."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    environment = {"python": platform.python_version(), "versions": versions}
    if "jax" in sys.modules:
        device = sys.modules["jax"].devices()[0]
        platform_version = getattr(device.client, "platform_version", "").strip()
        environment |= {"device": device.device_kind, "platform_version": platform_version}
    return environment


def pytest_configure(config) -> None:
    config.pluginmanager.register(Sharing(os.environ["JAXATTN_CLAIMS"], os.environ["JAXATTN_EVENTS"]))
