"""The sweep of flash configs and the cache it fills, with a clock of our own in the place of a GPU."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import FlashConfig, flash_attention, tune
from pallas_kernels.flash_attention import tuned

ARGUMENTS = ["--batch", "1", "--heads", "2/1", "--head-dim", "64", "--length", "64", "--causal"]
SHAPE = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
KV_SHAPE = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jaxattn" / "flash_configs.json"


@pytest.fixture
def gpu(monkeypatch):
    """A Hopper GPU that computes the reference, is fastest at 2 stages of 64 keys, and has its limits."""
    reference = jax.jit(functools.partial(flash_attention, implementation="reference", is_causal=True))

    def compile_call(call, config, backward):
        if config.stages == 4:
            raise ValueError("4 stages take too much shared memory")
        wrong = 1.5 if config.tile_kv == 192 else 1.0  # the fastest of all, but not right
        run = lambda query, key, value, out_grad: reference(query, key, value) * wrong
        run.config = config
        return run

    def microseconds(compiled, arrays, iterations):
        config = compiled.config
        return 1.0 if config.tile_kv == 192 else 100.0 + abs(config.stages - 2) + abs(config.tile_kv - 64)

    monkeypatch.setattr(tune.device, "is_hopper", lambda: True)
    monkeypatch.setattr(tune, "compile_call", compile_call)
    monkeypatch.setattr(tune, "microseconds", microseconds)
    monkeypatch.setattr(tune, "OPTIONS", {"tile_kv": (64, 128, 192), "stages": (1, 2, 3, 4)})


def test_no_gpu_is_one_line_and_exit_code_2(capsys):
    assert tune.main(ARGUMENTS) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Hopper" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--heads", "3/2"], "--heads must be N or N/K"),
        (["--heads", "x"], "--heads must be N or N/K"),
        (["--heads", "²"], "--heads must be N or N/K"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--head-dim", "300"], "--head-dim must lie in 1..256, got 300"),
        (["--value-dim", "0"], "--value-dim must lie in 1..256, got 0"),
        (["--window", "-3"], "--window must be at least 0, got -3"),
        (["--soft-cap", "-3"], "--soft-cap must be positive and finite, got -3"),
        (["--soft-cap", "inf"], "--soft-cap must be positive and finite, got inf"),
        (["--seconds", "-1"], "--seconds must be at least 0, got -1"),
        (["--seconds", "nan"], "--seconds must be at least 0, got nan"),
        (["--show", "-1"], "--show must be at least 1, got -1"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(change, message, capsys):
    with pytest.raises(SystemExit) as exit_code:
        tune.main(ARGUMENTS + change)
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err


def test_the_fastest_right_config_is_saved_and_found(gpu, cache, capsys):
    assert pallas_kernels.tuned_config(SHAPE, KV_SHAPE, is_causal=True) is None
    assert tune.main([*ARGUMENTS, "--save"]) == 0
    out = capsys.readouterr().out
    assert "computes something else" in out or "shared memory" in out
    found = pallas_kernels.tuned_config(SHAPE, KV_SHAPE, is_causal=True)
    assert (found.tile_kv, found.stages) == (64, 2)
    assert str(cache) in out
    assert pallas_kernels.tuned_config(SHAPE, KV_SHAPE) is None  # of another mask nothing is known
    half, kv_half = (jax.ShapeDtypeStruct(shape.shape, jnp.float16) for shape in (SHAPE, KV_SHAPE))
    assert pallas_kernels.tuned_config(half, kv_half, is_causal=True) is None


def test_nothing_is_saved_unasked(gpu, cache):
    assert tune.main(ARGUMENTS) == 0
    assert not cache.exists()


def test_configs_go_through_json_whole():
    config = tuned.config_from_dict(json.loads(json.dumps(dataclasses.asdict(FlashConfig(stages=3)))))
    assert config == FlashConfig(stages=3)
    with pytest.raises(ValueError, match="has no field tiles"):
        tuned.config_from_dict({"tiles": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile_kv": 72}, "tile_kv must be one of .* got 72"),
        ({"stages": 9}, "stages must lie in 1..8, got 9"),
        ({"stages": 1.5}, "stages must lie in 1..8, got 1.5"),
        ({"stages": True}, "stages must lie in 1..8, got True"),
        ({"q_stages": True}, "q_stages must be one of .* got True"),
        ({"dkv_passes": True}, "dkv_passes must be one of .* got True"),
        ({"value_stages": 0}, "value_stages must lie in 1..8, got 0"),
        ({"warpgroups": 4}, "warpgroups must be one of .* got 4"),
        ({"q_stages": 0}, "q_stages must be one of .* got 0"),
        ({"q_stages": 3}, "q_stages must be one of .* got 3"),
        ({"dkv_passes": 5}, "dkv_passes must be one of .* got 5"),
        ({"overlap": "x"}, "overlap must be a bool, got 'x'"),
        ({"dq": "x"}, "dq must be a GradientConfig, got 'x'"),
        ({"fused": "x"}, "fused must be a FusedConfig, got 'x'"),
        ({"warpgroups": 3}, "ping_pong takes two warpgroups, got warpgroups=3"),
        # It would come to no end: the second tile of V waits for the first, and the other way round.
        ({"overlap": True, "stages": 1}, "overlap takes two tiles of V, got stages=1, value_stages=None"),
        ({"overlap": True, "value_stages": 1}, "overlap takes two tiles of V, got stages=2, value_stages=1"),
    ],
)
def test_a_config_that_cannot_be_says_what_can(fields, message):
    with pytest.raises(ValueError, match=message):
        FlashConfig(**fields)


def test_a_config_of_another_version_is_ignored_with_a_warning(cache, caplog):
    name = tuned.shape_class(
        SHAPE,
        KV_SHAPE,
        KV_SHAPE,
        is_causal=True,
        local_window_size=None,
        logits_soft_cap=None,
        deterministic=False,
    )
    tuned.save_config(name, FlashConfig(), {})
    entries = json.loads(cache.read_text())
    (entry,) = next(iter(next(iter(entries.values())).values())).values()
    entry["config"]["tiles"] = 7
    cache.write_text(json.dumps(entries))
    assert tuned.tuned_config(SHAPE, KV_SHAPE, is_causal=True) is None
    assert "has no field tiles" in caplog.text
    cache.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        tuned.tuned_config(SHAPE, KV_SHAPE)


def test_every_candidate_is_valid_and_the_first_is_the_default():
    for group in [(), ("dq",)]:
        configs = tune.candidates(FlashConfig(), group)
        assert configs[0] == FlashConfig()
        assert len(set(configs)) == len(configs) > 10
