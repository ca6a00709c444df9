"""Every kernel of tables.py in three tiers that need no GPU: interpreted, lowered for CUDA, compiled to
sm_90a.
"""

import os
import re
import signal
from pathlib import Path

import jax
import pytest

from tests.pallas_kernels import tables
from tests.pallas_kernels.hopper import abstract_mesh
from tests.pallas_kernels.worker import ROOT, Worker

HOPPER_PYTHON = Path(os.environ.get("JAXATTN_HOPPER_PYTHON", ROOT / ".venv-hopper/bin/python"))
LIMIT_SECONDS = 60

pytestmark = pytest.mark.skipif(
    os.environ.get("JAXATTN_TEST_GPU") == "1", reason="these tiers stand in for a GPU; here is one"
)


def rows(table: dict) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) if name in tables.SLOW else name for name in table]


@pytest.fixture(scope="module")
def interpreter():
    worker = Worker("interpret")
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def assembler():
    if not HOPPER_PYTHON.exists():
        reason = f"no sm_90a compiler: {HOPPER_PYTHON} is missing (make .venv-hopper/installed)"
        if os.environ.get("JAXATTN_REQUIRE_HOPPER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    worker = Worker("compile", str(HOPPER_PYTHON))
    yield worker
    worker.close()


def test_slow_rows_are_rows():
    assert {*tables.INTERPRET, *tables.COMPILE} >= tables.SLOW


def test_tables_hold_every_op():
    kernel_folders = {path.parent.name for path in (ROOT / "pallas_kernels").glob("*/*_sm90.py")}
    covered = {name.split(":")[0] for name in tables.COMPILE}
    assert kernel_folders <= covered, f"no COMPILE row for {kernel_folders - covered}"


@pytest.mark.parametrize("name", rows(tables.INTERPRET))
def test_interpreted_without_races_and_right(interpreter, name):
    interpreter.run(name, LIMIT_SECONDS)


@pytest.mark.skipif(HOPPER_PYTHON.exists(), reason="test_compiles_to_sm90a_without_spills lowers them too")
@pytest.mark.parametrize("name", rows(tables.COMPILE))
def test_lowers_for_cuda(name):
    case = tables.COMPILE[name]
    with jax.sharding.use_abstract_mesh(abstract_mesh()):
        lowered = jax.jit(case.function).trace(*case.specs).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("name", rows(tables.COMPILE))
def test_compiles_to_sm90a_without_spills(assembler, name):
    case = tables.COMPILE[name]
    answer = assembler.run(name, LIMIT_SECONDS)
    assert answer["kernels"], "no Mosaic kernel was assembled"
    for kernel in answer["kernels"]:
        assert kernel["spill_bytes"] <= case.max_spill_bytes, kernel
    others = [line for line in answer["warnings"] if "spilled" not in line]
    assert not others, others
    if case.max_temp_bytes is not None:
        assert answer["temp_bytes"] <= case.max_temp_bytes
    assert answer["alias_bytes"] >= case.min_alias_bytes
    # A kernel that writes to a slice in place would write to a buffer of its own.
    assert "dynamic_slice_fusion" not in answer["hlo"]
    assert not (case.pads_nothing and re.search(r"f16\[\S+ pad\(", answer["hlo"]))
    if case.num_devices > 1:
        assert not re.search("all-gather|all-to-all|all-reduce|collective-permute", answer["hlo"])


def test_worker_reports_errors_and_survives_a_deadlock():
    worker = Worker("interpret")
    with pytest.raises(AssertionError, match="KeyError"):
        worker.run("no such case", LIMIT_SECONDS)
    assert worker.process is not None
    worker.process.send_signal(signal.SIGSTOP)  # as a deadlock: it never answers
    with pytest.raises(AssertionError, match="no answer"):
        worker.run("no such case", 0.5)
    with pytest.raises(AssertionError, match="KeyError"):
        worker.run("no such case", LIMIT_SECONDS)
    worker.close()
