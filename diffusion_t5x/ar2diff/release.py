"""Results of a conversion: a checkpoint without the optimizer, a folder in Hugging Face's format, a model card."""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_t5x import records
from diffusion_t5x.ar2diff.recipe import Recipe
from diffusion_t5x.checkpointing import checkpoints, restoring
from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.checkpointing.record import Record
from diffusion_t5x.checkpointing.streaming import Streamed
from diffusion_t5x.importing.huggingface import CARRIED, TENSORS
from diffusion_t5x.importing.output import building, save_params
from diffusion_t5x.importing.to_hf import to_hf
from diffusion_t5x.training import lora

_ROWS = (  # of the table, with a metric's name and how it is written
    ("bits per byte, held-out text", "bits_per_byte", "{:.3f}"),
    ("tokens per pass", "tokens_per_step", "{:.2f}"),
    ("agreement with the start's most likely token", "teacher_agreement", "{:.0%}"),
)


def write_checkpoint(trained: str, folder: pathlib.Path) -> None:
    """Writes the newest checkpoint of a run, without the optimizer, with its tokenizer.

    LoRA is merged, unless it applies only to drafts. An existing folder is not changed: it is complete, for only then
    it is moved to its place.
    """
    if folder.exists():
        return
    opened = checkpoints.open_checkpoint(trained)
    of_drafts = lora.of_drafts(opened.record.lora) is not None
    shapes, read = restoring.open_params(opened, merge=not of_drafts)

    def stream(name: str, shape: tuple[int, ...]) -> Streamed:
        return Streamed(shape, np.dtype(np.float32), axis=0, step=shape[0], read=lambda *_: read(name))

    params = {name: stream(name, shape) for name, shape in shapes.items()}
    with building(folder) as to:
        record = opened.record if of_drafts else dataclasses.replace(opened.record, lora=None)
        record = _with_tokenizer(record, opened, to, folder)
        save_params(to, record, params, opened.metadata.get("config", ""), opened.metadata["step"])


def _with_tokenizer(record: Record, opened: OpenCheckpoint, to: pathlib.Path, final: pathlib.Path) -> Record:
    """The record with a tokenizer in the folder `final`; it is copied to `to`, with the files that belong to it."""
    file = (record.vocabulary_arguments(opened.model_dir) or {}).get("file")
    if file is None:
        return record
    tokenizer = pathlib.Path(file)
    for name in {tokenizer.name, *CARRIED}:
        if (tokenizer.parent / name).exists() and name != "config.json":
            shutil.copyfile(tokenizer.parent / name, to / name)
    return dataclasses.replace(
        record, vocabulary_source={**(record.vocabulary_source or {}), "file": str(final / tokenizer.name)}
    )


def export(checkpoint: pathlib.Path, start: OpenCheckpoint, folder: pathlib.Path) -> bool:
    """Writes the model in Hugging Face's format, if it was imported from that; returns whether it was.

    Not if it drafts: no such format stores drafts, and without them it is the start.
    """
    if lora.of_drafts(checkpoints.open_checkpoint(str(checkpoint)).record.lora):
        return False
    file = (start.record.vocabulary_arguments(start.model_dir) or {}).get("file")
    origins = [pathlib.Path(start.model_dir), *([pathlib.Path(file).parent] if file else [])]
    like = next((origin for origin in origins if (origin / TENSORS).exists()), None)
    if like and not folder.exists():
        to_hf(str(checkpoint), str(folder), like=str(like))
    return like is not None


def write_card(
    folder: pathlib.Path,
    model: str,
    recipe: Recipe,
    tokens: int,
    scores: Mapping[str, Mapping[str, float]],
    exported: bool,
    drafts: bool,
) -> None:
    """Writes README.md: where the model comes from, its scores before and after, how it is used, and if it drafts."""
    heads = {"start": "start, autoregressive", "untrained": "start, as diffusion", "trained": "trained"}
    heads = {name: head for name, head in heads.items() if name in scores}
    diffuses = "untrained" in heads
    table = [
        f"| | {' | '.join(heads.values())} |",
        "| --- |" + " ---: |" * len(heads),
        *(
            f"| {what} | {' | '.join(_cell(scores[name], metric, form) for name in heads)} |"
            for what, metric, form in _ROWS
        ),
    ]
    about = "Bits of a diffusion model are an upper bound. " if diffuses else ""
    if drafts:
        about = "Text and likelihood are the start's own: a draft is kept if it is what the start writes. "
    export_line = ["", "`export/` has the weights in Hugging Face format."] if exported else []
    text = [
        f"# {pathlib.PurePath(model).name}, {'converted to diffusion' if diffuses else 'trained further'}",
        "",
        f"Made from `{model}` by diffusion_t5x: route `{recipe.route}`, {tokens:,} tokens of training.",
        f"The recipe is `{recipe.path.name}`.",
        "",
        *table,
        "",
        f"{about}Brackets: 95 % intervals over the held-out examples. The page `report.html` shows learning curves, "
        "examples and canvases.",
        "",
        "```bash",
        f"diffusion-t5x generate --checkpoint {folder / 'checkpoint'} --prompt 'Once upon a time'",
        "```",
        *export_line,
        "",
    ]
    records.write_text(folder / "README.md", "\n".join(text))


def _cell(metrics: Mapping[str, Any], name: str, form: str) -> str:
    if name not in metrics:
        return "–"
    ends = [metrics.get(f"{name}_{end}") for end in ("low", "high")]
    interval = f" [{', '.join(map(form.format, ends))}]" if None not in ends else ""
    return form.format(metrics[name]) + interval
