"""From Hugging Face's format: a folder's model as a checkpoint."""

import shutil
from collections.abc import Sequence

from diffusion_t5x.data.seqio_source import libraries
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.data.vocabulary_files import vocabulary
from diffusion_t5x.importing import families, importing, output
from diffusion_t5x.importing.huggingface import CARRIED, Folder


def from_hf(path: str, output_folder: str, ignore_keys: Sequence[str] = ()) -> None:
    """Imports a model from a local folder in Hugging Face's format.

    `output_folder` gets checkpoints/checkpoint_0 (step and parameters), config.json and the tokenizer's files as they
    are, and model.gin.

    Args:
      path: with config.json, safetensors and a tokenizer.
      output_folder: a folder that is empty or not there.
      ignore_keys: keys of config.json that are read as if they were not there.

    Raises:
      UserError: what the folder holds is not supported or does not fit together, or the output is not empty; before
        anything is written.
    """
    final = output.empty_folder(output_folder)
    folder = Folder.open(path).without_keys(ignore_keys)
    described = families.describe(folder)
    tokenizer = folder.tokenizer()
    libraries()
    ids = token_ids(vocabulary(str(tokenizer)))
    definition = importing.definition_of(folder, described, ids, tokenizer)

    if described.passed_over:
        print(described.passed_over)
    with output.building(final) as to:
        for name in CARRIED:
            if (folder.path / name).exists():
                shutil.copyfile(folder.path / name, to / name)
        folder.note_tensors(to)
        importing.write(to, final, folder, described, definition, tokenizer.name, folder.config["model_type"])
    print(f"Wrote {final}: checkpoints/checkpoint_0, {tokenizer.name}, model.gin")
