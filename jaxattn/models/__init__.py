"""The models, by `model_type`. A new one is a file, a line in MODELS and a test."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.models import gpt2_hf, llama_hf
from jaxattn.models.config import GPT2Config, LlamaConfig, ModelConfig, RopeScaling
from jaxattn.models.gpt2 import GPT2
from jaxattn.models.llama import Llama
from jaxattn.models.mapping import HFMapping

__all__ = [
    "GPT2",
    "MODELS",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "ModelConfig",
    "ModelFamily",
    "RopeScaling",
    "cast",
    "config_from_dict",
    "create_model",
    "model_from_params",
    "model_params",
]


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    config: type[ModelConfig]
    module: Callable[..., Any]  # module(config, rngs=, dtype=) -> nnx.Module
    hf: HFMapping
    presets: Mapping[str, ModelConfig]


MODELS: dict[str, ModelFamily] = {
    "gpt2": ModelFamily(
        GPT2Config,
        GPT2,
        gpt2_hf.HF,
        {
            "small": GPT2Config.small(),
            "medium": GPT2Config.medium(),
            "large": GPT2Config.large(),
            "xl": GPT2Config.xl(),
        },
    ),
    "llama": ModelFamily(
        LlamaConfig,
        Llama,
        llama_hf.HF,
        {"smollm2-135m": LlamaConfig.smollm2_135m(), "1b": LlamaConfig(), "3-8b": LlamaConfig.llama3_8b()},
    ),
}


def _family(model_type: object) -> ModelFamily:
    family = MODELS.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ValueError(f"model_type={model_type!r}: must be one of {sorted(MODELS)}")
    return family


def config_from_dict(fields: Mapping[str, Any]) -> ModelConfig:
    """The config that `config.to_dict()` described; unknown model types and keys are ValueErrors."""
    return _family(fields.get("model_type")).config.from_dict(fields)


def create_model(config: ModelConfig, *, seed: int = 0, dtype: Any = jnp.float32) -> Any:
    """A freshly initialised model: weights N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 L)), biases
    0."""
    model = _family(config.model_type).module(config, rngs=nnx.Rngs(seed), dtype=jnp.float32)
    return model if dtype == jnp.float32 else nnx.merge(*_cast_split(model, dtype))


def _cast_split(model: nnx.Module, dtype: Any) -> tuple[Any, Any]:
    graphdef, params = nnx.split(model)
    return graphdef, cast(params, dtype)


def model_params(model: nnx.Module) -> dict[str, Any]:
    """The parameters as a nested dict of arrays with string keys: the form that checkpoints hold."""
    return _string_keys(nnx.to_pure_dict(nnx.state(model)))


def _string_keys(tree: Any) -> Any:
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def model_from_params(config: ModelConfig, params: Mapping[str, Any]) -> Any:
    """The model that holds `params`, a nested dict as `model_params` returns; nothing is initialised or
    copied.

    A missing, surplus or wrongly shaped parameter is a ValueError that names it.
    """
    module = _family(config.model_type).module
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    wanted = dict(nnx.to_flat_state(state))
    given = {_path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    names = {".".join(map(str, path)): path for path in wanted}
    if missing := sorted(names.keys() - given.keys()):
        raise ValueError(f"params: {len(missing)} missing for {config.model_type}, first {missing[:3]}")
    if surplus := sorted(given.keys() - names.keys()):
        raise ValueError(f"params: {len(surplus)} not known to {config.model_type}, first {surplus[:3]}")
    for name, path in names.items():
        shape = wanted[path].get_value().shape
        if given[name].shape != shape:
            raise ValueError(f"params: {name} has shape {given[name].shape}, the config asks for {shape}")
        wanted[path] = wanted[path].replace(jnp.asarray(given[name]))
    return nnx.merge(graphdef, nnx.from_flat_state(wanted.items()))


def _path_name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(part, "key", part)) for part in path)


def cast(state: Any, dtype: Any) -> Any:
    """A pytree with its floating-point leaves in `dtype`: the one place where precision is chosen."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
