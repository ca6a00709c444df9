"""The benchmarks of prefill and of page writes on a CPU: tiny calls by the references, figures and tables."""

import json
import types

import in_processes
import jax.numpy as jnp
import page_write_peers
import page_writes
import paged_prefill
import prefill_peers
import programs
import pytest
import report
import row_worker
from prefill_peers import CUDNN, DECODE, DENSE, INVARIANT, ONE_CALL, PAGE_16, PREFILL

TINY = ("tiny", 4, 2, 16)
WRITES = ("tiny", 2, 16)


@pytest.fixture
def on_cpu(monkeypatch):
    """The references in place of kernels, a clock in place of CUPTI, one set of inputs, all alike."""
    monkeypatch.setattr(prefill_peers, "KERNELS", "reference")
    monkeypatch.setitem(page_write_peers.IMPLEMENTATIONS, page_write_peers.OURS, "reference")
    monkeypatch.setattr(programs, "milliseconds", programs.elapsed_milliseconds)
    monkeypatch.setattr(programs, "MAX_SETS", 1)
    monkeypatch.setattr(programs, "_random", lambda key, shape: jnp.ones(shape.shape, shape.dtype))


def run(monkeypatch, tmp_path, module, peers, sections) -> dict:
    """main() with all rows measured in this process."""

    def measure(peers_name, chosen, names_of, figures_of, options):
        assert peers_name == peers.__name__
        rows = [row for rows in chosen.values() for row in rows]
        worker = types.SimpleNamespace(parts=[{"fact": 1}], failure="", share=())
        monkeypatch.setattr(row_worker, "say", lambda word, part: worker.parts.append(part))
        names = [names_of(row) for row in rows]
        row_worker.measure_all(row_worker.compile_all(peers, rows, names, 100), options.iterations)
        figures = in_processes.combine(chosen, names_of, figures_of, [worker])
        return {"device": "a CPU", "failures": [], **figures}

    out = tmp_path / "out.json"
    monkeypatch.setattr(in_processes, "measure", measure)
    monkeypatch.setattr(report, "begin_processes", lambda what: None)
    monkeypatch.setattr(module, "SECTIONS", sections)
    monkeypatch.setattr("sys.argv", ["x", "--out", str(out), "--iterations", "1"])
    assert module.main() == 0
    return json.loads(out.read_text())


def test_prefill(monkeypatch, tmp_path, capsys, on_cpu):
    sections = {
        "Chunks": [
            paged_prefill.prompts(TINY, 2, 20)._replace(names=(PAGE_16, DENSE, CUDNN)),
            paged_prefill.prompts(TINY, 1, 5, 30)._replace(names=(PAGE_16, CUDNN)),
        ],
        paged_prefill.MIXED: [paged_prefill.mixed(TINY, (1, 9, 8), (3, 20))],
        paged_prefill.BATCH_INVARIANT: [
            paged_prefill.prompts(TINY, 1, 3, 30)._replace(names=(PAGE_16, INVARIANT))
        ],
    }
    result = run(monkeypatch, tmp_path, paged_prefill, prefill_peers, sections)
    whole, chunk = result["sections"]["Chunks"]
    assert whole["flops"] == 4 * 16 * 4 * 2 * 20 * 21 / 2
    assert chunk["flops"] == 4 * 16 * 4 * sum(range(31, 36))
    assert whole["tflops"][PAGE_16] == pytest.approx(whole["flops"] / whole["microseconds"][PAGE_16] / 1e6)
    times = whole["microseconds"]
    assert whole["share_of_dense"][PAGE_16] == pytest.approx(times[DENSE] / times[PAGE_16])
    (both,) = result["sections"][paged_prefill.MIXED]
    times = both["microseconds"]
    assert both["microseconds_apart"] == times[PREFILL] + times[DECODE]
    assert both["microseconds_ratio"] == pytest.approx(times[ONE_CALL] / (times[PREFILL] + times[DECODE]))
    (invariant,) = result["sections"][paged_prefill.BATCH_INVARIANT]
    assert set(invariant["microseconds"]) == {PAGE_16, INVARIANT}
    assert all(reason.startswith("cuDNN: ") for reason in result["no_figure"])
    assert chunk["share_of_dense"] == {PAGE_16: None}
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("a CPU: prefill at ")
    assert "one mixed call" in printed[-1]


def test_decodes_alone_are_held_to_a_decode_step():
    times = {ONE_CALL: 3.0, DECODE: 2.0}
    figures = paged_prefill.mixed_figures({"microseconds": times, "elapsed_us": {**times, ONE_CALL: None}})
    assert figures["microseconds_ratio"] == 1.5
    assert figures["elapsed_us_ratio"] is None
    assert paged_prefill.mixed(TINY, (0, 0, 0), (3, 20)).names == (ONE_CALL, DECODE)


def test_parts_of_a_mixed_batch():
    batch = paged_prefill.mixed(TINY, (2, 9, 8), (3, 20))
    assert batch.queries == (9, 9, 1, 1, 1)
    assert batch.lengths == (17, 17, 20, 20, 20)
    assert batch.part(is_decode=True).lengths == (20, 20, 20)
    assert batch.part(is_decode=False).queries == (9, 9)
    with pytest.raises(NotImplementedError, match="more than one query"):
        paged_prefill.mixed(TINY, (0, 0, 0), (3, 20)).part(is_decode=False)
    with pytest.raises(NotImplementedError, match="rows differ"):
        prefill_peers.dense(batch)


def test_page_writes(monkeypatch, tmp_path, capsys, on_cpu):
    Row = page_write_peers.Row
    sections = {
        "Writes of a prompt": [Row("write_kv", *WRITES, 40), Row("write_kv", *WRITES, 40, "int8")],
        "Writes of a decode step": [Row("write_kv", *WRITES, 3, whole_pages=False)],
        "Copies within the pool": [Row("copy_pages", *WRITES, 2, "int8", num_layers=2)],
        "Back": [Row(op, *WRITES, 2, num_layers=2) for op in ("gather_pages", "scatter_pages")],
    }
    result = run(monkeypatch, tmp_path, page_writes, page_write_peers, sections)
    assert result["no_figure"] == {}
    half, codes = result["sections"]["Writes of a prompt"]
    assert half["read_bytes"] == half["written_bytes"] == 2 * 40 * 2 * 16 * 2
    assert codes["written_bytes"] == 2 * 40 * 2 * (16 + 4)
    times, rates = codes["microseconds"], codes["tb_per_s"]
    assert rates["jaxattn"] == pytest.approx((5120 + 3200) / times["jaxattn"] / 1e6)
    assert rates["copy"] == pytest.approx((5120 + 2560) / times["copy"] / 1e6)
    assert codes["share_of_copy"] == pytest.approx(rates["jaxattn"] / rates["copy"])
    (moved,) = result["sections"]["Copies within the pool"]
    assert moved["read_bytes"] == moved["written_bytes"] == 2 * 2 * 2 * 16 * 2 * (16 + 4)
    assert "256 decode tokens in" in capsys.readouterr().out.splitlines()[-1]


def test_a_pool_that_is_copied_has_no_figure(on_cpu):
    row = page_write_peers.Row("write_kv", *WRITES, 40)
    program = page_write_peers.PEERS["jaxattn"](row)
    assert program.lower().state_bytes == 0
    reverse = lambda index, pool, *_: tuple(x[:, ::-1] for x in pool)
    lowered = program._replace(call=reverse, stays=True).lower()
    with pytest.raises(RuntimeError, match="temporary"):
        lowered.compile()


@pytest.mark.parametrize("module", [paged_prefill, page_writes])
@pytest.mark.parametrize("arguments", [["--rows", "("], ["--rows", "no such row"], ["--iterations", "0"]])
def test_wrong_arguments_are_exit_code_2(monkeypatch, capsys, module, arguments):
    monkeypatch.setattr("sys.argv", ["x", *arguments])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


def test_rows_are_chosen_and_have_labels_of_their_own(monkeypatch):
    for module in (paged_prefill, page_writes):
        labels = [row.label for rows in module.SECTIONS.values() for row in rows]
        assert len(set(labels)) == len(labels)
    monkeypatch.setattr("sys.argv", ["x", "--rows", "decode step.*int8"])
    ((row,),) = in_processes.parse(report.parser(""), page_writes.SECTIONS).sections.values()
    assert row.dtype == "int8"
