"""The decode benchmark without a GPU: what it counts, what it writes; one failure costs one figure."""

import argparse
import json
from typing import NamedTuple

import decode_peers
import jax.numpy as jnp
import numpy as np
import paged_attention
import pytest
from decode_peers import PEERS, Row

ROW = Row("tiny", 4, 2, 64, (40, 1, 64))


def test_rows_have_labels_of_their_own_and_count_their_bytes():
    labels = [row.label for rows in paged_attention.SECTIONS.values() for row in rows]
    assert len(set(labels)) == len(labels)
    assert set(paged_attention.NAMES) <= set(PEERS)
    assert ROW.cache_bytes == 2 * 105 * 2 * 64 * 2
    assert ROW._replace(dtype="int8").cache_bytes == 2 * 105 * 2 * (64 + 4)
    large = Row("large", 8, 2, 64, (8192,))
    assert large.num_caches * large.cache_bytes >= 4 * decode_peers.L2_BYTES
    assert ROW.num_caches == decode_peers.MAX_CACHES


def test_every_row_has_pages_of_its_own():
    tables = PEERS["page 16"](ROW).arrays[-2]
    used = np.concatenate([tables[0, :3], tables[1, :1], tables[2]])
    assert sorted(used) == [*range(1, 9)]
    assert not tables[0, 3:].any()
    assert not tables[1, 1:].any()


def test_arrays_are_filled_in_their_dtypes():
    program = PEERS["page 8"](Row("tiny", 2, 1, 8, (16,), dtype="int8"))
    query, k_pages, v_pages, scales, tables, lengths = program._filled()
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

    def microseconds(self, iterations):
        if self.fails == "run":
            raise NotImplementedError("out of memory")
        return 100.0


def test_a_failure_costs_its_own_figure(monkeypatch, tmp_path, capsys):
    fakes = {"page 16": Fake(), "contiguous": Fake("run"), "cuDNN contiguous": Fake("compile")}
    monkeypatch.setattr(paged_attention, "PEERS", {name: lambda row, x=x: x for name, x in fakes.items()})
    monkeypatch.setattr(paged_attention, "read_ceiling", lambda iterations: 4.0)
    rows = [ROW, Row("tiny", 4, 2, 64, (64,) * 8)]
    result = {"device": "none", **paged_attention.measure({"Small": rows}, list(fakes), 1)}
    result = json.loads(json.dumps(result))
    first = result["sections"]["Small"][0]
    assert first["microseconds"] == {"page 16": 100.0, "contiguous": None, "cuDNN contiguous": None}
    assert first["tokens_per_s"]["page 16"] == 3 / 100e-6
    assert first["tb_per_s"]["page 16"] == pytest.approx(ROW.cache_bytes / 100e-6 / 1e12)
    assert "out of memory" in capsys.readouterr().err
    text = paged_attention.tables(result)
    assert "page 16" in text
    assert "cuDNN" not in text
    paged_attention.plot(result, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_shapes_come_from_the_command_line():
    options = argparse.Namespace(heads="8/2", head_dim=64, rows=[1, 3], context=100, dtype="int8")
    (rows,) = paged_attention.chosen_sections(options).values()
    assert rows[1] == Row("heads", 8, 2, 64, (100, 100, 100), dtype="int8")
    options.heads = None
    assert paged_attention.chosen_sections(options) is paged_attention.SECTIONS
