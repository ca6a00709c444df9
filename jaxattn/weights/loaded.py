"""What every reader of weights returns."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What the files say about generating."""

    eos_token_ids: tuple[int, ...] = ()  # each of them ends a sequence


class LoadedModel(NamedTuple):
    """A model ready to run: `loaded.model(tokens, positions, attention)`."""

    model: Any  # a flax.nnx module; model.config describes it
    tokenizer: Tokenizer | None  # None where the folder has none
    generation: GenerationDefaults


def cast_arrays(tree: Any, dtype: Any) -> Any:
    """Host arrays in `dtype` (None: as they are), floating-point ones only; cast before they reach a
    device."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
