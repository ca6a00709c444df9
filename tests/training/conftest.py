"""A model and a text small enough that a step takes milliseconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training import TrainConfig

DOCUMENTS = {
    "a.txt": "the cat sat on the mat and looked at the dog. " * 12,
    "b.txt": "a dog saw the cat on the mat; the dog sat down. " * 9,
    "c.txt": "nobody knows what the cat and the dog thought, ever. " * 10,
    "d.txt": "the mat was red. the dog was brown. the cat was grey. " * 8,
}


def write_documents(folder: Path) -> Path:
    for name, text in DOCUMENTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text"))


def make_tiny_config(text_folder: Path, run_dir: Path, **changes: dict[str, Any]) -> TrainConfig:
    tree: dict[str, dict[str, Any]] = {
        "data": {"text": str(text_folder), "sequence_length": 16, "validation_fraction": 0.25},
        "model": {"num_layers": 1, "embed_dim": 16, "num_heads": 2},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"warmup_steps": 2},
        "run": {"dir": str(run_dir), "num_steps": 10, "batch_size": 4, "log_every": 1, "tensorboard": False},
        "eval": {"num_batches": 2},
        "sample": {"num_tokens": 0},
    }
    for section, settings in changes.items():
        tree[section] |= settings
    return TrainConfig.from_dict(tree)


@pytest.fixture
def tiny_config(tmp_path: Path, text_folder: Path) -> Callable[..., TrainConfig]:
    """tiny_config(run={"num_steps": 3}, ...): a config whose sections are changed by keywords."""
    return lambda **changes: make_tiny_config(text_folder, tmp_path / "run", **changes)
