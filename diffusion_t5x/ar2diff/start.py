"""The model that a conversion starts from: recognised, and imported where it is not ours."""

import pathlib

from diffusion_t5x.ar2diff.journal import Journal
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import from_hf, hub
from diffusion_t5x.importing.from_t5x import from_t5x

_T5X_INDEX = "checkpoint"  # the msgpack file in a folder of T5X


def begin(model: str, tokenizer: str | None, folder: pathlib.Path, journal: Journal) -> OpenCheckpoint:
    """The checkpoint to start from; an import is written to `folder`, once.

    Args:
      model: a model of the hub, a folder in Hugging Face's format, a GGUF file, a T5X checkpoint or one of ours.
      tokenizer: SentencePiece model of a T5X checkpoint.
      folder: for the import.
      journal: remembers the path.

    Raises:
      UserError: the model does not exist or cannot be imported.
    """
    path = journal.done("import")
    if path is None:
        path = _import(model, tokenizer, folder)
        journal.mark("import", path)
    return checkpoints.open_checkpoint(path)


def _import(model: str, tokenizer: str | None, folder: pathlib.Path) -> str:
    local = hub.local_folder(model)
    imported = str(folder)
    is_t5x = pathlib.Path(local, _T5X_INDEX).is_file()
    if tokenizer and not is_t5x:
        raise UserError(f"--tokenizer is for a T5X checkpoint, and {model} is none: leave it out.")
    if (folder / "model.gin").exists():  # the import was complete, and the process killed before it could note that
        return imported
    if is_t5x:
        if tokenizer is None:
            raise UserError(f"{model} is a T5X checkpoint, which comes without a tokenizer: give --tokenizer FILE.")
        from_t5x(local, tokenizer, imported, activation="gelu", max_distance=128)
        return imported
    if from_hf.is_foreign(local):
        from_hf.from_hf(local, imported)
        return imported
    try:
        return str(checkpoints.find_checkpoint(local))
    except UserError as error:
        raise UserError(
            f"{model} is not a model: neither a folder in Hugging Face format, a GGUF file, a T5X checkpoint nor a "
            f"checkpoint of diffusion_t5x. ({error})"
        ) from error
