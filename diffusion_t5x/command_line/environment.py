"""Print versions, machine and devices for a bug report."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator

from diffusion_t5x.command_line import help_pages

_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "gin-config", "seqio", "t5"),
    *("tensorflow", "tensorflow-text", "tensorflow-datasets", "protobuf", "sentencepiece", "tokenizers"),
    *("transformers", "torch", "numpy"),
)
_VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES", "TFDS_DATA_DIR", "DIFFUSION_T5X_CACHE")


def describe() -> Iterator[tuple[str, str]]:
    """Yields names and values; devices come last, because finding them can take long or fail."""
    import diffusion_t5x

    yield "diffusion_t5x", diffusion_t5x.__version__
    yield "python", platform.python_version()
    yield "platform", f"{platform.platform()}, {os.cpu_count()} CPU cores"
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    for variable in _VARIABLES:
        if variable in os.environ:
            yield variable, os.environ[variable]
    try:
        import jax

        devices = jax.devices()
        yield "devices", f"{len(devices)} × {devices[0].device_kind} ({jax.default_backend()})"
    except (ImportError, RuntimeError) as error:  # what jax raises where it finds no device or a broken driver
        yield "devices", f"none: {' '.join(str(error).split())}"


def main() -> None:
    """Prints the list."""
    help_pages.arguments("env")
    for name, value in describe():
        print(f"{name:<20} {value}", flush=True)


if __name__ == "__main__":
    main()
