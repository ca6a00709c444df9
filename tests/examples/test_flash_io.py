"""What flash_io.py reads from ncu."""

import flash_io
import pytest
import report


def kernel(name: str, *values: str) -> str:
    return ",".join(f'"{field}"' for field in ("0", f"flash_attention_{name}_mosaic_gpu_kernel", *values))


def test_kernels_are_summed_to_passes(monkeypatch):
    header = kernel("x", *flash_io.METRICS.values()).replace(
        "flash_attention_x_mosaic_gpu_kernel", "Kernel Name"
    )
    lines = ["==PROF== Connected", header, '"","","byte","Mbyte","byte","byte"']
    lines += [kernel("forward", "1,000", "2.5", "300", "4"), kernel("dq", "10", "1", "1", "1")]
    lines += [kernel("dkv", "20", "1", "2", "3"), kernel("forward", "5", "0", "0", "0")]
    first, second = flash_io.parse_counts("\n".join(lines))
    assert first["forward"] == {"l2_to_sm": 1000, "sm_to_l2": 2.5e6, "dram_read": 300, "dram_write": 4}
    assert first["backward"] == {"l2_to_sm": 30, "sm_to_l2": 2e6, "dram_read": 3, "dram_write": 4}
    assert second["forward"]["l2_to_sm"] == 5

    monkeypatch.setattr(flash_io, "SHAPES", flash_io.SHAPES[:1])
    counted = {
        name: {m: 1.05 * b for m, b in f.items()} for name, f in flash_io.foretell(flash_io.SHAPES[0]).items()
    }
    rows = flash_io.compare([counted])
    assert [row["l2_to_sm_model_over_counted"] for row in rows] == pytest.approx([1 / 1.05] * 2)
    assert "0.952" in flash_io.text(rows, report.table)
