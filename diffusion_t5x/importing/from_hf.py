"""Imports models in Hugging Face format or GGUF, from a folder, a file or the hub, to a checkpoint or to memory."""

import dataclasses
import pathlib
import shutil
import types
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_t5x import records
from diffusion_t5x.checkpointing.record import Record
from diffusion_t5x.checkpointing.streaming import Streamed
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.data.vocabulary_files import vocabulary
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import families, hub, importing, output
from diffusion_t5x.importing.families import Described
from diffusion_t5x.importing.huggingface import CARRIED, CONFIG, Folder, read_json
from diffusion_t5x.models.quantized import FewBits
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.block import Block


def from_hf(
    path: str,
    output_folder: str,
    ignore_keys: Sequence[str] = (),
    mask_id: int | None = None,
    block_size: int | None = None,
    config_only: bool = False,
    frozen_dtype: FewBits | None = None,
) -> None:
    """Imports a model in Hugging Face format.

    `output_folder` gets checkpoints/checkpoint_0 (step and parameters), unchanged copies of config.json and the
    tokenizer's files, and model.gin.

    Args:
      path: a folder with config.json, safetensors and a tokenizer; a GGUF file; or a model of the hub, see
        `hub.local_folder`.
      output_folder: a folder that is empty or does not exist.
      ignore_keys: keys of config.json, or of a GGUF file's metadata, that are read as if they were not there.
      mask_id: the id of MASK, of a diffusion model whose files do not name it.
      block_size: of a block diffusion model, if config.json does not give it or gives another.
      config_only: reads no weights and writes no checkpoint.
      frozen_dtype: quantizes the matrices of layers; embeddings, norms and routers stay float32.

    Raises:
      UserError: before anything is written: the folder's content is not supported or does not fit together, or the
        output folder is not empty.
    """
    if config_only and frozen_dtype:
        raise UserError(
            "--config_only writes no weights, so --frozen_dtype has nothing to quantize: leave one of them out. A "
            "dry run takes FROZEN_DTYPE."
        )
    final = output.empty_folder(output_folder)
    said = {"mask_token_id": mask_id, "block_size": block_size}
    said = {name: value for name, value in said.items() if value is not None}
    folder, described, definition, tokenizer = _opened(path, ignore_keys, said, weights=not config_only)
    for line in filter(None, (described.passed_over, described.published.note)):
        print(line)
    with output.building(final) as to:
        for name in CARRIED:
            if (folder.path / name).exists():
                shutil.copyfile(folder.path / name, to / name)
        if said:
            records.write_json(to / CONFIG, read_json(to / CONFIG) | said)
        if not config_only:
            folder.note_tensors(to)
        importing.write(
            to, final, folder, described, definition, tokenizer.name, folder.config["model_type"], frozen_dtype
        )
    checkpoint = "" if config_only else "checkpoints/checkpoint_0, "
    print(f"Wrote {final}: {checkpoint}{tokenizer.name}, model.gin")


def is_foreign(path: str) -> bool:
    """True for a GGUF file, and for a folder with a model in Hugging Face format and no checkpoint of ours."""
    folder = pathlib.Path(path).expanduser()
    return _is_gguf(path) or ((folder / CONFIG).exists() and not (folder / "checkpoints").exists())


def _is_gguf(path: str) -> bool:
    return path.lower().endswith(".gguf")


def in_memory(path: str) -> tuple[Record, ModelDefinition, dict[str, Streamed]]:
    """Imports a model to memory: returns its record, its definition, and a reader for each parameter by name.

    Raises:
      UserError: as `from_hf`.
    """
    folder, described, definition, tokenizer = _opened(path)
    return (
        output.record_of(definition, tokenizer, described.published),
        definition,
        importing.params(folder, described, definition),
    )


def _opened(
    path: str,
    ignore_keys: Sequence[str] = (),
    said: Mapping[str, Any] = types.MappingProxyType({}),
    weights: bool = True,
) -> tuple[Folder, Described, ModelDefinition, pathlib.Path]:
    """The folder, what it describes, the model here, and the tokenizer's file; all checked, no weights kept.

    Args:
      path, ignore_keys: see `from_hf`.
      said: keys that config.json lacks.
      weights: False reads only config.json and the tokenizer.
    """
    folder = _source(path, ignore_keys, weights).with_keys(said)
    described = families.describe(folder)
    objective = described.published.objective
    if "block_size" in said and not isinstance(objective, Block):
        raise UserError(f"--block_size: {folder.path} is not a block diffusion model.")
    tokenizer = folder.tokenizer(described.tokenizers)
    read = vocabulary(str(tokenizer), mask_id=said.get("mask_token_id"))
    ids = token_ids(read)
    if objective.autoregressive and described.config.architecture == "decoder_only":
        config = dataclasses.replace(described.config, reads_start=getattr(read, "adds_bos", True))
        described = dataclasses.replace(described, config=config)
    if not objective.autoregressive:
        named = folder.config.get("mask_token_id") == ids.mask_id  # by a tokenizer's first free id, too
        _check_mask(folder, ids.mask_id if named else read.mask_id, described.vocab_size)
    return folder, described, importing.definition_of(folder, described, ids, tokenizer), tokenizer


def _check_mask(folder: Folder, mask_id: int | None, rows: int) -> None:
    """Raises a UserError if MASK of a diffusion model is not known, or is none of its embedding's rows."""
    if mask_id is None:
        raise UserError(
            f"{folder.path}: neither config.json nor the tokenizer names MASK's id. Give it: "
            "`convert from_hf ... --mask_id=ID`."
        )
    if not 0 <= mask_id < rows:
        raise UserError(f"{folder.path}: MASK = {mask_id}, but the model has the ids 0 to {rows - 1}. Set --mask_id.")


def _source(path: str, ignore_keys: Sequence[str], weights: bool) -> Folder:
    if _is_gguf(path):
        from diffusion_t5x.importing.gguf_file import GgufFile

        return GgufFile.open_file(path, ignore_keys)
    return Folder.open(hub.local_folder(path, weights), weights).without_keys(ignore_keys)
