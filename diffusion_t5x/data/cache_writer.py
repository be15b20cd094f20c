"""Writes the cache of one task's split, shard by shard: in this process, or by Apache Beam's workers."""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import logging
import os
import pathlib
import uuid
from collections.abc import Iterable, Sequence

from array_record.python import array_record_module

from diffusion_t5x.data import cache
from diffusion_t5x.data.cache import CachedTask, Shard
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError

logger = logging.getLogger(__name__)
_PACKAGES = ("diffusion_t5x", "seqio", "t5", "tensorflow")


@dataclasses.dataclass(frozen=True)
class CacheJob:
    """A cache to write. Shards can be written in any order, repeatedly, and on any machine that sees the folder.

    Attributes:
      dataset: the task; only its `split`, `seed` and `task_feature_lengths` are used.
      folder: the folder to write to.
      info: the finished info.json, without its shards.
      task_modules: modules that register the task, for workers.
    """

    dataset: SeqioDataset
    folder: pathlib.Path
    info: CachedTask
    task_modules: tuple[str, ...] = ()

    def begin(self) -> None:
        """Makes the folder, or removes what an unfinished run left in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("examples.array_record-*"):
            leftover.unlink()

    def write_shard(self, index: int) -> tuple[int, Shard]:
        """Writes a shard's file; returns its index and its contents."""
        for module in self.task_modules:
            importlib.import_module(module)
        path = cache.shard_file(self.folder, index, self.info.num_shards)
        # A worker that is given up may still be writing when another one takes its place.
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        digest, count = hashlib.sha256(), 0
        # One record a group: each is read by itself, in any order.
        writer = array_record_module.ArrayRecordWriter(str(unfinished), "group_size:1")
        for example in self.dataset.tokenized_examples(self.info.num_epochs, self.info.num_shards, index):
            record = cache.to_record(example, self.info.vocabulary.size)
            writer.write(record)
            digest.update(record)
            count += 1
        writer.close()
        os.replace(unfinished, path)
        logger.info("wrote %s: %d examples", path, count)
        return index, Shard(count, digest.hexdigest())

    def finish(self, shards: Iterable[tuple[int, Shard]]) -> None:
        """Writes info.json, once all shards are written."""
        made = tuple(shard for _, shard in sorted(shards, key=lambda item: item[0]))
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        cache.write_info(self.folder, dataclasses.replace(self.info, shards=made, versions=versions))


def write(jobs: Sequence[CacheJob]) -> None:
    """Writes all shards, one after another."""
    for job in jobs:
        job.begin()
        job.finish(map(job.write_shard, range(job.info.num_shards)))


def write_with_beam(jobs: Sequence[CacheJob], options: Sequence[str]) -> None:
    """Writes all in one Apache Beam pipeline, each shard by a worker.

    Args:
      jobs: the caches to write; all workers must see their folders.
      options: the pipeline's options, as on Beam's command line: ["--runner=DirectRunner", ...].

    Raises:
      UserError: Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("BEAM_OPTIONS needs Apache Beam: pip install 'diffusion_t5x[beam]'.") from error
    for job in jobs:
        job.begin()
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        for job in jobs:
            name = f"{job.info.name}/{job.info.split}"
            _ = (
                pipeline
                | f"{name}: shards" >> beam.Create(range(job.info.num_shards), reshuffle=True)
                | f"{name}: write" >> beam.Map(job.write_shard)
                | f"{name}: all shards" >> beam.combiners.ToList()
                | f"{name}: finish" >> beam.Map(job.finish)
            )
