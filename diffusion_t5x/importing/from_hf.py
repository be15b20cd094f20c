"""From Hugging Face's format: a folder's model, or one of the hub, as a checkpoint or in memory."""

import pathlib
import shutil
from collections.abc import Sequence

from diffusion_t5x.checkpointing.record import Record
from diffusion_t5x.checkpointing.streaming import Streamed
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.data.vocabulary_files import vocabulary
from diffusion_t5x.importing import families, hub, importing, output
from diffusion_t5x.importing.families import Described
from diffusion_t5x.importing.huggingface import CARRIED, CONFIG, Folder
from diffusion_t5x.models.transformer import ModelDefinition


def from_hf(path: str, output_folder: str, ignore_keys: Sequence[str] = ()) -> None:
    """Imports a model in Hugging Face's format.

    `output_folder` gets checkpoints/checkpoint_0 (step and parameters), config.json and the tokenizer's files as they
    are, and model.gin.

    Args:
      path: a folder with config.json, safetensors and a tokenizer; or a model of the hub, see `hub.local_folder`.
      output_folder: a folder that is empty or not there.
      ignore_keys: keys of config.json that are read as if they were not there.

    Raises:
      UserError: what the folder holds is not supported or does not fit together, or the output is not empty; before
        anything is written.
    """
    final = output.empty_folder(output_folder)
    folder, described, definition, tokenizer = _opened(path, ignore_keys)
    if described.passed_over:
        print(described.passed_over)
    with output.building(final) as to:
        for name in CARRIED:
            if (folder.path / name).exists():
                shutil.copyfile(folder.path / name, to / name)
        folder.note_tensors(to)
        importing.write(to, final, folder, described, definition, tokenizer.name, folder.config["model_type"])
    print(f"Wrote {final}: checkpoints/checkpoint_0, {tokenizer.name}, model.gin")


def is_folder(path: str) -> bool:
    """Whether a model in Hugging Face's format lies in this folder, and no checkpoint of ours."""
    folder = pathlib.Path(path).expanduser()
    return (folder / CONFIG).exists() and not (folder / "checkpoints").exists()


def in_memory(path: str) -> tuple[Record, ModelDefinition, dict[str, Streamed]]:
    """A model that is not written anywhere: its record, its definition, and what reads its parameters, by name.

    Args:
      path: see `from_hf`.

    Raises:
      UserError: as `from_hf`.
    """
    folder, described, definition, tokenizer = _opened(path)
    return output.record_of(definition, tokenizer), definition, importing.params(folder, described, definition)


def _opened(path: str, ignore_keys: Sequence[str] = ()) -> tuple[Folder, Described, ModelDefinition, pathlib.Path]:
    """The folder, what it describes, the model here, and the tokenizer's file; all checked, no weights kept."""
    folder = Folder.open(hub.local_folder(path)).without_keys(ignore_keys)
    described = families.describe(folder)
    tokenizer = folder.tokenizer()
    ids = token_ids(vocabulary(str(tokenizer)))
    return folder, described, importing.definition_of(folder, described, ids, tokenizer), tokenizer
