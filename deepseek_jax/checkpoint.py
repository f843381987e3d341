"""Saving and restoring a train state as nested dicts of arrays, with Orbax.

A checkpoint holds names, shapes and numbers: it depends on no module class and on no mesh.
"""

import contextlib
import functools
import logging
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from deepseek_jax.config import Run
from deepseek_jax.training import TrainState, abstract_state, state_shardings

# Orbax begins another file when one has grown to this size.
LARGEST_FILE = 2**31


class Checkpoints:
    """The checkpoints of a run: written in the background, the last `keep` of them kept.

    A checkpoint gets its final name only when it is complete; nothing else is ever restored. What
    a killed process left half written is removed, unless `keep` is None: then the folder is only
    read, and another process may be writing to it.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int | None = 3):
        self.directory = Path(directory).resolve()
        _say_errors_once()
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
          ValueError: there is a later one already, which would stay the last.
        """
        if self.latest is not None and step <= self.latest:
            raise ValueError(
                f"{self.directory} holds a checkpoint of step {self.latest}, and step {step} is "
                "not after it: name another folder"
            )
        tree = jax.tree.map(_until_written, as_tree(state))

        def write():
            self._check_room(tree)
            self._manager.save(step, args=ocp.args.StandardSave(tree))

        self._or_os_error(step, write)

    def check_room(self, state: TrainState) -> None:
        """Raises OSError where there is no room for a checkpoint, before there is work to lose."""
        self._or_os_error(int(state.step), lambda: self._check_room(as_tree(state)))

    def wait(self) -> None:
        """Returns when everything is on disk; raises OSError when it cannot be."""
        self._or_os_error(None, self._manager.wait_until_finished)

    def close(self) -> None:
        # What could not be written has been raised by `save` or `wait`, or is not missed.
        with contextlib.suppress(Exception):
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
        try:
            tree = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"checkpoint {self.directory / str(step)} cannot be restored; it is damaged or of "
                f"another configuration: remove it to go on from an earlier one ({reason})"
            ) from error
        return TrainState(**{"ema": None, **tree})

    def _check_room(self, tree: Any) -> None:
        """Fails before anything is written where a file or the disk cannot become so large.

        In the midst of writing Orbax's threads would each print what befell them.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        with tempfile.TemporaryFile(dir=self.directory) as probe:
            os.ftruncate(probe.fileno(), min(size, LARGEST_FILE))
        free = shutil.disk_usage(self.directory).free
        if free < size:
            raise OSError(f"{size / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} are free")

    def _or_os_error(self, step: int | None, write) -> None:
        try:
            write()
        except Exception as error:
            which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            reason = " ".join(str(error).split())[:200]
            again = "resume from the last complete one" if self._manager.all_steps() else "resume"
            raise OSError(
                f"{which} could not be written to {self.directory}; free space there and {again} "
                f"({reason})"
            ) from error


@functools.cache
def _say_errors_once() -> None:
    """Keeps Orbax from printing errors that it raises too, or that follow from the one it raises.

    Its tasks, one for each array, print theirs whenever they die, even as the process ends.
    """
    before = sys.unraisablehook

    def hook(late, before=before):
        code = getattr(late.object, "cr_code", None)
        dropped = "Event loop is closed" in str(late.exc_value) or "orbax" in str(code)
        if not dropped:
            before(late)

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)
    # And the warning of a checkpoint that was being removed when a process was killed.
    logging.getLogger("absl").addFilter(
        lambda record: "orbax" not in record.pathname
        or record.levelno < logging.ERROR
        and "Metadata file does not exist" not in record.getMessage()
    )
    logging.getLogger("asyncio").addFilter(
        lambda record: "tensorstore" not in record.getMessage().lower()
        and "orbax" not in record.getMessage()
    )


def _until_written(x: Any) -> Any:
    """What keeps its numbers when the next step is given the state and writes over it.

    From an accelerator Orbax has them on the host when `save` returns; there a copy would need the
    state's memory once more. On a CPU it reads the array itself, in the background.
    """
    elsewhere = isinstance(x, jax.Array) and all(d.platform != "cpu" for d in x.devices())
    return x if elsewhere else x.copy()


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
