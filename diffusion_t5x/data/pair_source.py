"""Preference pairs from SeqIO tasks: a chosen and a rejected text for the same inputs in each row."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from diffusion_t5x.data.dataset import Dataset
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.vocabularies import difference
from diffusion_t5x.data.vocabulary import own
from diffusion_t5x.errors import UserError

if TYPE_CHECKING:
    from diffusion_t5x.data.feature_converters import RowConverter


@dataclasses.dataclass(frozen=True)
class PairDataset(SeqioDataset):
    """A task with a feature `rejected` besides `inputs` and `targets`, the chosen text; for decoder-only models.

    A row is twice as long as others: inputs and targets in its first half, inputs and rejected text in its second half,
    laid out alike. The rejected text has the length of the targets. Read as a `SeqioDataset`, the task has only the
    chosen texts, so the same name serves to fine-tune and to decode.
    """

    @property
    def row_length(self) -> int:
        """Number of positions in a row, of both texts."""
        return 2 * super().row_length

    def check_task(self) -> None:
        super().check_task()
        features = self._provider().output_features
        if "rejected" not in features or "inputs" not in features:
            raise UserError(
                f"{self.name!r} has no pairs: it needs the features 'inputs', 'targets' and 'rejected', but has "
                f"{', '.join(features)}. Set MIXTURE_OR_TASK_NAME to a task such as that of tasks/local_pairs.gin."
            )
        if self.pack or self.architecture != "decoder_only":
            raise UserError("Preference pairs need decoder-only rows of one pair each: set pack = False.")
        if own(features["targets"].vocabulary) != own(features["rejected"].vocabulary):
            what = difference(features["targets"].vocabulary, features["rejected"].vocabulary)
            raise UserError(f"targets and rejected of {self.name!r} must share one vocabulary: {what}.")

    def _sequence_length(self) -> dict[str, int]:
        return super()._sequence_length() | {"rejected": self.task_feature_lengths["targets"]}

    def _converter(self, pack: bool) -> "RowConverter":
        from diffusion_t5x.data.feature_converters import PairConverter

        return PairConverter(canvas=self.canvas, pad_id=self.vocabulary().pad_id)


def check_pairs(objective_name: str, reads_pairs: bool, datasets: Iterable[Dataset]) -> None:
    """Raises a UserError if rows are pairs for an objective that reads texts, or the other way round."""
    for dataset in datasets:
        if isinstance(dataset, PairDataset) != reads_pairs:
            wanted = "pairs, which a PairDataset" if reads_pairs else "single texts, which a SeqioDataset"
            raise UserError(
                f"{objective_name} reads {wanted} has, but {dataset.name} is read by a {type(dataset).__name__}. "
                "runs/prefer.gin belongs together with objectives/preferences.gin."
            )
