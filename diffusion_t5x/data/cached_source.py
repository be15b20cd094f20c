"""Trains from the output of `cache_tasks`, read by Grain: global shuffle, exact positions, no TensorFlow."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epy

from diffusion_t5x.data import cache, fingerprints
from diffusion_t5x.data.batch import Architecture, Batch
from diffusion_t5x.data.cache import CachedTask
from diffusion_t5x.data.fingerprints import Fingerprint
from diffusion_t5x.data.positioned import Positioned, unreadable
from diffusion_t5x.data.rows import LaidOut, RowLayout, check_rows, fill_batches, rows_of_shard
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError

with epy.lazy_imports():  # takes a while, and mistakes are answered without it
    import grain

_OPEN_ROWS = 64  # rows that first-fit packing fills at the same time, and the most that are packed again on resuming


@dataclasses.dataclass(frozen=True)
class CachedDataset(LaidOut):
    """A cached SeqIO task or mixture. Tokens and rows are those of `seqio_source.SeqioDataset`.

    Differences: an epoch is shuffled as a whole and not in a buffer; all hosts together read an epoch before the next
    one begins; a mixture takes turns at its rates, without randomness; packing fills several rows at the same time, so
    fewer positions stay empty. For training and losses only; decoding and scoring read the task itself.

    Attributes:
      mixture_or_task_name: as given to `cache_tasks`.
      task_feature_lengths: numbers of tokens in `inputs` and `targets`; must match the cache's.
      cache_dir: as given to `cache_tasks`.
      split: the split to read.
      batch_size: number of rows in the global batch, over all shards.
      shuffle: reshuffle training data each epoch. Evaluation never shuffles.
      seed: seed of the shuffling. Preprocessors have made their random choices already.
      pack: pack several examples into a training row, kept apart by `segment_ids`. Excludes `canvas`.
      canvas: pad every target to the targets' length with pad tokens that the model learns to write, too.
      architecture: the architecture of the model that reads the rows.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    cache_dir: str = dataclasses.field(repr=False)  # it may be moved between a run and its resumption
    split: str = "train"
    batch_size: int = 32
    shuffle: bool = True
    seed: int = 0
    pack: bool = False
    canvas: bool = True
    architecture: Architecture = "decoder_only"

    @property
    def name(self) -> str:
        """Name of the task or mixture."""
        return self.mixture_or_task_name

    def check(self) -> None:
        """Checks everything that can be checked without reading data.

        Raises:
          UserError: the cache is missing, unfinished, damaged, empty or made for other lengths; tasks with different
            vocabularies; lengths or batch size that are not positive; packing together with a canvas; an encoder
            without inputs.
        """
        check_rows(self.task_feature_lengths, self.batch_size, self.pack, self.canvas)
        tasks = [task for task, _ in self._tasks()]
        for task in tasks:
            if task.task_feature_lengths != dict(self.task_feature_lengths):
                raise UserError(
                    f"The cache of {task.name}/{task.split} in {self.cache_dir} was made for TASK_FEATURE_LENGTHS "
                    f"{task.task_feature_lengths}, not {dict(self.task_feature_lengths)}: set those, or cache it again "
                    "in another CACHE_DIR."
                )
            if task.vocabulary != tasks[0].vocabulary:
                raise UserError(
                    f"{tasks[0].name} and {task.name} of the mixture {self.name!r} were cached with different "
                    "vocabularies: cache them with one."
                )
            self._open(task)
        if self.architecture == "encoder_decoder" and "inputs" not in self.task_feature_lengths:
            raise UserError(f"{self.name!r} has no inputs for the encoder: use a decoder-only model or another task.")

    def token_ids(self) -> TokenIds:
        """The vocabulary's special ids and size, for models, objectives and decoders."""
        return self._tasks()[0][0].vocabulary

    def texts(self) -> dict[str, Any]:
        """The same as `SeqioDataset.texts`, as `cache_tasks` found it; of a mixture, its first task's."""
        return dict(self._tasks()[0][0].texts)

    def train_iterator(self, num_shards: int = 1, shard_index: int = 0) -> "CachedIterator":
        """Returns endless batches of `batch_size / num_shards` rows: every `num_shards`-th example of the global order.

        `example_ids` are the rows' indices in the global batch, in which the shards' rows follow one another.

        Raises:
          UserError: as `check`, or the shards do not divide the batch.
        """
        self.check()
        example_ids = rows_of_shard(self.batch_size, num_shards, shard_index)
        layout = self._layout(self.token_ids().pad_id)
        examples = self._mix(endless=True)[shard_index::num_shards]
        sequences = examples.map(lambda record: layout.sequences(cache.from_record(record)))
        if self.pack:
            rows = grain.experimental.FirstFitPackIterDataset(
                sequences.to_iter_dataset(_read_options()),
                length_struct=layout.lengths,
                padding_struct=layout.fillers,
                num_packing_bins=_OPEN_ROWS,
                shuffle_bins=False,
            )
            batches = rows.map(layout.packed_row).batch(len(example_ids))
        else:
            batches = sequences.map(layout.row).batch(len(example_ids)).to_iter_dataset(_read_options())
        ordered = dataclasses.replace(self, task_feature_lengths=dict(sorted(self.task_feature_lengths.items())))
        contents = ", ".join(shard.sha256[:16] for task, _ in self._tasks() for shard in task.shards)
        source = f"{ordered} with contents {contents}, shard {shard_index} of {num_shards}"
        return CachedIterator(batches, example_ids, source, self.fingerprint())

    def fingerprint(self) -> Fingerprint:
        """Returns a fingerprint of the files that are read."""
        shards = (self._shard_files(task) for task, _ in self._tasks())
        return fingerprints.of_files([str(file) for files in shards for file in files])

    def _shard_files(self, task: CachedTask) -> list[pathlib.Path]:
        where = cache.folder(self.cache_dir, task.name, task.split)
        return [cache.shard_file(where, i, task.num_shards) for i in range(task.num_shards)]

    def eval_batches(self, num_examples: int | None = None) -> Iterator[tuple[Batch, list[dict[str, int]]]]:
        """Yields one pass in the cache's order, one example per row, whatever `shuffle` and `pack` say.

        A mixture takes turns at its rates until the first of its tasks ends. With `num_examples`, only the first so
        many are read.

        Yields:
          Batches like those of `SeqioDataset.eval_batches`, and the `example_id` of each example.

        Raises:
          UserError: as `check`.
        """
        self.check()
        pad_id = self.token_ids().pad_id
        layout = self._layout(pad_id)
        records = itertools.islice(self._mix(endless=False).to_iter_dataset(_read_options()), num_examples)
        rows = ((layout.row(layout.sequences(cache.from_record(record))), None) for record in records)
        return (
            (batch, [{"example_id": i} for i in batch.example_ids[: len(group)].tolist()])
            for batch, group in fill_batches(rows, self.batch_size, pad_id)
        )

    def _tasks(self) -> list[tuple[CachedTask, float]]:
        return cache.find(self.cache_dir, self.mixture_or_task_name, self.split)

    def _layout(self, pad_id: int) -> RowLayout:
        return RowLayout(self.task_feature_lengths, self.architecture, self.canvas, pad_id)

    def _open(self, task: CachedTask) -> "grain.sources.ArrayRecordDataSource":
        """Returns the records of a task.

        Raises:
          UserError: a file is missing or has unexpected contents; or there are no examples.
        """
        where = cache.folder(self.cache_dir, task.name, task.split)
        files = self._shard_files(task)
        wanted = sum(shard.num_examples for shard in task.shards)
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(f"The cache in {where} lacks {missing[0]}: delete the folder and run cache_tasks again.")
        try:
            source = grain.sources.ArrayRecordDataSource([str(file) for file in files])
            found = len(source)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{where} is damaged ({error}): delete the folder and run cache_tasks again.") from error
        if found != wanted:
            raise UserError(
                f"{where} holds {found} examples, but says {wanted}: delete the folder and run cache_tasks again."
            )
        if not found:
            raise UserError(f"{task.name}/{task.split} has no examples: take another split or task.")
        return source

    def _mix(self, endless: bool) -> "grain.MapDataset":
        """Returns the records in their global order; `endless` for training."""
        parts, rates = [], []
        for number, (task, rate) in enumerate(self._tasks()):
            part = grain.MapDataset.source(self._open(task))
            if endless and self.shuffle:
                # Grain shuffles an epoch by the seed plus its number: neighbouring seeds would share orders.
                part = part.shuffle(seed=int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]))
            parts.append(part.repeat() if endless else part)
            rates.append(rate)
        return grain.MapDataset.mix(parts, rates) if len(parts) > 1 else parts[0]


def _read_options() -> "grain.ReadOptions":
    return grain.ReadOptions(num_threads=8, prefetch_buffer_size=16)  # Grain looks at the whole buffer each time


class CachedIterator(Positioned):
    """Endless batches from Grain; see `Positioned`."""

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
          UserError: a file disappeared or is broken.
        """
        try:
            arrays = next(self._iterator)
        except (RuntimeError, OSError) as error:  # what ArrayRecord raises
            raise unreadable(str(error)) from error
        return Batch(**arrays, example_ids=self._example_ids)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns the position as uint8 arrays, from which `load_state_dict` continues with the next batch."""
        return self.state(position=json.dumps(self._iterator.get_state()).encode())

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restores a position that `state_dict` returned, without reading the data before it; see `check_state`."""
        self.check_state(state)
        self._iterator.set_state(json.loads(bytes(state["position"])))
