import numpy as np
import pytest

from jaxattn.models import GPT2Config, LlamaConfig, create_model, model_params
from training import flops
from training.data.batches import Batch, Rows, cut_rows
from training.metrics import MetricsLog, Row, plot_losses, read_rows


def test_rows_survive_the_file(tmp_path):
    rows = [
        Row(1, 0.5, 100, loss=2.25, bits_per_byte=3.5, gradient_norm=float("inf"), num_skipped=1),
        Row(1, 0.5, 100, validation_loss=2.5, validation_bits_per_byte=3.0),
        Row(2, 1.0, 200, loss=float("nan"), tokens_per_second=123456.0, mfu=0.25, learning_rate=1e-05),
    ]
    with MetricsLog(tmp_path, resume_step=0, tensorboard=False) as log:
        for row in rows:
            log.write(row)
    got = read_rows(tmp_path / "metrics.csv")
    assert repr(got) == repr(rows)  # NaN is not equal to itself
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8").startswith("step,seconds,num_tokens,loss,")


def test_resuming_drops_later_and_half_written_rows(tmp_path):
    with MetricsLog(tmp_path, resume_step=0, tensorboard=False) as log:
        for step in range(1, 9):
            log.write(Row(step, step * 1.0, step * 10, loss=1.0))
    with (tmp_path / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("3,9.0,9")
    with MetricsLog(tmp_path, resume_step=5, tensorboard=False) as log:
        assert [row.step for row in log.rows] == [1, 2, 3, 4, 5]
        log.write(Row(6, 6.5, 60, loss=0.5))
    assert [row.step for row in read_rows(tmp_path / "metrics.csv")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "rows", [[], [Row(1, 1.0, 1)], [Row(1, 1.0, 1, bits_per_byte=3.0), Row(2, 2.0, 2, bits_per_byte=2.0)]]
)
def test_any_rows_make_a_picture(tmp_path, rows):
    plot_losses(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_matmul_parameters_of_known_models():
    sizes = {"vocab_size": 100, "num_layers": 2, "embed_dim": 16, "num_heads": 2, "max_positions": 8}
    block = 16 * 48 + 16 * 16 + 2 * 16 * 64
    for config, expected in [
        (GPT2Config(**sizes), 2 * block + 1600),
        (GPT2Config(**sizes, tie_embeddings=False), 2 * block + 1600),
        (LlamaConfig(**sizes, num_kv_heads=1, mlp_dim=40), 2 * (16 * 32 + 16 * 16 + 3 * 16 * 40) + 1600),
    ]:
        assert flops.matmul_parameters(model_params(create_model(config)), config) == expected


def test_flops_count_the_pairs_that_attention_sees():
    config = GPT2Config(vocab_size=10, num_layers=3, embed_dim=16, num_heads=2, max_positions=8)
    stream = np.array([0, 1, 2, 0, 4, 5, 6, 7, 8], np.uint16)
    rows = Rows(np.array([0]), np.array([8]))
    packed = cut_rows(stream, rows, 8, 0, "packed")
    num_pairs = (1 + 2 + 3) + (1 + 2 + 3 + 4 + 5)
    assert flops.step_flops(packed, 1000, config) == 6 * 1000 * 8 + 12 * 3 * 16 * num_pairs
    whole = cut_rows(stream, rows, 8, 0, "stream")
    assert flops.step_flops(whole, 0, config) == 12 * 3 * 16 * (8 * 9 / 2)
    short = cut_rows(stream, Rows(np.array([0]), np.array([3])), 8, 0, "separate")
    assert flops.step_flops(short, 1000, config) == 6 * 1000 * 3 + 12 * 3 * 16 * (1 + 2 + 3)


class FakeDevice:
    def __init__(self, device_kind):
        self.device_kind = device_kind


def test_peaks():
    assert flops.peak_flops(FakeDevice("NVIDIA H200"), "bfloat16") == 989e12
    assert flops.peak_flops(FakeDevice("cpu"), "float32") is None
    for peaks in flops.PEAK_FLOPS.values():
        assert peaks["bfloat16"] > peaks["float32"] > 1e14


def test_gpt2_small_needs_what_the_literature_says():
    """6 FLOPs for each of 124M parameters and token, and half of 12 L N H T^2: no masked half."""
    config = GPT2Config.small()
    num_parameters = 124_439_808 - 1024 * 768
    tokens = np.broadcast_to(np.int32(1), (1, 1024))
    batch = Batch(tokens, tokens, np.arange(1024, dtype=np.int32)[None], None)
    want = 6 * num_parameters * 1024 + 12 * 12 * 768 * 1024 * 1025 / 2
    assert flops.step_flops(batch, num_parameters, config) == pytest.approx(want)
