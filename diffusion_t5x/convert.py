"""Import a model of another framework: its weights as a checkpoint, its tokenizer, and a gin file that names both."""

import dataclasses
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from flax import traverse_util

from diffusion_t5x import config
from diffusion_t5x.conversion import llama2c
from diffusion_t5x.data.seqio_source import libraries
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.errors import UserError
from diffusion_t5x.flags import Parser
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.training import checkpoints

_MODEL_GIN = """\
# {title}. It stands for a model's and a size's gin file.
from __gin__ import dynamic_registration

from diffusion_t5x.models import config as model_config

include "models/decoder_only.gin"

TOKENIZER_FILE = {tokenizer!r}

model_config.ModelConfig:
{bindings}
"""


def from_llama2c(model_file: str, tokenizer_file: str, output: str) -> None:
    """Imports a checkpoint of llama2.c (export version 0), such as Karpathy's stories260K.

    `output` gets checkpoints/checkpoint_0 (step and parameters), tokenizer.bin and model.gin.

    Args:
      model_file: the model's .bin.
      tokenizer_file: its tokenizer's .bin.
      output: a folder that is empty or not there.

    Raises:
      UserError: files that are not what they should be or do not belong together, or an output that is not empty;
        before anything is written.
    """
    libraries()
    from diffusion_t5x.data.llama2c_vocabulary import Llama2cVocabulary

    folder = pathlib.Path(output).expanduser().resolve()
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{output} is not empty: nothing there is overwritten. Give another --output, or empty it.")
    source = llama2c.read(model_file)
    vocabulary = Llama2cVocabulary(tokenizer_file)
    if vocabulary.vocab_size != source.vocab_size:
        raise UserError(
            f"{tokenizer_file} has {vocabulary.vocab_size} pieces, but {model_file} is a model of {source.vocab_size}: "
            "give the tokenizer that the model was trained with."
        )
    definition = ModelDefinition(source.config(), token_ids(vocabulary))
    converted = source.params(rows=definition.config.vocab_size)
    checkpoints.ensure_writable(str(folder))

    tokenizer = folder / "tokenizer.bin"
    shutil.copyfile(os.path.expanduser(tokenizer_file), tokenizer)
    title = f"{os.path.basename(model_file)} of llama2.c, imported"
    gin = _model_gin(title, source.config(), tokenizer)
    _save(folder, definition, {name: values for name, (_, values) in converted.items()}, gin)
    (folder / "model.gin").write_text(gin, encoding="utf-8")

    rows = [
        (taken, f"{list(source.arrays[taken].shape)}", name, f"{list(values.shape)}")
        for name, (taken, values) in converted.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{definition.num_params():,} parameters; {source.vocab_size} pieces, MASK is {source.vocab_size}")
    print(f"The embedding's rows from {source.vocab_size} on, MASK first, are new: each is the mean of all others.")
    print(f"Wrote {folder}: checkpoints/checkpoint_0, tokenizer.bin, model.gin")


def _model_gin(title: str, model: ModelConfig, tokenizer: pathlib.Path) -> str:
    """A gin file that sets MODEL to `model`, and TOKENIZER_FILE; dropout and dtype are left to the run."""
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    left_out = {"architecture", "dropout_rate", "dtype", "scan_unroll", "remat", "vocab_size"}
    bindings = "\n".join(f"  {name} = {value!r}" for name, value in values.items() if name not in left_out)
    return _MODEL_GIN.format(title=title, tokenizer=str(tokenizer), bindings=bindings)


def _save(folder: pathlib.Path, definition: ModelDefinition, params: Mapping[str, np.ndarray], gin: str) -> None:
    """Writes checkpoint_0: what a run of no steps would leave, without an optimizer."""
    state = {"step": np.zeros((), np.int32), "params": traverse_util.unflatten_dict(dict(params), sep="/")}
    store = checkpoints.Checkpoints(str(folder / "checkpoints"), asynchronous=False)
    store.save(0, state, {}, {"step": 0, "metrics": {}, "vocabulary": definition.vocabulary.describe(), "config": gin})
    store.close()


def convert(argv: Sequence[str]) -> None:
    """Runs the conversion that the command line `argv` (without the program's name) asks for."""
    parser = Parser(prog="python -m diffusion_t5x.convert", description=__doc__)
    sources = parser.add_subparsers(required=True, metavar="SOURCE")
    add = sources.add_parser("from_llama2c", help="a checkpoint of llama2.c (export version 0)")
    add.add_argument("model_file", metavar="MODEL.bin")
    add.add_argument("--tokenizer", required=True, dest="tokenizer_file", metavar="TOKENIZER.bin")
    add.add_argument("--output", required=True, metavar="DIR", help="a folder that is empty or not there")
    add.set_defaults(run=from_llama2c)
    arguments = vars(parser.parse_args(argv))
    arguments.pop("run")(**arguments)


if __name__ == "__main__":
    with config.program():
        convert(sys.argv[1:])
