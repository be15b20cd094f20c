"""diffusion_t5x: trains and runs diffusion language models, the T5X way."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from diffusion_t5x import moved

__version__ = "0.1.0"

# The Python interface: each name, and the module it comes from, which is imported on first use.
_MODULES = {
    "Autoregressive": "objectives.autoregressive",
    "AutoregressiveDecoder": "decoding.autoregressive",
    "Block": "objectives.block",
    "BlockDecoder": "decoding.block",
    "CheckpointPolicy": "train",
    "DecodeEval": "evaluation.evaluator",
    "LogLikelihood": "api",
    "Lora": "training.lora",
    "LossEval": "evaluation.evaluator",
    "Masked": "objectives.masked",
    "MaskedDecoder": "decoding.masked",
    "MeshConfig": "partitioning",
    "Model": "api",
    "ModelConfig": "models.config",
    "Periods": "training.loop",
    "SeqioDataset": "data.seqio_source",
    "Steps": "api",
    "Sundae": "objectives.sundae",
    "SundaeDecoder": "decoding.sundae",
    "UserError": "errors",
    "WindowDecoder": "decoding.windows",
    "adafactor": "training.optimizers",
    "adamw": "training.optimizers",
    "load": "api",
}
__all__ = ["__version__", "train", *_MODULES]

# ruff: noqa: F401  (for type checkers and editors; at run time `__getattr__` imports them)
if TYPE_CHECKING:
    from diffusion_t5x.api import LogLikelihood, Model, Steps, load
    from diffusion_t5x.data.seqio_source import SeqioDataset
    from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
    from diffusion_t5x.decoding.block import BlockDecoder
    from diffusion_t5x.decoding.masked import MaskedDecoder
    from diffusion_t5x.decoding.sundae import SundaeDecoder
    from diffusion_t5x.decoding.windows import WindowDecoder
    from diffusion_t5x.errors import UserError
    from diffusion_t5x.evaluation.evaluator import DecodeEval, LossEval
    from diffusion_t5x.models.config import ModelConfig
    from diffusion_t5x.objectives.autoregressive import Autoregressive
    from diffusion_t5x.objectives.block import Block
    from diffusion_t5x.objectives.masked import Masked
    from diffusion_t5x.objectives.sundae import Sundae
    from diffusion_t5x.partitioning import MeshConfig
    from diffusion_t5x.train import CheckpointPolicy, train
    from diffusion_t5x.training.loop import Periods
    from diffusion_t5x.training.lora import Lora
    from diffusion_t5x.training.optimizers import adafactor, adamw


def __getattr__(name: str) -> Any:
    if name == "train":  # the module, which is callable: `from diffusion_t5x import train` means it, too
        return importlib.import_module("diffusion_t5x.train")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


moved.install()


def _answer_help() -> None:
    """Prints the help for `python -m diffusion_t5x.VERB --help`, before the verb imports anything heavy.

    Python sets `sys.argv[0]` to "-m" while it looks for the module to run, which imports this package first.
    """
    from diffusion_t5x import terminal
    from diffusion_t5x.command_line import help_pages

    if (page := help_pages.answer(sys.orig_argv)) is not None:
        with terminal.standard_streams():
            print(page)
        sys.exit()


if sys.argv[:1] == ["-m"] and {"-h", "--help"} & set(sys.orig_argv):
    _answer_help()
