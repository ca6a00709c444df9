"""Trains language models: `from training import Trainer, TrainConfig, load_recipe, prepare`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.config import ConfigError, TrainConfig, load_recipe
    from training.data import DataError, prepare
    from training.trainer import Trainer, TrainResult

__all__ = ["ConfigError", "DataError", "TrainConfig", "TrainResult", "Trainer", "load_recipe", "prepare"]

_HOMES = {
    "ConfigError": "training.config",
    "TrainConfig": "training.config",
    "load_recipe": "training.config",
    "DataError": "training.data",
    "prepare": "training.data",
    "Trainer": "training.trainer",
    "TrainResult": "training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'training' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
