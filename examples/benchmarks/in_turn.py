"""Cases that are measured one after the other in this process."""

import sys
import time
from collections.abc import Callable
from typing import Any

import report
from timing import at_most, or_reason


def measured(
    path: str | None,
    facts: dict[str, Any],
    cases: dict[str, Callable[[], dict]],
    limit: float,
    budget: float | None = None,
) -> list[dict]:
    """Rows of figures, one a case, saved with `facts` as they come; {"case", "error"} of one that failed.

    limit: seconds of a case; one that takes longer ends the process. budget: seconds of all, or None; cases
    that it does not reach are not measured.
    """
    rows: list[dict] = []
    start = time.monotonic()
    for name, case in cases.items():
        if budget is not None and time.monotonic() - start > budget:
            row: Any = "not reached"
        else:
            with at_most(limit, name):
                row = or_reason(case)
        rows.append({"case": name, "error": row} if isinstance(row, str) else row)
        print(f"{name}: {_brief(rows[-1])}", flush=True)
        report.save(path, facts | {"rows": rows}, is_last=False)
    return rows


def _brief(row: dict) -> str:
    return row.get("error") or ", ".join(
        f"{name} {report.cell(value)}" for name, value in row.items() if isinstance(value, int | float)
    )


def finish(path: str | None, facts: dict[str, Any], rows: list[dict]) -> int:
    """Prints the table of what was measured, saves all; exit code 1 where something was not."""
    good = [row for row in rows if "error" not in row]
    if good:
        print(report.table(tuple(good[0]), [tuple(row.values()) for row in good]))
        report.save(path, facts | {"rows": rows})
    for row in rows:
        if "error" in row:
            print(f"not measured: {row['case']}: {row['error']}", file=sys.stderr)
    return 0 if len(good) == len(rows) else 1
