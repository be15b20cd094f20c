"""results.json: scores, and everything needed to repeat them."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.checkpointing.record import describe as describe_in_full
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.metrics import bleu_signature
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.records import write_json

_PACKAGES = ("diffusion_t5x", "jax", "flax", "seqio", "tensorflow", "sacrebleu")
_NO_MATTER = ("batch_size", "scan_unroll")  # settings that results do not depend on


def describe(settings: Any) -> Any:
    """Returns settings as a JSON-serialisable dict, see `record.describe`; classes without their modules."""
    return describe_in_full(settings, lambda cls: cls.__name__)


def fingerprint(records: Iterable[Mapping[str, Any]]) -> str:
    """Returns a hash of the records' inputs and targets, in order: equal hashes mean the same examples."""
    digest = hashlib.sha256()
    for record in records:
        texts = [record.get(f"{side}_pretokenized") for side in ("inputs", "targets")]
        digest.update(json.dumps(texts).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def provenance(scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Returns versions of the packages that computed the scores, and sacrebleu's signature if there is a BLEU score."""
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}
    has_bleu = any("bleu" in metrics for metrics in scores.values())
    return {"versions": versions} | ({"bleu_signature": bleu_signature()} if has_bleu else {})


def report(
    scores: Mapping[str, Mapping[str, float]],
    checkpoint: OpenCheckpoint,
    definition: ModelDefinition,
    evaluations: Sequence[str],
    settings: Mapping[str, Any],
    data: Mapping[str, str],
) -> dict[str, Any]:
    """Returns the contents of results.json for an evaluation of a checkpoint.

    Args:
      scores: metrics by task.
      checkpoint: the evaluated checkpoint.
      definition: its model.
      evaluations: the evaluations, as text.
      settings: see `describe`.
      data: fingerprints by task.
    """
    return {
        "results": scores,
        "checkpoint": str(checkpoint),
        "step": checkpoint.metadata["step"],
        "evaluations": evaluations,
        "settings": settings,
        "data": data,
        "training_objective": checkpoint.record.trained_by,
        "num_parameters": definition.num_params(),
        "vocabulary": definition.vocabulary.describe(),
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        **provenance(scores),
    }


def is_done(folder: pathlib.Path, checkpoint: str | None, settings: Mapping[str, Any]) -> bool:
    """True if the folder has the results of this checkpoint with these settings (as `describe` returns them).

    Raises:
      UserError: it has other results.
    """
    path = folder / "results.json"
    if not path.exists():
        return False
    try:
        before = json.loads(path.read_bytes())
        before = {"checkpoint": before["checkpoint"], **before["settings"]}
    except (ValueError, KeyError, TypeError):
        before = {}
    # As JSON gives it back, so that equal things are equal.
    now = json.loads(json.dumps({"checkpoint": checkpoint, **settings}))
    if changed := list(differences(before, now, _NO_MATTER)):
        raise UserError(
            f"{path} has results with different settings ({', '.join(changed[:5])}). Choose another "
            "EVAL_OUTPUT_DIR, or remove that file."
        )
    return True


def differences(before: Any, now: Any, no_matter: Collection[str] = (), name: str = "") -> Iterator[str]:
    """Yields dotted names of the differences between two JSON values, except for `no_matter`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if key not in no_matter:
                yield from differences(before.get(key), now.get(key), no_matter, f"{name}.{key}".lstrip("."))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for place, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, no_matter, f"{name}[{place}]")
    elif before != now:
        yield name


def write_results(folder: str | os.PathLike, report: Mapping[str, Any]) -> None:
    """Writes `report` to results.json in `folder`, atomically."""
    write_json(os.path.join(folder, "results.json"), report)


def summary(metrics: Mapping[str, float]) -> str:
    """Returns the metrics on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
