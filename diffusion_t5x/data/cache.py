"""The folders of tokenized examples that `cache_tasks` writes, and their descriptions. Free of TensorFlow.

    CACHE_DIR/<task>/<split>/examples.array_record-00000-of-00004 ...
    CACHE_DIR/<task>/<split>/info.json
    CACHE_DIR/<mixture>/<split>/info.json

A record is one example: msgpack of its features, arrays of unsigned integers. info.json is written last, so a split
without it was not finished. A mixture's info.json has only the rates of its tasks, which are cached next to it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import serialization

from diffusion_t5x import records
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """Contents of one file of the cache.

    Attributes:
      num_examples: number of records.
      sha256: SHA-256 of the concatenated records.
    """

    num_examples: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class CachedTask:
    """A split of a task in a cache: info.json.

    Attributes:
      name: name of the task.
      split: the split of the task.
      task_feature_lengths: the lengths that features were truncated to and that preprocessors used.
      vocabulary: the vocabulary of the token ids.
      seed: seed of the preprocessors' random choices.
      num_epochs: number of passes over the data.
      num_shards: number of parts in which the data were read, one file each.
      shards: the files, in order.
      versions: versions of the libraries that wrote it.
      texts: how its texts were tokenized, see `SeqioDataset.texts`; empty in caches of older versions.
    """

    name: str
    split: str
    task_feature_lengths: Mapping[str, int]
    vocabulary: TokenIds
    seed: int
    num_epochs: int
    num_shards: int
    shards: tuple[Shard, ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CachedMixture:
    """A split of a mixture in a cache: info.json.

    Attributes:
      name: name of the mixture.
      split: the split of the mixture.
      rates: rates of the tasks, by name.
    """

    name: str
    split: str
    rates: Mapping[str, float]


Info = CachedTask | CachedMixture


def folder(cache_dir: str, name: str, split: str) -> pathlib.Path:
    """Returns the folder of a split of a task or mixture."""
    return pathlib.Path(cache_dir).expanduser() / name / split


def shard_file(where: pathlib.Path, index: int, num_shards: int) -> pathlib.Path:
    """Returns the file of a shard in the folder `where`."""
    return where / f"examples.array_record-{index:05d}-of-{num_shards:05d}"


def to_record(example: Mapping[str, np.ndarray], vocabulary_size: int) -> bytes:
    """Returns an example's record: its features in the smallest unsigned integers that fit the vocabulary."""
    dtype = np.min_scalar_type(vocabulary_size - 1)
    return serialization.msgpack_serialize({name: tokens.astype(dtype) for name, tokens in example.items()})


def from_record(record: bytes) -> dict[str, np.ndarray]:
    """Returns the features in a record."""
    return serialization.msgpack_restore(record)


def write_info(where: pathlib.Path, info: Info) -> None:
    """Writes info.json to the folder `where`, which finishes the split."""
    records.write_json(where / "info.json", {"format": FORMAT} | dataclasses.asdict(info))


def read_info(where: pathlib.Path) -> Info | None:
    """Returns the info.json of the cache in folder `where`; None if there is no cache, not even an unfinished one.

    Raises:
      UserError: the cache was not finished or has another format, or its info.json is damaged.
    """
    path = where / "info.json"
    if not path.is_file():
        if where.is_dir() and any(where.iterdir()):
            raise UserError(f"The cache in {where} was not finished: run cache_tasks again, which starts over.")
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (version := values.pop("format")) != FORMAT:
            raise UserError(f"{path} is of format {version}, but this version reads {FORMAT}: run cache_tasks again.")
        if "rates" in values:
            return CachedMixture(**values)
        ids = values["vocabulary"]
        ids |= {"noise_ranges": tuple(map(tuple, ids["noise_ranges"])), "end_ids": tuple(ids.get("end_ids", ()))}
        values["vocabulary"] = TokenIds(**ids)
        values["shards"] = tuple(Shard(**shard) for shard in values["shards"])
        return CachedTask(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete {where} and run cache_tasks again.") from error


def is_done(where: pathlib.Path, info: Info) -> bool:
    """True if the folder `where` has what `info` (without shards) asks for.

    Raises:
      UserError: it has something else.
    """
    if not (where / "info.json").exists() or (found := read_info(where)) is None:
        return False
    wanted, there = _settings(info), _settings(found)
    if differences := [f"{key} {there.get(key)}, not {wanted[key]}" for key in wanted if there.get(key) != wanted[key]]:
        raise UserError(
            f"{where} has a cache made with different settings: {'; '.join(differences)}. Nothing is overwritten: give "
            "another CACHE_DIR, or delete that folder."
        )
    return True


def _settings(info: Info) -> dict[str, Any]:
    """Returns the settings from which a cache is made; of its vocabulary, the contents and not the path."""
    values = dataclasses.asdict(info)
    return {name: value for name, value in values.items() if name not in ("shards", "versions", "texts")}


def find(cache_dir: str, name: str, split: str) -> list[tuple[CachedTask, float]]:
    """Returns the cached tasks of a mixture, or of a task (itself), each with its rate.

    Raises:
      UserError: there is no such cache; or as `read_info`.
    """
    info = read_info(folder(cache_dir, name, split))
    if info is None:
        root = pathlib.Path(cache_dir).expanduser()
        there = sorted(str(path.parent.relative_to(root)) for path in root.glob("*/*/info.json"))
        raise UserError(
            f"{cache_dir} has no cache of {name}/{split}{', only ' + ', '.join(there) if there else ''}: make it with "
            "python -m diffusion_t5x.cache_tasks, or correct CACHE_DIR."
        )
    if isinstance(info, CachedTask):
        return [(info, 1.0)]
    return [(task, rate) for name, rate in info.rates.items() for task, _ in find(cache_dir, name, split)]
