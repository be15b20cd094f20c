"""SeqIO and TensorFlow take seconds to import: texts are written without them."""

import pathlib

import open_models
import pytest
import tiny

from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.importing import output
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition

pytest.importorskip("seqio")
from fresh_process import run
from untrained import SIZE, give_record, save_old


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_generate_does_without_them(kind, tmp_path):
    if kind == "json":
        specials = {"eos_token": "<|end|>", "pad_token": "<|pad|>"}
        file = open_models.save_tokenizer(tmp_path, open_models.byte_level(), **specials)
    else:
        file = open_models.save_sentencepiece(tmp_path / "model")
    model = ModelConfig(**SIZE)
    definition = ModelDefinition(model, token_ids(vocabulary_files.vocabulary(file)))
    text = output.model_gin("random", model, "VOCABULARY_FILE", pathlib.Path(file))
    save_old(tmp_path, definition, tiny.random_params(definition), text)
    give_record(tmp_path)
    command = f"--checkpoint {tmp_path} --prompt Once --length 4"
    (_, imported), said = run("generate", [command], (), tmp_path)
    assert imported == "" and "4 tokens in" in said
