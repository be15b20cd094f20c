"""Uploads an exported model to Hugging Face's hub."""

import pathlib

from diffusion_t5x.errors import UserError
from diffusion_t5x.importing.huggingface import CONFIG, INDEX, SINGLE


def push(folder: str, name: str, public: bool = False) -> None:
    """Uploads a folder that `to_hf` wrote as a model of the hub, in one commit.

    The repository is created if it does not exist. The environment variables of `huggingface_hub` hold, such as
    `HF_TOKEN`.

    Args:
      folder: with config.json and safetensors.
      name: "org/name".
      public: everybody sees a repository that is made now.

    Raises:
      UserError: no such folder, no access, or the hub cannot be reached.
    """
    path = pathlib.Path(folder).expanduser()
    if not (path / CONFIG).exists() or not any((path / file).exists() for file in (SINGLE, INDEX)):
        raise UserError(
            f"{folder} has no {CONFIG} with safetensors beside it: give a folder that `convert to_hf` wrote."
        )
    if name.count("/") != 1:
        raise UserError(f"{name!r} is not a model name for the Hub: give ORG/NAME.")
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=path, commit_message="Upload by diffusion_t5x")
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{folder} could not be uploaded as {name}: {first} (Is HF_TOKEN set, with write access?)"
        ) from error
    print(f"Wrote {commit.commit_url}")
