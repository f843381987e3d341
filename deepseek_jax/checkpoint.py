"""Saving and restoring a train state as nested dicts of arrays, with Orbax.

A checkpoint holds names, shapes and numbers: it depends on no module class and on no mesh.
"""

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from deepseek_jax.config import Run
from deepseek_jax.training import TrainState, abstract_state, state_shardings


class Checkpoints:
    """The checkpoints of a run: written in the background, the last `keep` of them kept.

    A checkpoint gets its final name only when it is complete; nothing else is ever restored. What
    a killed process left half written is removed, unless `keep` is None: then the folder is only
    read, and another process may be writing to it.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int | None = 3):
        self.directory = Path(directory).resolve()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=keep is not None,
                cleanup_tmp_directories=keep is not None,
                enable_async_checkpointing=True,
            ),
        )

    @property
    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Begins to write the state after `step` steps; waits for the one being written before.

        Raises:
          OSError: a checkpoint, this one or the one before, could not be written.
        """
        # The copy is made now: the train step donates the state it is given.
        tree = jax.tree.map(lambda x: x.copy(), as_tree(state))
        self._or_os_error(step, lambda: self._manager.save(step, args=ocp.args.StandardSave(tree)))

    def wait(self) -> None:
        """Returns when everything is on disk; raises OSError when it cannot be."""
        self._or_os_error(None, self._manager.wait_until_finished)

    def close(self) -> None:
        self._manager.close()

    def restore(
        self, run: Run, mesh: jax.sharding.Mesh | None = None, *, step: int | None = None
    ) -> TrainState:
        """The state of `step` (the last complete one by default), placed for `run` and `mesh`.

        Raises:
          ValueError: there is none, or it is damaged, or its arrays are not those of `run`.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise ValueError(f"no complete checkpoint in {self.directory}")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(
                f"no complete checkpoint of step {step} in {self.directory}: use one of "
                f"{', '.join(map(str, steps))}"
            )
        target = as_tree(_target(run, mesh))
        with _silent_tasks():
            try:
                tree = self._manager.restore(step, args=ocp.args.StandardRestore(target))
                return TrainState(**{"ema": None, **tree})
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"checkpoint {self.directory / str(step)} cannot be restored; it is damaged or of "
            f"another configuration: remove it to go on from an earlier one ({reason})"
        )

    def _or_os_error(self, step: int | None, write) -> None:
        try:
            write()
        except Exception as error:
            which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            reason = " ".join(str(error).split())[:200]
            raise OSError(
                f"{which} could not be written to {self.directory}; free space there and resume "
                f"from the last complete one ({reason})"
            ) from error


@contextlib.contextmanager
def _silent_tasks() -> Iterator[None]:
    """Keeps Orbax's reading tasks from printing their errors, one for each array, when they die.

    The first of them is raised; the others would bury it.
    """
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    disabled = logger.disabled
    logger.disabled, sys.unraisablehook = True, lambda unraisable: None
    try:
        yield
        gc.collect()
    finally:
        logger.disabled, sys.unraisablehook = disabled, hook


def as_tree(state: TrainState) -> dict[str, Any]:
    """The state as nested dicts; what is absent is left out."""
    return {name: value for name, value in vars(state).items() if value is not None}


def _target(run: Run, mesh: jax.sharding.Mesh | None) -> TrainState:
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, abstract_state(run))
    else:
        shardings = state_shardings(run, mesh)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract_state(run),
        shardings,
    )
