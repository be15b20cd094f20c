"""Checks a checkpoint against a model before reading it; reports every mismatch with the setting that fixes it."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_t5x.checkpointing import merging, stored
from diffusion_t5x.checkpointing.assignment import Rule, describe_assignment, named_leaves
from diffusion_t5x.checkpointing.checkpoints import AnyCheckpoint, open_checkpoint
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import OtherModel, UserError

# What says which arrays there are, beside the model, in the parts of a state.
_SAVED_WITH = {"ema": "a moving average (train.train.ema_decay)", "opt_state": "an optimizer (train.train.optimizer)"}


def check_start(
    path: AnyCheckpoint,
    vocabulary: TokenIds,
    abstract_state: Any,
    rules: Sequence[Rule] = (),
    *,
    merge: bool = True,
    resumes: bool = False,
) -> str:
    """Describes what happens to each array of a state that starts from a checkpoint; reads only names and shapes.

    Args:
      path: a user's path, or an open checkpoint.
      vocabulary: the task's vocabulary.
      abstract_state: tree of shapes and dtypes, with the model's parameters as `params`.
      rules: assignment rules.
      merge: the factors of a LoRA run are merged into their matrices, see `restoring.restore_params`; False reads all
        arrays as they are stored.
      resumes: the checkpoint is of the run that goes on, so a mismatch asks for its old settings or another MODEL_DIR.

    Raises:
      UserError: no checkpoint, or one message with every mismatch, of the vocabulary and of each parameter.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.verify("state/_METADATA")
    reader = merging if merge else stored
    targets, sources = named_leaves(abstract_state, reader.is_leaf), reader.leaves(checkpoint.path)
    wrong, settings = [], {}
    try:
        vocabulary.check_same(checkpoint.metadata["vocabulary"], str(checkpoint))
    except UserError as error:
        wrong.append(str(error))
    try:
        description = describe_assignment(targets, sources, rules)
    except UserError as error:
        here, settings = (model_settings(merging.plain(leaves)) for leaves in (targets, sources))
        advice = _advice(here, settings)
        others = {name.partition("/")[0] for name in _differing(targets, sources)} & {"ema", "opt_state"}
        if advice and resumes:  # no rule could help, and most arrays differ: what to set says it in one line
            wrong.append(f"{checkpoint} is of another model. {advice} Or choose another MODEL_DIR.")
        elif others and resumes:
            what = " and ".join(_SAVED_WITH[part] for part in sorted(others))
            wrong.append(
                f"{checkpoint} was saved with different settings of {what}. Set the same, or start another run "
                f"from it: another MODEL_DIR and --gin.INITIAL_CHECKPOINT_PATH={checkpoint}."
            )
        else:
            wrong += filter(None, [f"{checkpoint}: {error}", advice])
    if wrong:
        raise OtherModel("\n".join(wrong), settings)
    return description


def _differing(targets: Mapping[str, Any], sources: Mapping[str, Any]) -> set[str]:
    """Returns the arrays that only one of the two has, or whose shapes differ."""
    alone = targets.keys() ^ sources.keys()
    return alone | {name for name in targets.keys() - alone if tuple(targets[name].shape) != tuple(sources[name].shape)}


def model_settings(leaves: Mapping[str, Any]) -> dict[str, int | bool | str]:
    """Returns the fields of `ModelConfig` that follow from a model's parameters, by names such as `params/embedding`.

    Empty if they are not from a model of this framework.
    """
    shapes = {name.removeprefix("params/"): leaf.shape for name, leaf in leaves.items() if name.startswith("params/")}
    stack = "decoder/blocks"
    needed = ("embedding", f"{stack}/attention/query", f"{stack}/attention/key", f"{stack}/mlp/wi_0")
    if not all(name in shapes for name in needed):
        return {}
    embedding, query, key, mlp = (shapes[name] for name in needed)
    if len(mlp) > 3:  # a mixture of experts, most of whose settings are in no shape
        return {}
    buckets, positions = (shapes.get(f"decoder/{name}/embedding") for name in ("relative_bias", "positions"))
    has_encoder = any(name.startswith("encoder/") for name in shapes)
    return {
        "architecture": "encoder_decoder" if has_encoder else "decoder_only",
        "embed_dim": embedding[1],
        "num_layers": query[0],
        "num_heads": query[2],
        "head_dim": query[3],
        "mlp_dim": mlp[-1],
        "num_kv_heads": key[2],
        "tie_embeddings": "head" not in shapes,
        "query_key_norm": f"{stack}/attention/query_norm/scale" in shapes,
        "norm": "layer" if f"{stack}/attention_norm/bias" in shapes else "rms",
        "gated": f"{stack}/mlp/wi_1" in shapes,
        "qkv_bias": f"{stack}/attention/query_bias" in shapes,
        "output_bias": f"{stack}/attention/out_bias" in shapes,
        "position": "relative" if buckets else "learned" if positions else "rotary",
        **({"relative_buckets": buckets[0]} if buckets else {}),
        **({"max_length": positions[0]} if positions else {}),
        "vocab_size": embedding[0],
    }


def _advice(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Returns the settings that make the model match the checkpoint, as text."""
    differing = {name: value for name, value in there.items() if value != here.get(name)}
    if not here or not differing:
        return ""
    values = ", ".join(f"{name} = {value!r} (here {here.get(name)!r})" for name, value in differing.items())
    return f"The checkpoint's model has ModelConfig.{values}."
