"""Writes an import: checkpoint_0 and a gin file that names the model and its tokenizer."""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from flax import traverse_util

from diffusion_t5x import records, terminal
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.checkpointing.record import Record
from diffusion_t5x.checkpointing.streaming import Streamed
from diffusion_t5x.data.vocabularies import SENTINELS
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing.published import Published
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition

_UNFINISHED = ".unfinished"
MODEL_GIN = "model.gin"
_LAST = ("config.json", MODEL_GIN)  # without these, nothing takes a folder for a model

_GIN = """\
# {title}. Use it in place of a model's and a size's gin file.
from __gin__ import dynamic_registration

from diffusion_t5x.models import config as model_config
{imports}
include "models/{architecture}.gin"
{published}
{macro} = {tokenizer!r}
{start}
model_config.ModelConfig:
{bindings}
{experts}"""
# What the architecture's gin file, the run or the vocabulary decides.
_LEFT_OUT = {"architecture", "reads_start", "dropout_rate", "dtype", "scan_unroll", "remat", "attention_backend"}


def empty_folder(path: str) -> pathlib.Path:
    """Checks the folder of `--output`, which is not made yet, and returns it.

    Raises:
      UserError: it has content other than what a killed conversion left.
    """
    folder = pathlib.Path(path).expanduser().resolve()
    if folder.is_dir() and any(entry.name != _UNFINISHED for entry in folder.iterdir()):
        raise UserError(f"{path} is not empty: nothing there is overwritten. Give another --output, or empty it.")
    return folder


@contextlib.contextmanager
def building(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """Context with a folder to write to; its content is in `final` at the end. After an exception nothing is.

    It is beside `final` and is renamed; or, if `final` exists (it may be a mount, or the current folder), inside it,
    and its entries are renamed. A folder that a killed process left is removed first.

    Args:
      final: see `empty_folder`.

    Raises:
      UserError: it cannot be written to.
    """
    inside = final.exists()
    aside = final / _UNFINISHED if inside else final.with_name(f".{final.name}{_UNFINISHED}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoints.ensure_writable(str(aside))
    try:
        yield aside
        for entry in aside.iterdir():
            records.sync(entry)
        if inside:
            for entry in sorted(aside.iterdir(), key=lambda entry: entry.name in _LAST):
                entry.rename(final / entry.name)
            aside.rmdir()
        else:
            aside.rename(final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


class _Reference(str):
    """A reference to a gin configurable, whose repr is no string literal."""

    __repr__ = str.__str__


def model_gin(
    title: str, model: ModelConfig, macro: str, tokenizer: pathlib.Path, published: Sequence[str] = ()
) -> str:
    """A gin file that sets MODEL to `model`, and a macro to the tokenizer; dropout and dtype are left to the run.

    Args:
      title: a line about it.
      model, macro, tokenizer: see above.
      published: lines that set objective and decoder, see `Published.gin`.
    """
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    title = "".join(character if character.isprintable() else " " for character in title)  # it is a comment, one line
    left_out = _LEFT_OUT if model.vocab_size else {*_LEFT_OUT, "vocab_size"}
    experts = ""
    if model.experts:
        values["experts"] = _Reference("@experts.Experts()")
        fields = dataclasses.asdict(model.experts).items()
        experts = "\nexperts.Experts:\n" + "".join(f"  {name} = {value!r}\n" for name, value in fields)
    bindings = "\n".join(f"  {name} = {value!r}" for name, value in values.items() if name not in left_out)
    return _GIN.format(
        title=title,
        architecture=model.architecture,
        macro=macro,
        tokenizer=str(tokenizer),
        start=f"READS_START = {model.reads_start}\n" if model.architecture == "decoder_only" else "",
        published="".join(f"{line}\n" for line in published),
        bindings=bindings,
        imports="from diffusion_t5x.models import experts\n" if model.experts else "",
        experts=experts,
    )


def record_of(
    definition: ModelDefinition,
    tokenizer: pathlib.Path,
    published: Published = Published(),  # noqa: B008  (frozen)
) -> Record:
    """The record of an imported model whose tokenizer lies at this path."""
    source = {"file": str(tokenizer), "extra_ids": SENTINELS}
    described = definition.vocabulary.describe()
    return Record.of_import(definition.config, described, source, published.objective, published.decoder)


def save(folder: pathlib.Path, record: Record, params: Mapping[str, np.ndarray | Streamed], gin: str) -> None:
    """Writes model.gin and checkpoint_0, as a run of no steps would leave it, without an optimizer."""
    save_params(folder, record, params, gin, step=0)
    records.write_text(folder / MODEL_GIN, gin)


def save_params(
    folder: pathlib.Path, record: Record, params: Mapping[str, np.ndarray | Streamed], gin: str, step: int
) -> None:
    """Writes checkpoints/checkpoint_<step> without an optimizer."""
    state = {"step": np.array(step, np.int32), "params": traverse_util.unflatten_dict(dict(params), sep="/")}
    store = checkpoints.Checkpoints(str(folder / "checkpoints"), asynchronous=False, streamed=True)
    store.save(step, state, {}, {"step": step, "metrics": {}, **record.metadata(), "config": gin})
    store.close()


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(terminal.safe("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()))
