"""Which variant of an op serves a call, and what is said of it."""

import logging
import types

import jax
import jax.numpy as jnp
import pytest

from jaxattn import dot_product_attention
from pallas_kernels import device, flash_attention, variants
from pallas_kernels.flash_attention.op import VARIANTS
from pallas_kernels.variants import Unsupported, choose
from tests.pallas_kernels.hopper import abstract_mesh

X = jnp.ones((1, 8, 2, 16), jnp.bfloat16)


def messages(caplog, name="pallas_kernels"):
    return [record.getMessage() for record in caplog.records if record.name == name]


def test_an_op_says_once_what_computes_it(caplog):
    variants.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for _ in range(2):
            flash_attention(X, X, X)
        flash_attention(X, X, X, implementation="reference")
    assert messages(caplog) == ["flash_attention on cpu is computed by 'reference': the first choice there"]


def test_an_op_says_why_its_first_choice_cannot(monkeypatch, caplog):
    variants.announce.cache_clear()
    monkeypatch.setitem(VARIANTS, "sm90", VARIANTS["sm90"]._replace(is_available=lambda: True))
    with caplog.at_level(logging.WARNING, logger="pallas_kernels"):
        for _ in range(2):
            flash_attention(X, X, X, scale=-1.0)
    (message,) = messages(caplog)
    assert "computed by 'reference': because 'sm90' cannot serve this call: it takes a positive" in message


@pytest.mark.parametrize("op", [flash_attention, dot_product_attention])
@pytest.mark.parametrize("wrap", [jax.jit, lambda function: function])
def test_a_variant_for_another_device_is_refused_by_name(op, wrap):
    message = "implementation='sm90' does not run on cpu, where flash_attention has 'reference'"
    with pytest.raises(Unsupported, match=message):
        wrap(lambda x: op(x, x, x, implementation="sm90"))(X)


def test_what_is_lowered_for_an_abstract_gpu_may_be_of_any_variant():
    attend = lambda x: flash_attention(x, x, x, implementation="sm90")
    with jax.sharding.use_abstract_mesh(abstract_mesh()):
        assert jax.eval_shape(attend, X).shape == X.shape


def test_no_variant_at_all_is_refused_with_all_reasons():
    refusing = VARIANTS["reference"]._replace(unsupported=lambda: "it never does")
    with pytest.raises(Unsupported, match="on cpu serves this call: 'one' cannot serve this call: it never"):
        choose("nothing", {"one": refusing}, None)


def test_the_default_device_is_the_one_that_was_chosen(monkeypatch):
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200")
    cpu = jax.devices("cpu")[0]
    monkeypatch.setattr(jax, "devices", lambda backend=None: [gpu if backend is None else cpu])
    assert device.is_hopper()
    with jax.default_device(cpu):
        assert not device.is_hopper()
        assert device.device_name() == cpu.device_kind
    with jax.default_device("cpu"):
        assert not device.is_hopper()
