"""Compares texts alone with those on a mesh of eight devices; run by `evaluation/test_certificate.py`."""

import dataclasses
import json
import sys

import tiny

from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.evaluation.certificate import Ways
from diffusion_t5x.models.config import ModelConfig


def compared(config: ModelConfig) -> dict:
    examples = tiny.random_examples(3, [(3, 6), (1, 6), (4, 6)])
    rows = [tiny.one_a_row([example], 10, first_id=number) for number, example in enumerate(examples)]
    ways = Ways(*tiny.make_model(config), AutoregressiveDecoder(), rows, "float32")
    mesh = ways.another_mesh()
    found = ways.compared("on a mesh", ways.on_another_mesh(), 1e-3)
    return {
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "verdict": found.verdict,
        "num_texts": found.num_texts,
        "gap": found.gap,
    }


if __name__ == "__main__":
    narrow = dataclasses.replace(tiny.RELATIVE, embed_dim=12, num_heads=3)  # which eight devices do not divide
    json.dump([compared(tiny.RELATIVE), compared(narrow)], sys.stdout)
