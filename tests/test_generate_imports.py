"""Texts are written without libraries that they do not need: SeqIO and TensorFlow take seconds to import."""

import pathlib
import shutil

import open_models
import pytest
import tiny
from variants import quick

from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.importing import output
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition

pytest.importorskip("seqio")
from fresh_process import SECONDS, run
from untrained import SIZE, give_record, save_old

# Others that only training, scores, reports, imports or servers use; tenths of a second each.
UNUSED = {*SECONDS, "tensorboardX", "matplotlib", "sacrebleu", "babel", "pyarrow", "pandas", "torch"}
UNUSED |= {"transformers", "huggingface_hub", "gguf", "starlette", "uvicorn", "openai", "lm_eval", "scipy"}


@pytest.mark.parametrize("kind", quick(["json", "sentencepiece"], ["json"]))
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
    cached = tmp_path / "cached"  # as training from an older cache leaves it: with a task, and no vocabulary
    shutil.copytree(tmp_path / "checkpoints", cached / "checkpoints")
    give_record(cached, vocabulary_source=None, dataset={"mixture_or_task_name": "none_here"}, inputs_end=None)
    commands = [f"--checkpoint {tmp_path}", f"--checkpoint {cached} --tokenizer {file}"]
    (*texts, imported), said = run(
        "generate", [f"{each} --prompt Once --length 4" for each in commands], (), tmp_path, UNUSED
    )
    assert imported == "" and said.count("4 tokens in") == 2
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]
