"""Quicker answers to what JAX asks as it lowers: those that it finds itself, whatever they are."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import mosaic_quick, paged_attention
from tests.pallas_kernels.hopper import abstract_mesh


def lower_decode() -> str:
    spec = jax.ShapeDtypeStruct
    query, pages = spec((3, 8, 64), jnp.bfloat16), spec((1, 9, 2, 16, 64), jnp.bfloat16)

    def attend(*arrays):
        return paged_attention(*arrays, implementation="sm90")

    arrays = query, pages, pages, spec((3, 4), jnp.int32), spec((3,), jnp.int32)
    with jax.sharding.use_abstract_mesh(abstract_mesh()):
        jax.clear_caches()
        return jax.jit(attend).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def answers_of_both(name, quick, answers):
    """quick, held to what JAX itself answers."""

    def answer(question):
        found = quick(question)
        assert in_any_order(found) == in_any_order(mosaic_quick.BY_JAX[name](question)), (name, question)
        answers.append((name, str(found)))
        return found

    return answer


def in_any_order(answer):
    """Of which variables are equal any order will do, if it is always the same."""
    return {k: set(v) for k, v in answer.items()} if isinstance(answer, dict) else answer


def test_quick_answers_are_those_of_jax(monkeypatch):
    answers: list[tuple[str, str]] = []
    compared = [(owner, name, answers_of_both(name, f, answers)) for owner, name, f in mosaic_quick.QUICK]
    monkeypatch.setattr(mosaic_quick, "QUICK", compared)
    assert "mosaic_gpu" in lower_decode()
    assert {name for name, _ in answers} == mosaic_quick.BY_JAX.keys()
    monkeypatch.undo()
    mosaic_quick.use_quick_answers()


@pytest.mark.parametrize("name", ["EQUALS", "VARIABLE", "LAYOUT", "TRANSFER", "INFER_ARCH"])
def test_a_jax_with_other_names_is_left_alone(monkeypatch, name):
    for owner, replaced, _ in mosaic_quick.QUICK:
        monkeypatch.setattr(owner, replaced, mosaic_quick.BY_JAX[replaced])
    monkeypatch.setattr(mosaic_quick, name, None)
    assert "mosaic_gpu" in lower_decode()
    assert all(
        getattr(owner, replaced) is mosaic_quick.BY_JAX[replaced] for owner, replaced, _ in mosaic_quick.QUICK
    )
