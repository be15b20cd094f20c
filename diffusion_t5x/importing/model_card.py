"""Other files of an exported diffusion model: generation settings, a model card, MASK in the tokenizer."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_t5x import records
from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.checkpointing.record import Record, in_words
from diffusion_t5x.importing.huggingface import read_json

MASK = "<|mask|>"
_PUBLISHED_IN = {  # others are dllm's
    "sdar": "SDAR", "sdar_moe": "SDAR", "Dream": "Dream", "llada": "LLaDA", "llada_moe": "LLaDA-MoE",
    "llada2_moe": "LLaDA2", "llada21_moe": "LLaDA2.1",
}  # fmt: skip


def write(to: pathlib.Path, name: str, checkpoint: OpenCheckpoint, config: Mapping[str, Any]) -> None:
    """Writes generation_config.json and README.md if they are missing, and names MASK in the tokenizer's files.

    Args:
      to: the folder, which has the tokenizer's files already.
      name: of the format.
      checkpoint: that is exported.
      config: the contents of config.json.
    """
    record = checkpoint.record
    generation = _generation(record, config)
    add_mask(to, config["mask_token_id"])
    file = to / "generation_config.json"
    if not file.exists() or not record.imported:
        said = read_json(file) if file.exists() else {}
        # Several ids may end a text, and only this file names them all.
        generation |= {key: value for key, value in said.items() if key.endswith("_token_id")}
        records.write_json(file, generation)
    records.write_text(to / "README.md", "\n".join(_card(name, checkpoint, generation)) + "\n")


def add_mask(folder: pathlib.Path, mask_id: int) -> None:
    """Adds MASK to the tokenizer's files at its id, if no token is there."""
    tokenizer, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    token = {"content": MASK, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    token |= {"special": True}
    if tokenizer.exists():
        said = read_json(tokenizer)
        added = said.setdefault("added_tokens", [])
        if found := next((each for each in added if each.get("id") == mask_id), None):
            token["content"] = found["content"]
        else:
            added.append({"id": mask_id, **token})
            records.write_json(tokenizer, said)
    if settings.exists():
        said = read_json(settings)
        said.setdefault("mask_token", token["content"])
        if tokenizer.exists():  # transformers knows no class for the model_type of published formats
            said.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        if "added_tokens_decoder" in said:
            said["added_tokens_decoder"].setdefault(str(mask_id), token)
        records.write_json(settings, said)


def _generation(record: Record, config: Mapping[str, Any]) -> dict[str, Any]:
    """Special ids, and the decoder's settings in the words of the published code."""
    roles = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    settings = {role: config[role] for role in roles if config.get(role) is not None}
    decoder = record.decoder or {}
    inner = decoder.get("inner", decoder)
    settings["do_sample"] = bool(inner.get("temperature"))  # transformers has no temperature 0
    settings |= {name: inner.get(name) or None for name in ("temperature", "top_k", "top_p")}
    if "block_size" in decoder:
        settings |= {"block_length": decoder["block_size"], "denoising_steps": inner.get("num_steps")}
        strategy = "static" if inner.get("threshold") is None else "dynamic"
        settings |= {"remasking_strategy": f"low_confidence_{strategy}", "confidence_threshold": inner.get("threshold")}
    else:
        settings |= {"steps": inner.get("num_steps"), "block_length": inner.get("window")}
    return {name: value for name, value in settings.items() if value is not None}


def _card(name: str, checkpoint: OpenCheckpoint, generation: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the model card."""
    record, step = checkpoint.record, checkpoint.metadata.get("step", 0)
    objective = in_words(record.objective) if record.objective else "unknown"
    code = _PUBLISHED_IN.get(name, "dllm")
    yield from ("---", "pipeline_tag: text-generation", "tags: [diffusion, diffusion-language-model]", "---", "")
    yield from (f"# {checkpoint.model_dir.name}", "")
    yield f"A diffusion language model: {' and '.join(map(str, record.modes))}."
    yield f"Its files have the format of {code} (`model_type` {name}); its code is {code}'s and is not in this folder."
    yield from ("", "## Training", "", f"* Objective: `{objective}`")
    yield f"* Training steps here: {step}{' (imported, and not trained further)' if record.imported else ''}"
    if record.dataset:
        data = record.dataset
        yield f"* Data: {data.get('mixture_or_task_name')}, lengths {data.get('task_feature_lengths')}"
        lengths = sum((data.get("task_feature_lengths") or {}).values())
        yield f"* Tokens: {step * (data.get('batch_size') or 0) * lengths:,} at most (steps, rows and lengths)"
    if record.versions:
        yield f"* Versions: {', '.join(f'{package} {version}' for package, version in record.versions.items())}"
    yield from ("", "## Scores", "", *_scores(pathlib.Path(str(checkpoint.model_dir))))
    yield from ("", "## Decoding", "", f"Decoder: `{in_words(record.decoder)}`", "")
    yield from (f"* {key}: {value}" for key, value in generation.items())
    yield from ("", "To use it with diffusion_t5x:", "", "```bash")
    yield "diffusion-t5x convert from_hf THIS_FOLDER --output /tmp/imported"
    yield from ("diffusion-t5x generate --checkpoint /tmp/imported --prompt 'Hello'", "```")


def _scores(folder: pathlib.Path) -> list[str]:
    """Lines of each evaluation's metrics, with the ends of their 95 % intervals."""
    lines = []
    for path in sorted(folder.glob("**/results.json")):
        for task, metrics in read_json(path).get("results", {}).items():
            for metric, value in metrics.items():
                interval = [metrics.get(f"{metric}_{end}") for end in ("low", "high")]
                if None not in interval:
                    low, high = interval
                    lines.append(f"* {task}, {metric}: {value:.4g}, 95 % interval {low:.4g} to {high:.4g}")
    return lines or ["The run's folder has no evaluation."]
