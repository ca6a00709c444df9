"""What a model family says about its Hugging Face form: configs and tensors, both ways."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class HFMapping(NamedTuple):
    """`<family>_hf.py` defines one; arrays are NumPy's, in the files' own dtype, and only ever rearranged."""

    config_from_hf: Callable[[Mapping[str, Any]], Any]  # the dict of config.json -> config
    config_to_hf: Callable[[Any], dict[str, Any]]
    params_from_hf: Callable[["Tensors", Any], dict[str, Any]]  # nested, as `models.model_params`
    params_to_hf: Callable[[Mapping[str, Any], Any], dict[str, np.ndarray]]


class Tensors:
    """The tensors of one model file by name, each read once; a wrong or missing one is an error that names
    it."""

    def __init__(self, names: list[str], read: Callable[[str], np.ndarray], source: str):
        self._left, self._read, self._source = set(names), read, source

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *shape: int) -> np.ndarray:
        if name not in self._left:
            raise ValueError(f"{self._source}: tensor {name!r} is missing")
        tensor = self._read(name)
        if tensor.shape != shape:
            raise ValueError(
                f"{self._source}: tensor {name!r} has shape {tensor.shape}, the config says {shape}"
            )
        self._left.remove(name)
        return tensor

    def skip(self, is_useless: Callable[[str], bool]) -> None:
        """Forgets tensors that carry nothing (stored masks, tied copies)."""
        self._left = {name for name in self._left if not is_useless(name)}

    def check_all_taken(self) -> None:
        if self._left:
            first = sorted(self._left)[:3]
            raise ValueError(
                f"{self._source}: {len(self._left)} tensors that the model does not have: {first}"
            )


def require(fields: Mapping[str, Any], name: str, allowed: tuple[Any, ...], default: Any) -> None:
    """Refuses a config.json whose model computes something that ours does not."""
    value = fields.get(name, default)
    if value not in allowed:
        raise ValueError(
            f"config.json: {name}={value!r} is not supported, only {' or '.join(map(repr, allowed))}"
        )


def read_field(fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise ValueError(f"config.json: {name!r} is missing")
    return fields[name]
