"""Checkpoints of a run: the parameters in jaxattn's own format, and beside them what only training needs.

`checkpoints/<step>/params` is what `jaxattn.load_model(run_dir)` reads; `checkpoints/<step>/train_state`
holds the optimizer's state and counters. Writing goes on while training does; a checkpoint counts once it is
whole.
"""

from pathlib import Path
from typing import Any, Self

import jax
import optax

from training.optimizer import OptimizerState
from training.step import TrainState

FOLDER = "checkpoints"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read."""


class Checkpoints:
    """The checkpoints of one run folder, newest kept."""

    def __init__(self, run_dir: Path, *, keep: int):
        import orbax.checkpoint as ocp  # imported only where it is used: 1 s

        self.ocp, self.folder = ocp, (run_dir / FOLDER).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        return self.manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts to write the state; returns once it is copied, so that the next step may overwrite it."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        save = self.ocp.args.StandardSave
        items = {name: save(item) for name, item in _items(state).items()}
        self.manager.save(step, args=self.ocp.args.Composite(**items))

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state of a step, with shapes, dtypes and shardings of `state`, bit for bit as it was saved."""
        restore = self.ocp.args.StandardRestore
        items = {name: restore(jax.tree.map(_abstract, item)) for name, item in _items(state).items()}
        try:
            read = self.manager.restore(step, args=self.ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore raise many kinds
            reason = str(error).strip().split("\n")[0][:200]
            raise CheckpointError(
                f"{self.folder / str(step)}: broken checkpoint ({type(error).__name__}: {reason}); "
                "remove that folder to go on from the one before"
            ) from error
        rest = read["train_state"]
        step_array, adam = rest.pop("step"), optax.ScaleByAdamState(**rest.pop("adam"))
        return TrainState(read["params"], OptimizerState(adam, **rest), step_array)

    def wait(self) -> None:
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def has_checkpoints(run_dir: Path) -> bool:
    folder = run_dir / FOLDER
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def _items(state: TrainState) -> dict[str, Any]:
    optimizer = state.optimizer._asdict()
    optimizer["adam"] = optimizer["adam"]._asdict()
    return {"params": state.params, "train_state": {"step": state.step, **optimizer}}


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
