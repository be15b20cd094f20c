"""The small published diffusion models of the test data: folders, reference logits and generated ids."""

import json
import os
import pathlib

import numpy as np
import pytest

from diffusion_t5x.data.batch import Batch

DATA = pathlib.Path(os.environ.get("DIFFUSION_T5X_TEST_DATA", "")) / "diffusion_checkpoints"
needs_data = pytest.mark.skipif(
    "DIFFUSION_T5X_TEST_DATA" not in os.environ or not DATA.is_dir(),
    reason="no published diffusion models: set DIFFUSION_T5X_TEST_DATA",
)
FAMILIES = ("llada", "dream", "sdar", "a2d-qwen3", "a2d-qwen2", "a2d-llama", "llada_moe", "llada2_moe")
IN_BLOCKS = ("sdar", "llada2_moe")
UNNAMED_MASKS = {"a2d-qwen3": 157, "a2d-qwen2": 157, "a2d-llama": 157, "llada_moe": 155, "llada2_moe": 155}


def mask_flags(family: str) -> list[str]:
    """The flag that names MASK, where no file of the family does."""
    return [f"--mask_id={UNNAMED_MASKS[family]}"] if family in UNNAMED_MASKS else []


def reference(family: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The contents of `reference.npz`: its description, and its arrays by name."""
    with np.load(DATA / family / "reference.npz") as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("meta"))), arrays


def settings(family: str) -> dict[str, dict]:
    """The settings of each generation by its name."""
    return {each["name"]: each["settings"] for each in reference(family)[0]["gen"]} if DATA.is_dir() else {}


def generation(family: str, name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The prompts of a generation, and its outputs with their prompts."""
    _, arrays = reference(family)
    prompts, outputs = (
        [row[there > 0] for row, there in zip(arrays[f"gen_{name}_{x}"], arrays[f"gen_{name}_{x}_mask"], strict=True)]
        for x in ("prompts", "out")
    )
    return prompts, outputs


def to_write(prompts: list[np.ndarray], length: int, pad_id: int) -> Batch:
    """Rows of these prompts, each with so many targets behind it and padding in the end."""
    width = max(map(len, prompts)) + length
    place = np.arange(width)
    lengths = np.array([len(prompt) for prompt in prompts])[:, None]
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    there = place < lengths + length
    return Batch(
        tokens=tokens,
        target_mask=there & (place >= lengths),
        segment_ids=there.astype(np.int32),
        positions=np.where(there, place, 0).astype(np.int32),
        example_ids=np.arange(len(prompts), dtype=np.int32),
    )
