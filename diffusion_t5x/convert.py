"""Import a model from another framework, with its tokenizer and a gin file for both, and export it again."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence

from diffusion_t5x.command_line import config, help_pages
from diffusion_t5x.data.llama2c_vocabulary import Llama2cVocabulary
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import llama2c
from diffusion_t5x.importing.from_hf import from_hf
from diffusion_t5x.importing.from_t5x import from_t5x
from diffusion_t5x.importing.importing import check_finite
from diffusion_t5x.importing.output import building, empty_folder, model_gin, print_table, record_of, save
from diffusion_t5x.importing.push import push
from diffusion_t5x.importing.to_hf import to_hf
from diffusion_t5x.models.transformer import ModelDefinition


def from_llama2c(model_file: str, tokenizer_file: str, output_folder: str) -> None:
    """Imports a checkpoint of llama2.c (export version 0), such as Karpathy's stories260K.

    `output_folder` gets checkpoints/checkpoint_0 (step and parameters), tokenizer.bin and model.gin.

    Args:
      model_file: the model's .bin.
      tokenizer_file: its tokenizer's .bin.
      output_folder: a folder that is empty or does not exist.

    Raises:
      UserError: before anything is written: invalid files, files that do not belong together, or an output folder that
        is not empty.
    """
    folder = empty_folder(output_folder)
    source = llama2c.read(model_file)
    vocabulary = Llama2cVocabulary(tokenizer_file)
    if vocabulary.vocab_size != source.vocab_size:
        raise UserError(
            f"{tokenizer_file} has {vocabulary.vocab_size} pieces, but {model_file} is a model of {source.vocab_size}: "
            "give the tokenizer that the model was trained with."
        )
    for name, array in source.arrays.items():
        check_finite(array, name, model_file)
    definition = ModelDefinition(source.config(), token_ids(vocabulary))
    converted = source.params(rows=definition.config.num_embeddings)

    title = f"{os.path.basename(model_file)} of llama2.c, imported"
    gin = model_gin(title, source.config(), "TOKENIZER_FILE", folder / "tokenizer.bin")
    with building(folder) as unfinished:
        shutil.copyfile(os.path.expanduser(tokenizer_file), unfinished / "tokenizer.bin")
        params = {name: values for name, (_, values) in converted.items()}
        save(unfinished, record_of(definition, folder / "tokenizer.bin"), params, gin)

    rows = [
        (taken, f"{list(source.arrays[taken].shape)}", name, f"{list(values.shape)}")
        for name, (taken, values) in converted.items()
    ]
    print_table(rows)
    print(f"{definition.num_params():,} parameters; {source.vocab_size} pieces, MASK is {source.vocab_size}")
    print(f"The embedding's rows from {source.vocab_size} on, MASK first, are new: each is the mean of all others.")
    print(f"Wrote {folder}: checkpoints/checkpoint_0, tokenizer.bin, model.gin")


def convert(argv: Sequence[str]) -> None:
    """Runs the conversion that the command line `argv` (without the program's name) names."""
    arguments = vars(help_pages.parser("convert").parse_args(argv))
    sources: dict[str, Callable[..., None]] = {
        "from_hf": from_hf,
        "from_gguf": from_hf,
        "to_hf": to_hf,
        "push": push,
        "from_t5x": from_t5x,
        "from_llama2c": from_llama2c,
    }
    sources[arguments.pop("source")](**arguments)


if __name__ == "__main__":
    with config.program():
        convert(sys.argv[1:])
