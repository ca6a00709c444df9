"""Small rows of each family of kernels under compute-sanitizer; a table, and a record as rows end.

    python -m tests.gpu.sanitize RESULT.json [-k REGEX of rows]

memcheck looks for accesses out of bounds, racecheck for hazards in shared memory. racecheck does not follow
every barrier that TMA copies arrive at: a hazard it names is a place to look at, no proof. Only kernels of
ours are watched. ROW_SECONDS: of one row under one tool; JOBS: rows at a time.
"""

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

SANITIZER = "compute-sanitizer"
KERNELS = "mosaic"  # in the names of all kernels of ours
TOOLS = ("memcheck", "racecheck")
FLASH = "test_flash_attention.py::test_forward_and_backward"
ROWS = {
    "flash: causal": f"{FLASH}[small, causal]",
    "flash: H = 128, fp16": f"{FLASH}[small, head dim 128, fp16]",
    "flash: fused backward": f"{FLASH}[fused, H=64 odd]",
    "flash: all features": f"{FLASH}[small, all at once]",
    "flash: segments": f"{FLASH}[small, segments]",
    "flash: block mask": f"{FLASH}[small, block mask]",
    "flash: folded": f"{FLASH}[one wave, H=64 odd]",
    "flash: float32": f"{FLASH}[float32 fused, H=64 odd]",
    "flash: adds in order": f"{FLASH}[fused, deterministic, H=128 odd]",
    "flash: tiles of 80 keys": f"{FLASH}[H=256 full]",
    "flash: odd lengths": f"{FLASH}[H=128 odd]",
    "flash: odd columns": f"{FLASH}[H=80 causal]",
    "flash: bias, block mask": f"{FLASH}[small, block mask, bias]",
    "pages: write, copy": "test_kv_pages.py::test_write_and_copy[shape0-77-bfloat16-bfloat16]",
    "pages: write, copy, int8": "test_kv_pages.py::test_write_and_copy[shape8-77-bfloat16-int8]",
    "paged: decode": "test_paged_attention.py::test_decode_of_every_group[1-64]",
    "paged: decode, H = 80": "test_paged_attention.py::test_decode_of_every_group[5-80]",
    "paged: odd blocks": "test_paged_attention.py::test_decode_of_head_dims_that_end_within_a_block[144]",
    "paged: prompts": "test_paged_prefill.py::test_every_group[1-64]",
    "paged: packed prompts": "test_paged_prefill.py::test_every_group[7-64]",
    "paged: cascade": "test_paged_prefill.py::test_cascade_equals_paged_attention[64-2]",
}
PYTEST = ["-c", os.devnull, "--rootdir", ".", "-o", "markers=gpu: needs a Hopper GPU"]
PYTEST += ["-p", "no:cacheprovider", "-q"]
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")


def only_ours() -> list[str]:
    """The option that watches no kernels but ours: its name is another in each generation of the tool."""
    known = subprocess.run([SANITIZER, "--help"], capture_output=True, text=True).stdout
    for option in ("--kernel-name", "--filter"):
        if option in known:
            return [option, f"kns={KERNELS}"]
    return []


def check(row: str, tool: str, options: list[str], seconds: float) -> dict[str, Any]:
    """{"row", "tool", "outcome", "seconds"}: "clean", or what the tool or the test says."""
    command = [
        SANITIZER,
        "--tool",
        tool,
        "--print-limit",
        "5",
        "--target-processes",
        "application-only",
        *options,
    ]
    stacks = f"faulthandler_timeout={0.9 * seconds:.0f}"  # where a test stands that comes to no end
    command += [sys.executable, "-m", "pytest", *PYTEST, "-o", stacks, f"tests/gpu/{ROWS[row]}"]
    start, pipes = time.monotonic(), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            text = process.communicate(timeout=seconds)[0]
            outcome = outcome_of(text)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool's own child too, which holds the pipe
            outcome, text = f"no end within {seconds:.0f} s", process.communicate()[0]
    found = {"row": row, "tool": tool, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
    print(f"{row:26}{tool:11}{found['seconds']:6.1f} s  {outcome}", flush=True)
    if outcome != "clean" and text:
        print("\n".join(f"    {line}" for line in text.splitlines()[-120:]), flush=True)
    return found


def check_again(row: str, tool: str, options: list[str], seconds: float) -> dict[str, Any]:
    """As check, once more where nothing came of it: under the tool XLA's compiler may come to no end."""
    found = check(row, tool, options, seconds)
    is_nothing = found["outcome"].startswith(("no end", "the tool did not run"))
    return check(row, tool, options, seconds) if is_nothing else found


def outcome_of(text: str) -> str:
    summary = SUMMARY.search(text)
    if summary is None:
        lines = [line for line in text.splitlines() if line.strip()]
        return f"the tool did not run: {next((x for x in lines if 'rror' in x), lines[-1:])}"
    if not re.match(r"0 (errors|hazards)", summary[1]):
        return summary[1]
    return "clean" if re.search(r"\b1 passed", text) else "no errors, but the test did not pass"


def write(path: Path, facts: dict[str, Any], found: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": found}, indent=1) + "\n")


def facts_of(command: str) -> dict[str, Any]:
    lines = subprocess.run([SANITIZER, "--version"], capture_output=True, text=True).stdout.splitlines()
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    device = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    versions[SANITIZER] = next((line for line in lines if "ersion" in line), "")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"command": command, "date": date, "device": (device or [""])[0], "versions": versions}


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    result, *rest = arguments
    part = rest[1] if rest[:1] == ["-k"] else ""
    chosen = [row for row in ROWS if re.search(part, row)]
    missing = [tool for tool in ("nvidia-smi", SANITIZER) if shutil.which(tool) is None]
    if missing or not chosen:
        reason = f"{missing[0]} is not on the PATH" if missing else f"{part!r} matches none of {list(ROWS)}"
        print(f"sanitize: nothing was checked: {reason}", file=sys.stderr)
        return 2
    seconds, jobs = float(os.environ.get("ROW_SECONDS", 120)), int(os.environ.get("JOBS", 1))
    facts, options = facts_of(os.environ.get("COMMAND", " ".join(sys.argv))), only_ours()
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(jobs) as pool:
        calls = [(row, tool) for tool in TOOLS for row in chosen]
        for one in pool.map(lambda call: check_again(*call, options, seconds), calls):
            found.append(one)
            write(Path(result), facts | {"options": options}, found)
    clean = sum(one["outcome"] == "clean" for one in found)
    print(f"{result}: {clean} of {len(found)} clean")
    return 0 if clean == len(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
