"""Tokenize a SeqIO task or mixture once, into files that training reads without TensorFlow.

Each task's split becomes a folder of ArrayRecord files. Preprocessors run once, so their random choices are fixed. A
mixture is cached task by task, together with its rates.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.command_line import config
from diffusion_t5x.data import cache
from diffusion_t5x.data.cache import CachedMixture, CachedTask
from diffusion_t5x.data.cache_writer import CacheJob, write, write_with_beam
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError

logger = logging.getLogger(__name__)


def cache_tasks(
    *,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    cache_dir: str,
    splits: Sequence[str] | None = None,
    num_epochs: int = 1,
    num_shards: int = 1,
    seed: int = 0,
    beam_options: Sequence[str] | None = None,
    task_modules: Sequence[str] = (),
    dry_run: bool = False,
) -> None:
    """Caches the splits that are not cached yet.

    Args:
      mixture_or_task_name: as registered with SeqIO.
      task_feature_lengths: numbers of tokens in `inputs` and `targets`; a run that reads the cache must use the same.
      cache_dir: gets a folder for each task and each split of it.
      splits: the splits to cache; None takes all.
      num_epochs: passes over the data, each with new random choices of the preprocessors (span corruption's spans).
      num_shards: number of files per split. Each is made from its own part of the data, as if one of this many hosts
        read it.
      seed: seed of the preprocessors' random choices.
      beam_options: run as an Apache Beam pipeline with these options, as on Beam's command line. None does not use
        Beam.
      task_modules: modules that register the tasks, for Beam's workers.
      dry_run: check everything, print what would be written, and write nothing.

    Raises:
      UserError: before anything is written: an unknown task, split or feature, a bad number, or a cache made with other
        settings in the same place.
    """
    for name, number in {"num_epochs": num_epochs, "num_shards": num_shards}.items():
        if not isinstance(number, int) or number < 1:
            raise UserError(f"cache_tasks.{name} must be a positive integer: {number!r}.")
    whole = SeqioDataset(mixture_or_task_name, task_feature_lengths, canvas=False, seed=seed)
    lengths = dict(sorted(task_feature_lengths.items()))
    jobs, mixtures = [], []
    for split in whole.splits() if splits is None else splits:
        dataset = dataclasses.replace(whole, split=split)
        dataset.check()
        rates = dataset.rates()
        if list(rates) != [whole.name]:
            mixtures.append(CachedMixture(whole.name, split, rates))
        for name in rates:
            task = dataclasses.replace(dataset, mixture_or_task_name=name)
            made_by = (task.token_ids(), seed, num_epochs, num_shards)
            info = CachedTask(name, split, lengths, *made_by, texts=task.texts())
            jobs.append(CacheJob(task, cache.folder(cache_dir, name, split), info, tuple(task_modules)))

    missing = [job for job in jobs if not cache.is_done(job.folder, job.info)]
    unlisted = [x for x in mixtures if not cache.is_done(cache.folder(cache_dir, x.name, x.split), x)]
    for job in jobs:
        logger.info("%s %s", job.folder, "is to be written" if job in missing else "is there already")
    checkpoints.ensure_writable(cache_dir, dry_run)
    if dry_run:
        print(f"Would write {len(missing)} of {len(jobs)} splits of tasks. Nothing was written.")
        return
    if beam_options is None:
        write(missing)
    else:
        write_with_beam(missing, beam_options)
    for mixture in unlisted:
        cache.write_info(cache.folder(cache_dir, mixture.name, mixture.split), mixture)


if __name__ == "__main__":
    config.run(cache_tasks)
