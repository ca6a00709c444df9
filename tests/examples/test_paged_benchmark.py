"""The decode benchmark without a GPU: what it counts, what it writes; one failure costs one figure."""

import argparse
import json
import types
from typing import NamedTuple

import decode_configs
import decode_peers
import in_processes
import jax.numpy as jnp
import numpy as np
import paged_attention
import processes
import programs
import pytest
import report
import row_worker
from decode_peers import PEERS, Row

from pallas_kernels import PAGE_SIZES

ROW = Row("tiny", 4, 2, 64, (40, 1, 64))


def test_rows_have_labels_of_their_own_and_count_their_bytes():
    labels = [row.label for rows in paged_attention.SECTIONS.values() for row in rows]
    assert len(set(labels)) == len(labels)
    rows = [row for rows in paged_attention.SECTIONS.values() for row in rows]
    assert set(paged_attention.NAMES).union(*(row.names for row in rows)) <= set(PEERS)
    assert {f"page {size}" for size in PAGE_SIZES} in [set(row.names) for row in rows]
    assert ROW.cache_bytes == 2 * 105 * 2 * 64 * 2
    assert ROW._replace(dtype="int8").cache_bytes == 2 * 105 * 2 * (64 + 4)
    large = Row("large", 8, 2, 64, (8192,))
    assert large.num_caches * large.cache_bytes >= 4 * programs.L2_BYTES
    assert ROW.num_caches == programs.MAX_SETS


def test_every_row_has_pages_of_its_own():
    tables = PEERS["page 16"](ROW).arrays[-2]
    used = np.concatenate([tables[0, :3], tables[1, :1], tables[2]])
    assert sorted(used) == [*range(1, 9)]
    assert not tables[0, 3:].any()
    assert not tables[1, 1:].any()


def test_what_batch_invariance_costs_is_in_its_table():
    (row, *_) = paged_attention.SECTIONS["Batch-invariant"]
    parts = {name: {"microseconds": time} for name, time in zip(row.names, (20.0, 21.0), strict=True)}
    figures = paged_attention.row_figures(row, parts, {})
    table = paged_attention.tables({"device": "toy", "sections": {"Batch-invariant": [figures]}})
    assert "+5.0%" in table.splitlines()[-1]


def test_arrays_are_filled_in_their_dtypes():
    program = PEERS["page 8"](Row("tiny", 2, 1, 8, (16,), dtype="int8"))
    fillers = programs.lower_fillers(program.arrays)
    assert len(fillers) == 3  # queries, pages, scales
    compiled = {spec: filler.compile() for spec, filler in fillers.items()}
    query, k_pages, v_pages, scales, tables, lengths = programs.filled(program.arrays, compiled)
    assert query.dtype == jnp.bfloat16
    assert k_pages.dtype == jnp.int8
    assert (k_pages != v_pages).any()
    assert all(scale.dtype == jnp.float32 and (scale >= 0).all() for scale in scales)
    assert tables.dtype == lengths.dtype == jnp.int32


class Fake(NamedTuple):
    """A program that takes 100 us, or breaks when it is compiled or run."""

    fails: str = ""

    def lower(self):
        return self

    def compile(self):
        if self.fails == "compile":
            raise NotImplementedError("no such GPU")
        return self

    def figures(self, iterations):
        if self.fails == "run":
            raise NotImplementedError("out of memory")
        return {"microseconds": 100.0}


def test_a_failure_costs_its_own_figure(monkeypatch, tmp_path, capsys):
    fakes = {"page 16": Fake(), "contiguous": Fake("run"), "cuDNN contiguous": Fake("compile")}
    peers = types.SimpleNamespace(PEERS={name: lambda row, x=x: x for name, x in fakes.items()})
    rows, names = [ROW, Row("tiny", 4, 2, 64, (64,) * 8)], list(fakes)
    worker = types.SimpleNamespace(parts=[{"read_ceiling_tb_per_s": 4.0}], failure="", share=())
    monkeypatch.setattr(row_worker, "say", lambda word, part: worker.parts.append(part))
    row_worker.measure_all(row_worker.compile_all(peers, rows, [names] * 2, 100), 1)
    sections = {"Small": rows}
    result = in_processes.combine(sections, lambda row: names, paged_attention.row_figures, [worker])
    result = json.loads(json.dumps({"device": "none", **result}))
    first = result["sections"]["Small"][0]
    assert first["microseconds"] == {"page 16": 100.0, "contiguous": None, "cuDNN contiguous": None}
    assert first["tokens_per_s"]["page 16"] == 3 / 100e-6
    assert first["tb_per_s"]["page 16"] == pytest.approx(ROW.cache_bytes / 100e-6 / 1e12)
    assert list(result["no_figure"]) == [
        "contiguous: NotImplementedError: out of memory",
        "cuDNN contiguous: NotImplementedError: no such GPU",
    ]
    text = paged_attention.tables(result)
    assert "out of memory (" in text
    assert "cuDNN contiguous  " not in text
    paged_attention.plot(result, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 1000


WORKER = """
import json, os, time
job = json.loads(input())
print('@compiled', json.dumps({'seconds': 1.0, 'device': 'toy', 'num_devices': 1}), flush=True)
input()
print('@part', json.dumps({'read_ceiling_tb_per_s': 4.0}), flush=True)
if len(job['rows'][0]['lengths']) == 2: time.sleep(1000)
for name in job['names'][0]:
    print('@part', json.dumps({'row': LABEL, 'name': name, 'microseconds': 5.0}), flush=True)
print('@done {}', flush=True)
"""


def test_a_process_that_hangs_costs_its_own_rows(monkeypatch, tmp_path, capsys):
    rows = [Row("heads", 8, 2, 64, (100,) * count) for count in (1, 2)]
    script = tmp_path / "row_worker.py"
    script.write_text(WORKER.replace("LABEL", repr(rows[0].label)))
    monkeypatch.setattr(processes, "HERE", tmp_path)
    monkeypatch.setattr(in_processes, "PART_SECONDS", 1.0)
    monkeypatch.setattr(in_processes.os, "sched_getaffinity", lambda process: set(range(4)))
    monkeypatch.setattr(report, "begin_processes", lambda what: None)
    out = tmp_path / "out.json"
    command = ["x", "--heads", "8/2", "--head-dim", "64", "--rows", "1", "2", "--context", "100"]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(out)])
    assert paged_attention.main() == 1
    result = json.loads(out.read_text())
    ((first, second),) = result["sections"].values()
    assert first["microseconds"]["page 16"] == 5.0
    assert second["microseconds"]["page 16"] is None
    assert all(reason.split(": ", 1)[1].startswith("killed") for reason in result["no_figure"])
    assert result["device"] == "toy"
    assert len(result["failures"]) == 1
    assert "it said nothing for 1 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--heads", "8"],
        ["--heads", "32/5"],
        ["--heads", "8/0"],
        ["--page-size", "7"],
        ["--max-seconds", "x"],
        ["--iterations", "0"],
        ["--rows", "0"],
        ["--heads", "8/2", "--rows", "0"],
        [],
    ],
)
def test_a_wrong_command_line_or_no_gpu_is_exit_code_2(monkeypatch, arguments):
    monkeypatch.setattr(report.shutil, "which", lambda name: None)
    monkeypatch.setattr("sys.argv", ["x", *arguments])
    with pytest.raises(SystemExit, match="2"):
        paged_attention.main()


@pytest.mark.parametrize(
    "arguments", [["--dtype", "int8"], ["--head-dim", "64"], ["--rows", "3", "--context", "100"]]
)
def test_what_is_of_a_shape_needs_one(monkeypatch, capsys, arguments):
    monkeypatch.setattr("sys.argv", ["x", *arguments])
    with pytest.raises(SystemExit, match="2"):
        paged_attention.main()
    assert f"{arguments[0]} is of --heads, which must be given with it" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["x", "--heads", "8/2", *arguments])
    ((row, *_),) = paged_attention.parse().sections.values()
    assert (
        f"{row.head_dim} {row.dtype} {row.num_rows} {max(row.lengths)}"
        == {
            "--dtype": "128 int8 1 16384",
            "--head-dim": "64 bfloat16 1 16384",
            "--rows": "128 bfloat16 3 100",
        }[arguments[0]]
    )


def test_a_chart_says_what_was_measured():
    figures = lambda *rows: [paged_attention.row_figures(row, {}, {}) for row in rows]
    wide = Row("heads", 32, 8, 128, (4096,) * 4, dtype="int8")
    assert paged_attention.measured(figures(wide, wide)) == "4096 tokens, int8"
    assert paged_attention.measured(figures(ROW, wide)) == "35 to 4096 tokens, bf16 and int8"


def test_only_sections_that_there_are(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--only", "no such"])
    with pytest.raises(SystemExit, match="2"):
        paged_attention.main()
    assert "no section's title holds 'no such'" in capsys.readouterr().err


def test_shapes_come_from_the_command_line():
    options = argparse.Namespace(heads="8/2", head_dim=64, rows=[1, 3], context=100, dtype="int8")
    (rows,) = paged_attention.chosen_sections(options).values()
    assert rows[1] == Row("heads", 8, 2, 64, (100, 100, 100), dtype="int8")
    options.heads = None
    assert paged_attention.chosen_sections(options) is paged_attention.SECTIONS


def test_configs_are_changed_as_their_names_say(capsys, monkeypatch):
    assert decode_configs.changes_of("split=2048 dynamic=1") == {"split": 2048, "dynamic": True}
    assert decode_configs.changes_of("default") == {}
    names = ["default", *decode_configs.TRIED]
    assert len(set(map(str, map(decode_configs.changes_of, names)))) == len(names)
    (rows,) = decode_configs.SECTIONS.values()
    for row in rows:
        for name in names:
            if row.head_dim == 64 and name == "stages=3":
                with pytest.raises(NotImplementedError, match="multiple of consumers=2"):
                    decode_peers.config_of(row, 16, decode_configs.changes_of(name))
            else:
                decode_peers.config_of(row, 16, decode_configs.changes_of(name))
    part = {"microseconds": 50.0, "elapsed_us": 60.0}
    figures = decode_configs.row_figures(
        ROW, {"default": part, "stages=3": part | {"microseconds": 25.0}}, {}
    )
    table = decode_configs.tables({"device": "toy", "sections": {"Decode": [figures]}})
    expected = ["25", "0.5", report.cell(figures["tb_per_s"]["stages=3"]), "60"]
    assert table.splitlines()[4].split() == ["stages=3", *expected]
    for wrong in ("split=100", "splits=128", "split"):
        monkeypatch.setattr("sys.argv", ["x", "--try", wrong])
        with pytest.raises(SystemExit, match="2"):
            decode_configs.main()
        assert "--try: " in capsys.readouterr().err
