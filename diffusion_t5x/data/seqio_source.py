"""Interface to SeqIO: tasks and mixtures by name, as batches of numpy arrays. TensorFlow is imported on first use."""

import dataclasses
import difflib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_t5x.data import fingerprints, scoring
from diffusion_t5x.data.batch import Architecture, Batch
from diffusion_t5x.data.dataset import OfTexts
from diffusion_t5x.data.fingerprints import Fingerprint
from diffusion_t5x.data.libraries import libraries, sources
from diffusion_t5x.data.rows import LaidOut, check_rows, fill_batches, rows_of_shard
from diffusion_t5x.data.truncation import CutCounter
from diffusion_t5x.data.vocabularies import difference, piece, signs, source_of
from diffusion_t5x.data.vocabulary import own
from diffusion_t5x.errors import UserError

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf

    from diffusion_t5x.data.feature_converters import RowConverter
    from diffusion_t5x.data.train_iterator import TrainIterator

FEATURES = ("inputs", "targets")


def _without_autotuning() -> "tf.data.Options":
    """Returns options without autotuning: freeing an autotuned iterator waits up to a minute for the tuning thread."""
    options = libraries()[1].data.Options()
    options.autotune.enabled = False
    return options


def _plain(value: Any) -> Any:
    """Converts numpy numbers and texts to Python's."""
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.decode("utf-8") if isinstance(value, bytes) else value


@dataclasses.dataclass(frozen=True)
class SeqioDataset(OfTexts, LaidOut):
    """A SeqIO task or mixture, read for a model. Construction does no work; methods import SeqIO.

    Attributes:
      mixture_or_task_name: the name registered with SeqIO; the module that registers it must have been imported.
      task_feature_lengths: numbers of tokens in `inputs` and `targets`; a task without inputs has only `targets`. SeqIO
        cuts longer features to their first tokens and EOS; `eval_batches` logs how many, and `count_cut` counts them in
        any split. A decoder-only model's rows have the length of both together.
      split: the split to read.
      batch_size: number of rows in the global batch, over all shards.
      shuffle: reshuffle training data each epoch. Evaluation never shuffles.
      seed: seed of the shuffling and of the preprocessors' random choices.
      pack: pack several examples into a training row, kept apart by `segment_ids`. Excludes `canvas`.
      canvas: pad every target to the targets' length with pad tokens that the model learns to write, too. This is how
        diffusion learns where to stop; without it targets end at their last token (EOS).
      use_cached: read the output of `seqio_cache_tasks`.
      architecture: the architecture of the model that reads the rows.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    split: str = "train"
    batch_size: int = 32
    shuffle: bool = True
    seed: int = 0
    pack: bool = False
    canvas: bool = True
    use_cached: bool = False
    architecture: Architecture = "decoder_only"

    @property
    def name(self) -> str:
        """Name of the task or mixture."""
        return self.mixture_or_task_name

    def check(self) -> None:
        """Checks all but the data, and the data too where they are files that Python reads.

        Raises:
          UserError: unknown task, split or feature; lengths or batch size that are missing or not positive; packing
            together with a canvas; inputs and targets with different vocabularies; a missing cache.
        """
        self.check_files()
        self._provider_with_split()
        self.check_task()

    def check_files(self) -> None:
        """Checks what `check` does as far as SeqIO need not be imported, which takes seconds."""
        check_rows(self.task_feature_lengths, self.batch_size, self.pack, self.canvas)
        if source := sources.get(self.name):
            self._check_split(source.splits)
            if self.use_cached:  # none of these has a step that SeqIO would cache behind
                raise self._uncacheable()
            source.check(self.split)

    def check_task(self) -> None:
        """Checks as `check` does, but the task may lack the split, and no data are read."""
        check_rows(self.task_feature_lengths, self.batch_size, self.pack, self.canvas)
        provider = self._provider()
        where = f"{self.mixture_or_task_name!r}"
        wanted = [name for name in FEATURES if name in provider.output_features]
        if "targets" not in wanted:
            raise UserError(f"{where} has no feature 'targets', only {', '.join(provider.output_features)}.")
        if set(self.task_feature_lengths) != set(wanted):
            raise UserError(
                f"TASK_FEATURE_LENGTHS must name the features of {where}, {' and '.join(wanted)}, but names "
                f"{' and '.join(self.task_feature_lengths) or 'none'}."
            )
        if self.architecture == "encoder_decoder" and "inputs" not in wanted:
            raise UserError(f"{where} has no inputs for the encoder: use a decoder-only model or another task.")
        vocabularies = [provider.output_features[name].vocabulary for name in wanted]
        if own(vocabularies[0]) != own(vocabularies[-1]):
            raise UserError(
                f"inputs and targets of {where} must share one vocabulary, as they share an embedding: "
                f"{difference(vocabularies[0], vocabularies[-1])}. Give both features the same one."
            )
        if self.use_cached:
            tasks = libraries()[0].get_subtasks(provider)
            if not any(task.supports_caching for task in tasks):
                raise self._uncacheable()
            for task in tasks:
                if task.supports_caching and not task.cache_dir:
                    raise UserError(
                        f"{task.name!r} is not cached: run seqio_cache_tasks and add its folder with "
                        "seqio.add_global_cache_dirs, or set USE_CACHED_TASKS = False."
                    )

    def _uncacheable(self) -> UserError:
        return UserError(
            f"SeqIO does not cache {self.name!r}, so USE_CACHED_TASKS = True would change nothing. Tokenize it once "
            "with the verb cache_tasks and read that (data/cached.gin), or set USE_CACHED_TASKS = False."
        )

    def splits(self) -> list[str]:
        """The splits of the task or mixture."""
        return sorted(self._provider().splits)

    def rates(self) -> dict[str, float]:
        """The tasks of a mixture that have the split, with their rates; a task has only itself."""
        provider = self._provider()
        if isinstance(provider, libraries()[0].Task):
            return {self.name: 1.0}
        return {task.name: provider.get_rate(task) for task in provider.tasks if self.split in task.splits}

    def vocabulary(self) -> "seqio.Vocabulary":
        """The vocabulary that turns targets into text."""
        return self._provider().output_features["targets"].vocabulary

    def adds_eos(self, feature: str) -> bool:
        """True if the texts of a feature end in EOS."""
        return self._provider().output_features[feature].add_eos

    def texts(self) -> dict[str, Any]:
        """The tokenization of texts, for a checkpoint's record: "vocabulary_source", "inputs_end" (True: in EOS)."""
        inputs_end = "inputs" in self.task_feature_lengths and self.adds_eos("inputs")
        return {"vocabulary_source": source_of(self.vocabulary()), "inputs_end": inputs_end}

    def piece(self, token: int) -> bytes:
        """Returns one token as UTF-8 bytes, which may be only part of a character; signs as in `cells`."""
        sign = signs(self.vocabulary()).get(token)
        return sign.encode() if sign else piece(self.vocabulary(), token)

    @property
    def has_metrics(self) -> bool:
        """True for a task that scores decoded text; mixtures do not."""
        provider = self._provider()
        return isinstance(provider, libraries()[0].Task) and bool(provider.predict_metric_fns)

    def check_scoring(self) -> None:
        """Raises a UserError if `score` would: this is a mixture, or a metric cannot run on this machine."""
        scoring.check_metrics(self._task().predict_metric_fns)

    def score(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Returns the task's metrics of predictions.

        Args:
          records: the dictionaries of `eval_batches`, each with a "prediction" (text) and, if there are several
            samples, "predictions" (see `scoring.score`).

        Raises:
          UserError: this is a mixture: metrics belong to tasks.
        """
        return scoring.score(self._task(), records)

    def postprocessed(self, text: str, example: Mapping[str, Any]) -> tuple[Any, Any]:
        """Returns the target of an example (a dictionary of `eval_batches`) and a text as the task's metrics take them.

        Raises:
          UserError: this is a mixture: postprocessors belong to tasks.
        """
        target, (prediction,) = scoring.postprocessed(self._task(), example, [text])
        return target, prediction

    def train_iterator(self, num_shards: int = 1, shard_index: int = 0) -> "TrainIterator":
        """Returns endless batches of `batch_size / num_shards` rows with examples of this shard only.

        `example_ids` are the rows' indices in the global batch, in which the shards' rows follow one another.

        Raises:
          UserError: as `check`, or the shards do not divide the batch.
        """
        self.check()
        example_ids = rows_of_shard(self.batch_size, num_shards, shard_index)
        libraries()
        from diffusion_t5x.data.train_iterator import TrainIterator

        ds = self._read(None, num_shards, shard_index, self.shuffle)
        ds = self._converter(self.pack)(ds, self._sequence_length())
        # Left alone, TensorFlow makes steps below the repeat run ahead. One that has seen the end of an epoch when the
        # position is saved forgets the state of that epoch's shuffling: the next epoch would come in another order.
        options = _without_autotuning()
        options.experimental_optimization.map_parallelization = False
        options.experimental_optimization.inject_prefetch = False
        # Each parallel step reads ahead by as many documents as there are threads (else 16), all of them in a position.
        options.threading.private_threadpool_size = min(os.cpu_count() or 1, 16)
        ds = ds.batch(len(example_ids), drop_remainder=True).prefetch(2).with_options(options)
        ordered = dataclasses.replace(self, task_feature_lengths=dict(sorted(self.task_feature_lengths.items())))
        source = f"{ordered}, shard {shard_index} of {num_shards}"
        return TrainIterator(ds, example_ids, source, self.fingerprint())

    def fingerprint(self) -> Fingerprint:
        """Returns a fingerprint of the files that the split is read from, as far as the sources name them."""
        seqio, files = libraries()[0], []
        for task in seqio.get_subtasks(self._provider_with_split()):
            source = getattr(task.source, "_original_source", task.source)  # what shots are taken from
            if self.split in task.splits and hasattr(source, "list_files"):
                files += source.list_files(self.split)
            elif self.split in task.splits and isinstance(source, seqio.FileDataSource):
                files += source.list_shards(self.split)
        return fingerprints.of_files(files)

    def eval_batches(self, num_examples: int | None = None) -> Iterator[tuple[Batch, list[dict[str, Any]]]]:
        """Yields one pass in the data's own order, one example per row, whatever `shuffle` and `pack` say.

        A mixture is mixed at its rates until the first of its tasks ends.

        Args:
          num_examples: take only the first `num_examples`; None takes all.

        Yields:
          Batches whose `example_ids` are the examples' indices in the evaluation set, the last one filled up with
          empty rows (`segment_ids` 0) whose ids go on; and for each example, in the rows' order, a dictionary:
          `example_id`, `inputs_pretokenized`, `targets_pretokenized` (text; decoded from the tokens if the task
          keeps none) and all other fields of the task's examples.

        Raises:
          UserError: as `check`.
        """
        self.check()
        _, tf = libraries()
        converter = self._converter(pack=False)
        examples = (
            self._eval_dataset(num_examples)
            .map(lambda x: (converter.convert_example(x, self._sequence_length()), x), tf.data.AUTOTUNE)
            .prefetch(self.batch_size)
            .with_options(_without_autotuning())
            .as_numpy_iterator()
        )
        examples = self._cut_counter().watch(examples, f"{self.name}, split {self.split}")
        return (
            (batch, [self._describe(i, x) for i, x in zip(batch.example_ids.tolist(), group, strict=False)])
            for batch, group in fill_batches(examples, self.batch_size, self.vocabulary().pad_id)
        )

    def eval_examples(self, num_examples: int | None = None) -> Iterator[dict[str, Any]]:
        """Yields the dictionaries of `eval_batches`, without rows; features without a length are not truncated."""
        self._provider_with_split()
        examples = self._eval_dataset(num_examples).with_options(_without_autotuning()).as_numpy_iterator()
        return (self._describe(number, example) for number, example in enumerate(examples))

    def num_eval_examples(self, num_examples: int | None = None) -> int:
        """Returns the number of examples of `eval_batches`, by reading them."""
        self.check()
        return int(self._eval_dataset(num_examples).reduce(0, lambda count, _: count + 1))

    def tokenized_examples(
        self, num_epochs: int = 1, num_shards: int = 1, shard_index: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields a shard's training examples unshuffled and before row layout: `inputs` and `targets`, int32, cut.

        Args:
          num_epochs: number of passes over the data, each with new random choices of the preprocessors.
          num_shards: number of parts in which the data are read.
          shard_index: index of the part.
        """
        names = list(self.task_feature_lengths)
        ds = self._read(num_epochs, num_shards, shard_index).map(lambda x: {name: x[name] for name in names})
        return ds.with_options(_without_autotuning()).as_numpy_iterator()

    def count_cut(self, num_examples: int) -> CutCounter:
        """Counts features that are too long among the first `num_examples` examples, in shuffled order if `shuffle`."""
        self.check()
        counter = self._cut_counter()
        for example in self._eval_dataset(num_examples, self.shuffle).as_numpy_iterator():
            counter.add(example)
        return counter

    def _cut_counter(self) -> CutCounter:
        return CutCounter(self._sequence_length(), self._provider().output_features)

    def _eval_dataset(self, num_examples: int | None, shuffle: bool = False) -> "tf.data.Dataset":
        ds = self._read(shuffle=shuffle)
        return ds if num_examples is None else ds.take(num_examples)

    def _read(
        self, num_epochs: int | None = 1, num_shards: int = 1, shard_index: int = 0, shuffle: bool = False
    ) -> "tf.data.Dataset":
        return self._provider().get_dataset(
            sequence_length=self._sequence_length(),
            split=self.split,
            use_cached=self.use_cached,
            shuffle=shuffle,
            seed=self.seed,
            shard_info=libraries()[0].ShardInfo(index=shard_index, num_shards=num_shards),
            num_epochs=num_epochs,
            try_in_mem_cache=False,  # the cache would become part of every checkpoint
        )

    def _sequence_length(self) -> dict[str, int]:
        """Returns the number of tokens that features are cut to."""
        return dict(self.task_feature_lengths)

    def _describe(self, example_id: int, example: dict[str, Any]) -> dict[str, Any]:
        described: dict[str, Any] = {"example_id": example_id}
        for name in FEATURES:
            described[f"{name}_pretokenized"] = self.to_text(example[name].tolist() if name in example else [])
        for name, value in example.items():
            if name not in FEATURES:
                described[name] = _plain(value)
        return described

    def _task(self) -> "seqio.Task":
        task = self._provider()
        if not isinstance(task, libraries()[0].Task):
            raise UserError(f"Metrics belong to tasks, and {self.name!r} is a mixture: evaluate its tasks one by one.")
        return task

    def _provider(self) -> "seqio.Task | seqio.Mixture":
        seqio, _ = libraries()
        name = self.mixture_or_task_name
        known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"registered are: {', '.join(sorted(known))}."
            raise UserError(
                f"No SeqIO task or mixture is called {name!r}: {hint} "
                "The module that registers it must be imported: name it in a gin file (import my.tasks)."
            )
        return seqio.get_mixture_or_task(name)

    def _provider_with_split(self) -> "seqio.Task | seqio.Mixture":
        provider = self._provider()
        self._check_split(provider.splits)
        return provider

    def _check_split(self, splits: Collection[str]) -> None:
        if self.split not in splits:
            hint = f' HELD_OUT = {{"{self.split}": 1.0}} takes 1 % of "train" for it, in a task over your own files.'
            raise UserError(
                f"{self.mixture_or_task_name!r} has no split {self.split!r}, only {', '.join(sorted(splits))}."
                f"{hint if 'train' in splits else ''}"
            )

    def _converter(self, pack: bool) -> "RowConverter":
        from diffusion_t5x.data import feature_converters

        converters = {
            "decoder_only": feature_converters.DecoderOnlyConverter,
            "encoder_decoder": feature_converters.EncoderDecoderConverter,
        }
        has_inputs = "inputs" in self.task_feature_lengths
        pad_id = self.vocabulary().pad_id
        return converters[self.architecture](has_inputs, pack=pack, canvas=self.canvas, pad_id=pad_id)
