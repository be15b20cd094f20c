"""Endless training batches with an exact position. Imports TensorFlow: import it inside functions."""

import functools
import logging
import pathlib
import re
import tempfile
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.positioned import Positioned, unreadable
from diffusion_t5x.errors import UserError

logger = logging.getLogger(__name__)

_FILES = {"index": "position.index", "data": "position.data-00000-of-00001"}  # what a TensorFlow checkpoint is made of


class TrainIterator(Positioned):
    """Endless batches from TensorFlow; see `Positioned`.

    If the data pass through Python code (`tf.py_function`, `tf.numpy_function`, `from_generator`) or depend on random
    numbers without a seed, TensorFlow cannot save a position. The log says so once, usually at the first batch.
    """

    _is_tried = False

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
          UserError: a file disappeared or is broken, or there are no examples.
        """
        try:
            arrays = {name: array.numpy() for name, array in next(self._iterator).items()}
        except (tf.errors.NotFoundError, tf.errors.PermissionDeniedError, tf.errors.DataLossError) as error:
            raise unreadable(_plain(error)) from error
        except StopIteration:
            raise UserError(
                f"There is nothing to train on: {self._source} has no examples. Preprocessors may have "
                "dropped them all; or more processes read the data than there are examples: use fewer."
            ) from None
        if not self._is_tried:
            self._is_tried = True
            self.state_dict()
        return Batch(**arrays, example_ids=self._example_ids)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns the position as uint8 arrays, from which `load_state_dict` continues with the next batch.

        {} if it cannot be saved.
        """
        try:
            with tempfile.TemporaryDirectory() as folder:
                tf.train.Checkpoint(iterator=self._iterator).write(f"{folder}/position")
                files = {key: pathlib.Path(folder, file).read_bytes() for key, file in _FILES.items()}
        except (tf.errors.FailedPreconditionError, tf.errors.UnimplementedError) as error:
            _say_unsaved(_plain(error))
            return {}
        return self.state(**files)

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restores a position that `state_dict` returned; see `check_state`."""
        self.check_state(state)
        with tempfile.TemporaryDirectory() as folder:
            for key, file in _FILES.items():
                pathlib.Path(folder, file).write_bytes(bytes(state[key]))
            tf.train.Checkpoint(iterator=self._iterator).read(f"{folder}/position").assert_consumed()


@functools.cache
def _say_unsaved(reason: str) -> None:
    logger.info("the position in the training data cannot be saved (%s): examples may repeat after a resume", reason)


def _plain(error: tf.errors.OpError) -> str:
    """Returns TensorFlow's message without its internal names."""
    return re.sub(r"\{\{.*?\}\} | \[Op:.*", "", error.message).strip().rstrip(".")
