"""Reads the verbs' outputs: curves, scores, predictions, decode times."""

import contextlib
import dataclasses
import datetime
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from diffusion_t5x.checkpointing import record
from diffusion_t5x.checkpointing.checkpoints import open_checkpoint
from diffusion_t5x.checkpointing.record import in_words
from diffusion_t5x.errors import UserError
from diffusion_t5x.performance import growth
from diffusion_t5x.performance.decode_times import DecodeTime, read_times
from diffusion_t5x.performance.growth import Growth
from diffusion_t5x.reporting import shown
from diffusion_t5x.reporting.published import Published, matching

Record = Mapping[str, Any]
_OUTPUTS = ("results.json", "*.settings.json")
_OF_TRAINING = ("train", "rollout")
_CURVES = (
    *(f"{kind}/metrics.jsonl" for kind in _OF_TRAINING),
    "training_eval/*/metrics.jsonl",
    "inference_eval/*/metrics.jsonl",
)


class OfDataSet:
    """Something of a task's split."""

    task: str
    split: str

    @property
    def data_set(self) -> str:
        """Name of task and split, which scores must share to be compared."""
        return f"{self.task} ({self.split})" if self.split else self.task


@dataclasses.dataclass(frozen=True)
class Curve(OfDataSet):
    """Metrics over the steps of a training run.

    Attributes:
      kind: "train", "rollout" (of the texts that the model wrote in training), "training_eval" or "inference_eval".
      task: the evaluated task; "" for training itself.
      points: `(step, value)` by metric, by ascending step.
      split: the task's split; "" if it is not on record.
    """

    kind: str
    task: str
    points: Mapping[str, Sequence[tuple[int, float]]]
    split: str = ""


@dataclasses.dataclass(frozen=True)
class Scores(OfDataSet):
    """Metrics of one task at one step, with their settings.

    Attributes:
      task: the evaluated task.
      model: name of the model's folder, or of the file of predictions made elsewhere.
      step: the checkpoint's step; None for predictions made elsewhere.
      decoder: its class and settings; "" for losses, or if they are not on record.
      num_examples: number of decoded examples; None for losses.
      metrics: metrics by name; `x_low` and `x_high` are the ends of the 95 % interval of `x`.
      published: models of papers in the same setting, each with a metric and its value (see `published.matching`).
      split: the task's split; "" if it is not on record.
    """

    task: str
    model: str
    step: int | None
    decoder: str
    num_examples: int | None
    metrics: Mapping[str, float]
    published: Sequence[tuple[Published, str, float]] = ()
    split: str = ""


@dataclasses.dataclass(frozen=True)
class Predictions(OfDataSet):
    """Predictions for a task.

    Attributes:
      task: the evaluated task.
      decoder: as in `Scores`.
      records: as `evaluation.inference.predict` yields them.
      split: the task's split; "" if it is not on record.
      at_start: they are of what a training run started from, which decoded this task again later.
    """

    task: str
    decoder: str
    records: Sequence[Record]
    split: str = ""
    at_start: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """One folder that a verb wrote.

    Attributes:
      name: name of the folder, with enough of its parents to distinguish the runs.
      size: the model's size as text; "" if it is not on record.
      written: modification time of the newest file that was read (UTC).
      curves, scores, predictions, decode_times, growth: its contents of each kind; most runs have one or two kinds.
    """

    name: str
    size: str
    written: datetime.datetime
    curves: Sequence[Curve]
    scores: Sequence[Scores]
    predictions: Sequence[Predictions]
    decode_times: Sequence[DecodeTime]
    growth: Sequence[Growth] = ()


def read_runs(folders: Iterable[str | pathlib.Path]) -> list[Run]:
    """Reads the runs in these folders, in the given order: each folder itself if it is a run, then those in it by name.

    Numbers in names are sorted as numbers: `run_2` comes before `run_10`. An incomplete last line belongs to a run that
    is still going, and is left out.

    Raises:
      UserError: a folder is missing or has no run, or a file is missing or broken.
    """
    found: dict[pathlib.Path, list[pathlib.Path]] = {}
    for folder in map(pathlib.Path, folders):
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}: name one that train, eval, infer or benchmark wrote.")
        own = _files(folder)
        parts = {path.parent for path in own}  # evaluated checkpoints, not runs of their own
        inner = [path for path in folder.iterdir() if path.is_dir() and path not in parts]
        inner.sort(key=lambda path: _natural(path.name))
        here = {path.resolve(): files for path, files in [(folder, own), *((p, _files(p)) for p in inner)] if files}
        if not here:
            raise UserError(
                f"{folder} has no output of train, eval, infer or benchmark, and neither do the folders in it."
            )
        found |= here
    return [_read_run(name, path, found[path]) for name, path in zip(_names(list(found)), found, strict=True)]


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """Returns the last parts of the paths, as few as distinguish them."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _natural(name: str) -> tuple[list[tuple[str, int]], str]:
    """Returns a sort key that treats numbers in names as numbers."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)], name


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that show that a verb wrote this folder, and which verb."""
    patterns = (
        *_CURVES,
        "decode_time.json",
        growth.FILE,
        *(at + name for at in ("", "checkpoint_*/") for name in _OUTPUTS),
    )
    files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    # The quickstart has a summary of the same name, in a form of its own.
    return [path for path in files if path.name != "results.json" or "results" in _read_json(path)]


def _read_run(name: str, folder: pathlib.Path, files: Sequence[pathlib.Path]) -> Run:
    curves, scores, predictions, decode_times, grown, evaluated = [], [], [], [], list[Growth](), []
    for path in files:
        with _whole(path):
            if path.name == "metrics.jsonl":
                curves.append(_read_curve(path, folder / "config.gin"))
                if curves[-1].kind == "inference_eval" and curves[-1].points:
                    for decoded in _inference_evals(folder, curves[-1]):
                        scores.append(decoded[0])
                        predictions.append(decoded[1])
            elif path.name == "results.json":
                evaluated += [(found, path.parent) for found in _read_scores(path)]
            elif path.name == "decode_time.json":
                decode_times += read_times(_read_json(path))
            elif path.name == growth.FILE:
                grown += growth.read(_read_json(path))
            elif (output := path.with_name(path.name.replace(".settings.json", ".jsonl"))).exists():
                settings = _read_json(path)
                if settings.get("mode") != "score":  # nothing was decoded
                    written_by, split = shown.decoder(settings["decoder"]), settings.get("split", "")
                    predictions.append(Predictions(settings["task"], written_by, _read_jsonl(output), split))
    evaluated.sort(key=lambda found: found[0].step or 0)
    scores += [found for found, _ in evaluated]
    last = {found.data_set: (found, where) for found, where in evaluated if found.num_examples is not None}
    for found, where in last.values():
        records = _read_jsonl(where / f"{found.task}_predictions.jsonl")
        predictions.append(Predictions(found.task, found.decoder, records, found.split))
    curves += _curves_of_scores([found for found, _ in evaluated])
    info = folder / "model-info.txt"
    return Run(
        name=name,
        size=info.read_text(encoding="utf-8").partition("\n")[0] if info.exists() else "",
        written=datetime.datetime.fromtimestamp(max(path.stat().st_mtime for path in files), datetime.UTC),
        curves=curves,
        scores=scores,
        predictions=predictions,
        decode_times=decode_times,
        growth=grown,
    )


def _read_curve(path: pathlib.Path, config: pathlib.Path) -> Curve:
    points: dict[str, list[tuple[int, float]]] = {}
    for line in _read_jsonl(path):
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                points.setdefault(name, []).append((line["step"], value))
    folder = path.parent
    kind, task = (folder.name, "") if folder.name in _OF_TRAINING else (folder.parent.name, folder.name)
    scopes = {"training_eval": "loss_eval", "inference_eval": "decode_eval"}
    return Curve(kind, task, points, _split_of_config(config, scopes[kind]) if task else "")


def _curves_of_scores(scores: Sequence[Scores]) -> Iterator[Curve]:
    """Yields a curve for each data set that several checkpoints were evaluated on; scores come by ascending step."""
    for task, split in dict.fromkeys((found.task, found.split) for found in scores):
        points: dict[str, list[tuple[int, float]]] = {}
        for found in scores:
            if (found.task, found.split) == (task, split) and found.step is not None:
                for name, value in found.metrics.items():
                    points.setdefault(name, []).append((found.step, value))
        if any(len(series) > 1 for series in points.values()):
            yield Curve("inference_eval", task, points, split)


def _inference_evals(folder: pathlib.Path, curve: Curve) -> Iterator[tuple[Scores, Predictions]]:
    """Yields scores and predictions of a training run's evaluations: of its start, if there is one, and the last."""
    steps = {step for points in curve.points.values() for step, _ in points}
    decoder = shown.decoder(_decoder_of_run(folder))
    for step in sorted({max(steps)} | {0} & steps):
        metrics = {name: value for name, points in curve.points.items() for at, value in points if at == step}
        records = _read_jsonl(folder / "inference_eval" / curve.task / f"predictions_{step}.jsonl")
        scores = Scores(curve.task, folder.resolve().name, step, decoder, len(records), metrics, split=curve.split)
        at_start = step < max(steps)
        yield scores, Predictions(curve.task, decoder, records, curve.split, at_start)


def _read_scores(path: pathlib.Path) -> list[Scores]:
    report = _read_json(path)
    if report["checkpoint"] is None:
        model = pathlib.PurePath(report["predictions"]).name
    else:
        checkpoint = pathlib.PurePath(report["checkpoint"]).parent
        model = checkpoint.parent.name if checkpoint.name == "checkpoints" else checkpoint.name
    return [
        Scores(
            task=task,
            model=model,
            step=report["step"],
            decoder=shown.decoder(_decoder_of_evaluations(report, task)),
            num_examples=metrics.get("num_examples"),
            metrics={name: value for name, value in metrics.items() if name != "num_examples"},
            published=matching(task, metrics.get("num_examples"), report),
            split=_split_of_settings(report.get("settings", {}), task),
        )
        for task, metrics in report["results"].items()
    ]


def _decoder_of_evaluations(report: Mapping[str, Any], task: str) -> str:
    """Returns a task's decoder from the settings that `eval` writes; "" if they are missing."""
    evaluations = report.get("settings", {}).get("evaluations", [])
    of_task = (found for found in evaluations if found.get("dataset", {}).get("mixture_or_task_name") == task)
    return next((in_words(found["decoder"]) for found in of_task if found.get("decoder")), "")


def _decoder_of_run(folder: pathlib.Path) -> str:
    """Returns the decoder of a training run, from its newest checkpoint's record or, without it, config.gin."""
    with contextlib.suppress(UserError):
        decoder = open_checkpoint(str(folder)).record.decoder
        return in_words(decoder) if decoder else ""
    path = folder / "config.gin"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    decoder = record.Record.read({"config": text}, str(path)).decoder
    return in_words(decoder) if decoder else ""


def _split_of_settings(settings: Mapping[str, Any], task: str) -> str:
    """Returns the splits of a task that an evaluation read, decoded ones first; "" if none is on record."""
    evaluations = settings.get("evaluations", ())
    evaluations = sorted(evaluations, key=lambda evaluation: "decoder" not in evaluation)
    data_sets = [evaluation.get("dataset", evaluation) for evaluation in evaluations]
    splits = [data.get("split", "") for data in data_sets if data.get("mixture_or_task_name") == task]
    return " + ".join(dict.fromkeys(filter(None, splits)))


def _split_of_config(path: pathlib.Path, scope: str) -> str:
    """Returns the split of a training run's evaluations, by the scope that the shipped gin files give them."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(rf"^{scope}/(?:[\w.]+\.)?SeqioDataset\.split = (?:'(.+)'|%(\w+))$", text, re.MULTILINE)
    if found and found[2]:
        found = re.search(rf"^{found[2]} = '(.+)'$", text, re.MULTILINE)
    return found[1] if found else ""


def _read_json(path: pathlib.Path) -> Any:
    with _whole(path):
        return json.loads(path.read_bytes())


def _read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    with _whole(path):
        *lines, last = path.read_bytes().split(b"\n")
        records = [json.loads(line) for line in lines]
        with contextlib.suppress(ValueError):  # cut short, or nothing at all
            records.append(json.loads(last))
        return [dict(record) for record in records]


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: restore it, or leave out its run.") from None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not as diffusion_t5x wrote it ({type(error).__name__}: {error}): restore it, or leave its run "
            "out."
        ) from None
