"""Lays out texts given in Python as rows for a model, like those of its task in training."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from diffusion_t5x.data.batch import Architecture, Batch
from diffusion_t5x.data.dataset import OfTexts
from diffusion_t5x.data.rows import LaidOut, RowLayout, check_rows, fill_batches
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.errors import UserError

_LEAST_ROOM = 64  # tokens of a row that has no set length; longer texts have twice as much, and so on


@dataclasses.dataclass(frozen=True)
class TextRows(OfTexts, LaidOut):
    """The layout of texts as rows. Replaces a `SeqioDataset` if texts are given and no task is read.

    Attributes:
      tokenizer: the model's vocabulary.
      task_feature_lengths: numbers of tokens in `inputs` and `targets`; a model without inputs has only `targets`.
      architecture: the model's architecture.
      canvas: pad targets to their length, as in training.
      inputs_end: inputs end in EOS. Targets always do.
      name: name in messages.
      batch_size: number of rows in a batch.
    """

    tokenizer: AnyVocabulary
    task_feature_lengths: Mapping[str, int]
    architecture: Architecture
    canvas: bool
    inputs_end: bool
    name: str = "the model"
    batch_size: int = 1

    def check_task(self) -> None:
        """Raises a UserError if a length is not positive."""
        check_rows(self.task_feature_lengths, self.batch_size, False, self.canvas)

    def vocabulary(self) -> AnyVocabulary:
        return self.tokenizer

    def adds_eos(self, feature: str) -> bool:
        """True if the texts of a feature end in EOS."""
        return feature == "targets" or self.inputs_end

    def batch(self, inputs: str, text: str, number: int) -> Batch:
        """Returns a batch of one row: the inputs, if the model takes any, and a whole text as the target.

        Args:
          inputs: the inputs that the text is written for.
          text: the target.
          number: the row's example id, which its random draws depend on.

        Raises:
          UserError: a text is longer than the model's rows.
        """
        features = {}
        for name, most in self.task_feature_lengths.items():
            eos = [self.tokenizer.eos_id] if self.adds_eos(name) else []
            tokens = [*self.tokenizer.encode(inputs if name == "inputs" else text), *eos]
            if len(tokens) > most:
                counted = ", EOS included" if eos else ""
                raise UserError(
                    f"The {name} of text {number} have {len(tokens)} tokens{counted}; {self.name} takes {most}. "
                    "Nothing is truncated: shorten them."
                )
            features[name] = np.array(tokens, np.int32)
        pad_id = self.tokenizer.pad_id
        layout = RowLayout(self.task_feature_lengths, self.architecture, self.canvas, pad_id)
        ((batch, _),) = fill_batches([(layout.row(layout.sequences(features)), None)], 1, pad_id)
        return batch.replace(example_ids=np.array([number], np.int32))


def room_for(num_tokens: int, most: int | None = None) -> int:
    """Returns the row length for a number of tokens: a power of two, at most `most`, so that few programs compile."""
    room = _LEAST_ROOM
    while room < num_tokens:
        room *= 2
    return room if most is None else min(room, most)
