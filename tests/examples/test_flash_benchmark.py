"""The FlashAttention benchmark without a GPU: what it counts, how it combines, what it writes."""

import json
import threading
import time
import types

import attention_tables
import attention_worker
import flash_attention
import flash_claims
import numpy as np
import processes
import pytest
import report
from attention_peers import has_standard, xla
from attention_rows import MAIN_ROWS, ROWS, Row, document_lengths, parse_row

SMALL = [
    parse_row("B=1 T=64 N=2 K=1 H=32 causal"),
    parse_row("B=2 T=64 N=2 H=32 causal lengths"),
    parse_row("B=2 T=64 N=2 H=32 segments"),
]


def test_rows_have_labels_of_their_own():
    assert len({row.label for row in ROWS}) == len(ROWS)
    assert all(row.B * row.T == 16384 and row.N * row.H == 2048 for row in MAIN_ROWS)


def test_flops_count_visible_pairs():
    assert Row("x", B=2, T=8, S=16, N=3, H=4).flops == 4 * 4 * 3 * 2 * 8 * 16
    window = Row("x", B=1, T=64, N=1, H=1, causal=True, window=16)
    query, key = np.arange(64)[:, None], np.arange(64)
    assert window.flops == 4 * ((key <= query) & (key > query - 16)).sum()
    for row in SMALL[1:]:
        lengths = document_lengths(row)
        assert (lengths >= 1).all()
        assert row.visible == (lengths.astype(float) ** 2).sum() / (2 if row.causal else 1)
    sparse = Row("x", B=1, T=512, N=1, H=1, density=0.5)
    assert sparse.flops == 4 * 512 * 512 / 2
    assert sparse.block_mask == Row("y", B=2, T=512, N=3, H=1, density=0.5).block_mask
    assert (document_lengths(SMALL[2]).sum(axis=1) == 64).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("B=1 T=2 N=3", "H must be given"),
        ("B=1 T=2 N=3 H=4 D=5", "'D=5' is none of"),
        ("", "'' is none of"),
        ("B=1 T=2 N=32 K=5 H=4", "N must be a multiple of K"),
        ("B=1 T=2 N=3 H=300", "H must be at most 256"),
        ("B=² T=2 N=3 H=4", "'B=²' is none of"),
    ],
)
def test_a_wrong_shape_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        parse_row(text)


def measured(monkeypatch, times: list[float]) -> dict:
    """The result of one process for each of `times`, ours and Tokamax computed by XLA; no cuDNN."""
    clock = iter(())
    monkeypatch.setattr(
        attention_worker, "milliseconds", lambda call, inputs, runs: (call(*inputs), next(clock))[1]
    )
    for peer in ("jaxattn", "tokamax"):
        monkeypatch.setitem(attention_worker.PEERS, peer, xla)
    rows = SMALL[::2]
    compiled = attention_worker.compile_all(rows, ["jaxattn", "cudnn", "tokamax"])
    results = []
    for turn, taken in enumerate(times):
        # Ours takes `taken`, the peer 2: forward, then forward + backward, in the order of this turn.
        order = ["jaxattn", "cudnn", "tokamax"]
        order = [peer for peer in order[turn:] + order[:turn] if peer != "cudnn"]
        clock = iter([taken if peer == "jaxattn" else 2.0 for peer in order * 2] * len(rows))
        figures = [attention_worker.measure_row(row, compiled[row], turn) for row in rows]
        results.append({"matmul_tflops": [800.0, 810.0], "rows": figures, "timing_seconds": 1.0})
    return attention_tables.combine(rows, results)


def test_figures_are_medians_over_processes(monkeypatch, tmp_path):
    result = measured(monkeypatch, [1.0, 4.0, 1.6])
    row = result["rows"][0]
    assert row["peers"]["jaxattn"]["forward_ms"] == [1.0, 4.0, 1.6]
    assert row["peers"]["jaxattn"]["forward_tflops"] == pytest.approx(SMALL[0].flops / 1.6e9)
    assert row["ratio_to_best_peer"]["forward_backward"] == pytest.approx(2 / 1.6)
    assert "cuDNN" in row["peers"]["cudnn"]["forward_error"]
    assert result["means"]["forward, all rows, over the best peer"] == pytest.approx(2 / 1.6)
    assert result["matmul_8192_tflops"] == 805
    result = json.loads(json.dumps({**report.environment(), "seconds": {}, **result}))
    for as_table in (report.table, report.markdown):
        text = attention_tables.text(result, as_table)
        assert "ahead" in text
        assert "cuDNN is not detected" in text
    assert attention_tables.measured_peers(result["rows"]) == ["jaxattn", "tokamax"]  # no cuDNN on a CPU
    attention_tables.plot(result, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_every_row_has_its_place_in_the_tables(tmp_path):
    times = {"forward_ms": 1.0, "forward_backward_ms": 3.5}
    peers = {"jaxattn": times, "cudnn": times, "xla": {"forward_error": "too large"}}
    rows = [{"label": row.label, "peers": peers} for row in ROWS]
    result = attention_tables.combine(ROWS, [{"matmul_tflops": [800.0], "rows": rows}, {"failure": "died"}])
    text = attention_tables.text({**report.environment(), "seconds": {}, **result}, report.table)
    assert all(row.label in text for row in ROWS)
    assert "forward, over FlashAttention-4 (recorded)" in text
    assert "1.0: 1.00, 0.5: 0.50, 0.25: 0.25" in text  # at equal times the rate falls with the density
    attention_tables.plot({**report.environment(), **result}, str(tmp_path / "plot.png"))


def test_two_percent_is_a_tie():
    assert [attention_tables.verdict(x) for x in (1.03, 1.015, 0.985, 0.97, None)] == [
        "ahead",
        "tie",
        "tie",
        "behind",
        "",
    ]


def test_rows_are_selected_by_section_and_label():
    options = types.SimpleNamespace(shape=None, quick=False, only_claims=False, rows="window|H=192|H=72")
    assert {row.section for row in flash_attention.select(options)} == {"window", "uneven"}
    options.rows = "no such row"
    with pytest.raises(ValueError, match="matches none of"):
        flash_attention.select(options)
    options.rows, options.quick = None, True
    assert flash_attention.select(options) == MAIN_ROWS
    options.shape = ["B=1 T=2 N=3 H=4"]
    assert flash_attention.select(options) == [parse_row("B=1 T=2 N=3 H=4")]


def test_standard_attention_is_measured_where_its_logits_fit():
    assert {row.section for row in ROWS if has_standard(row)} == {"main", "float32"}
    lengths = {(row.H, row.T) for row in MAIN_ROWS if has_standard(row)}
    assert lengths == {(64, 1024), (128, 1024), (128, 4096), (256, 4096)}


WORKER = """
import json, os, sys, time
job = json.loads(input())
row = lambda label, **peers: print('@part', json.dumps({'row': {'label': label, 'peers': peers}}), flush=True)
mode = {MODES}[job['turn']]
if mode == 'dies': os._exit(3)
print('a library chats')
print('@compiled', json.dumps({'seconds': 1.5, 'device': 'toy', 'num_devices': 1}), flush=True)
input()
print('@part', json.dumps({'matmul_tflops': 800.0}), flush=True)
labels = [' '.join(name) for name in LABELS]
row(labels[0], jaxattn={'forward_ms': 1.0}, cudnn={'forward_ms': 2.0})
if mode == 'hangs': time.sleep(1000)
row(labels[1], jaxattn={'forward_ms': 1.0}, cudnn={'forward_ms': 2.0})
row(labels[0], xla={'forward_ms': 9.0})
print('@done', json.dumps({'timing_seconds': 1.0}), flush=True)
"""


def run_workers(monkeypatch, tmp_path, modes: list[str], *arguments: str) -> tuple[int, dict]:
    """flash_attention.py with processes that compute nothing, one a turn."""
    labels = [row.label.split(" ") for row in SMALL]
    script = tmp_path / "attention_worker.py"
    script.write_text(WORKER.replace("{MODES}", repr(modes)).replace("LABELS", repr(labels)))
    monkeypatch.setattr(processes, "HERE", tmp_path)
    monkeypatch.setattr(flash_attention, "PART_SECONDS", 1.0)
    monkeypatch.setattr(flash_attention.os, "sched_getaffinity", lambda process: {0})
    monkeypatch.setattr(flash_attention, "select", lambda options: SMALL)
    monkeypatch.setattr(report, "begin_processes", lambda what: None)
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["x", "--out", str(out), "--processes", str(len(modes)), *arguments])
    code = flash_attention.main()
    return code, json.loads(out.read_text()) if out.exists() else {}


def test_a_process_that_hangs_or_dies_costs_only_what_it_had_not_said(monkeypatch, tmp_path, capsys):
    code, result = run_workers(monkeypatch, tmp_path, ["whole", "hangs", "dies"], "--no-claims")
    assert code == 1
    first, second = result["rows"]
    assert first["peers"]["jaxattn"]["forward_ms"] == [1.0, 1.0]
    assert first["peers"]["xla"]["forward_ms"] == [9.0]
    assert second["peers"]["jaxattn"]["forward_ms"] == [1.0]
    assert list(result["not_measured"]) == [SMALL[2].label]
    assert result["matmul_8192_tflops"] == 800
    assert result["device"] == "toy"
    failures = [process.get("failure", "") for process in result["processes"]]
    assert failures[0] == ""
    assert failures[1].startswith("killed: measuring, after 2 parts")
    assert failures[2] == "compiling, it ended with exit code 3"
    assert "1 rows:" in capsys.readouterr().out


def test_what_the_budget_does_not_reach_is_said(monkeypatch, tmp_path):
    start = time.monotonic()
    code, result = run_workers(monkeypatch, tmp_path, ["hangs", "whole"], "--no-claims", "--max-seconds", "2")
    assert time.monotonic() - start < 10
    assert code == 1
    measured = {row["label"] for row in result["rows"]}
    assert set(result["not_measured"]) == {row.label for row in SMALL} - measured
    assert result["processes"][1].get("failure", processes.NO_TIME) == processes.NO_TIME


def test_a_call_that_is_not_compiled_in_time_has_no_figure(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(attention_worker, "compile_call", lambda *call: released.wait())
    compiled = attention_worker.compile_all(SMALL[:1], ["jaxattn"], seconds=0.1)
    released.set()
    assert compiled[SMALL[0]]["jaxattn", "forward"] == "not compiled within 0 s"


@pytest.mark.parametrize("square", [0, 96])
def test_the_longest_sequence_fits_and_the_next_does_not(monkeypatch, square):
    needs = lambda length: 1_000_000 + 40_000 * length + square * length**2
    monkeypatch.setattr(flash_claims, "compile_call", lambda name, metric, length, quickly: length)
    monkeypatch.setattr(flash_claims, "call_bytes", needs)
    found = flash_claims.longest("jaxattn", "forward")["T"]
    assert needs(found) <= flash_claims.LIMIT_BYTES < needs(found + flash_claims.GRAIN)


@pytest.mark.parametrize(("most", "ran"), [(10**9, 100_096), (95_000, 93_952), (60_000, 57_856), (0, None)])
def test_the_longest_that_runs_is_found_in_few_attempts(monkeypatch, capsys, most, ran):
    tried = []

    def attempt(name, metric, length):
        tried.append(length)
        return 1.5 if length <= most else "out of memory"

    monkeypatch.setattr(flash_claims, "attempt", attempt)
    limit = {"name": "jaxattn", "metric": "forward", "T": 100_096, "bytes": 16}
    found = flash_claims.verify(limit)
    assert found.get("ran_T") == ran
    assert found.get("failure", "out of memory") == "out of memory"
    assert ran is None or ran <= most < found.get("failed_T", 10**10) < ran + 0.04 * 100_096 or ran == 100_096
    assert len(tried) == capsys.readouterr().out.count("@part") <= 5
    claims = flash_claims.collect([{"trying": 1}, {"longest": found}])
    said = flash_claims.text(claims, report.table).splitlines()[-1]
    assert said.endswith(f"100,096 (ran at {ran:,})" if ran else "100,096 (out of memory)")


def test_claims_are_published_beside_the_rows(monkeypatch, tmp_path, capsys):
    calls = [
        {"name": name, "metric": metric, "T": length, "ms": length * 1e-3, "temp_bytes": 1000 * length}
        for name in (flash_claims.OURS, flash_claims.STANDARD)
        for metric in flash_claims.METRICS
        for length in flash_claims.LENGTHS
    ]
    limit = {"name": "jaxattn", "metric": "forward", "T": 1024, "bytes": 9, "ran_T": 768}
    claims = flash_claims.collect([*({"call": call} for call in calls), {"longest": limit}])
    monkeypatch.setattr(flash_attention, "measure_claims", lambda deadline, keep: claims)
    out, plot = tmp_path / "a.json", tmp_path / "a.png"
    monkeypatch.setattr(report, "begin_processes", lambda what: None)
    monkeypatch.setattr(
        "sys.argv", ["x", "--only-claims", "--out", str(out), "--plot", str(plot), "--markdown"]
    )
    assert flash_attention.main() == 0
    assert "| 512 | 0.512 | 0.512 | 1 |" in capsys.readouterr().out
    assert not out.exists()
    assert json.loads((tmp_path / "a_claims.json").read_text())["longest"] == [limit]
    assert (tmp_path / "a_claims.png").stat().st_size > 10_000
    monkeypatch.setattr("sys.argv", ["x", "--plot-from", str(out)])
    flash_attention.main()
    assert "forward, jaxattn: 1,024 (ran at 768)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "("], "--rows: '(' is no regular expression"),
        (["--max-seconds", "-1"], "--max-seconds: must be at least 0, got -1"),
        (["--max-seconds", "nan"], "--max-seconds: must be at least 0, got nan"),
        (["--max-seconds", "x"], "--max-seconds: invalid seconds value: 'x'"),
        (["--shape", "B=1 T=2 N=3 H=300"], "--shape: H must be at most 256"),
    ],
)
def test_a_wrong_command_line_is_said(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["x", *arguments])
    with pytest.raises(SystemExit, match="2"):
        flash_attention.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_no_gpu_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x"])
    monkeypatch.setattr(report.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        flash_attention.main()
    assert capsys.readouterr().err.count("\n") == 1
