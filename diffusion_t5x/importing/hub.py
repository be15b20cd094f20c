"""Models on Hugging Face's hub: downloads the files that an import needs once, to the hub's own cache."""

import glob
import os
import pathlib
import re

from diffusion_t5x.errors import UserError
from diffusion_t5x.importing.huggingface import CARRIED, INDEX, SINGLE, shards

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w.-][\w./-]*))?", re.ASCII)


def local_folder(name: str | os.PathLike, weights: bool = True) -> str:
    """Returns a model's folder: a local path unchanged; "org/name" or "org/name@revision" of the hub, downloaded.

    Cached files are not downloaded again. `HF_HUB_OFFLINE=1` reads the cache alone; `HF_HOME`, `HF_TOKEN` and the other
    variables of `huggingface_hub` work as usual.

    Args:
      name: a path or a hub name. An existing path is never looked up in the hub.
      weights: False leaves the safetensors where they are.

    Raises:
      UserError: the hub has no such model or cannot be reached, or the model is gated.
    """
    name = os.fspath(name)
    parts = _ID.fullmatch(name)
    if pathlib.Path(name).expanduser().exists() or not parts:
        return name
    folder = _download(name, parts["repo"], parts["revision"], [*CARRIED, *((SINGLE, INDEX) if weights else ())])
    if weights and (folder / INDEX).exists() and not (folder / SINGLE).exists():
        # Of the same commit, whatever the revision means by now.
        _download(name, parts["repo"], folder.name, shards(folder / INDEX))
    return str(folder)


def _download(name: str, repo: str, revision: str | None, files: list[str]) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        patterns = [glob.escape(file) for file in files]
        return pathlib.Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise UserError(f"{name} is gated: accept its terms on the Hub, and set HF_TOKEN.") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision {revision} on the Hugging Face Hub.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"There is no folder {name}, and the Hugging Face Hub has no such model. If it is private, set HF_TOKEN."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _first_line(error)
        raise UserError(
            f"There is no folder {name}, and the Hugging Face Hub cannot be reached ({why}). Its cache, "
            f"{constants.HF_HUB_CACHE}, does not have the model either: connect, or give a local folder."
        ) from error
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"{name} could not be downloaded from the Hugging Face Hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
