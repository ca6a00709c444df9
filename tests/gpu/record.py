"""Writes what a run of the GPU tests found: python record.py JUNIT.xml RESULT.json STARTED COMMAND."""

import collections
import json
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import jax
import jaxlib


def main(junit: str, result: str, started: str, command: str) -> None:
    cases = list(xml.parse(junit).getroot().iter("testcase"))
    outcome = lambda case: next(
        (child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"
    )
    counts: dict[str, dict[str, int]] = collections.defaultdict(lambda: collections.defaultdict(int))
    for case in cases:
        counts[case.get("classname", "").split(".")[-1]][outcome(case)] += 1
    device = jax.devices()[0]
    record = {
        "device": device.device_kind,
        "platform_version": getattr(device.client, "platform_version", ""),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": sys.version.split()[0],
        "started": started,
        "seconds": round(sum(float(case.get("time", 0)) for case in cases), 1),
        "command": command.strip(),
        "counts": counts,
        "not_passed": [case.get("name") for case in cases if outcome(case) != "passed"],
    }
    path = Path(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{result}: {dict(sum((collections.Counter(c) for c in counts.values()), collections.Counter()))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
