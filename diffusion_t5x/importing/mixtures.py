"""Weights of mixtures of experts, from those of the dense model that has the same attention."""

import dataclasses
from collections.abc import Mapping, Sequence

from diffusion_t5x.errors import UserError
from diffusion_t5x.importing.keys import Keys
from diffusion_t5x.importing.weights import Weight, under
from diffusion_t5x.models.config import ModelConfig

BLOCKS, DENSE = "decoder/blocks/", "decoder/dense_blocks/"
# Of Qwen and LLaDA, as of most.
PARTS = {"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"}


def weights(
    config: ModelConfig,
    dense: Sequence[Weight],
    part: str = "mlp",
    parts: Mapping[str, str] = PARTS,
    more: Sequence[Weight] = (),
) -> tuple[Weight, ...]:
    """Returns the weights of a mixture of experts.

    Args:
      config: with experts.
      dense: the weights of the dense model, whose feed-forward layers the first layers may have.
      part: name of the mixture in a layer.
      parts: names of an expert's matrices there, and of ours.
      more: other weights of each mixture, without prefixes.
    """
    assert config.experts is not None
    number, first = config.experts.number, config.dense_layers
    router = Weight("gate.weight", "router")
    experts = [Weight(f"experts.{{expert}}.{a}.weight", b, experts=number) for a, b in parts.items()]
    mixture = under({f"model.layers.{{}}.{part}.": f"{BLOCKS}mlp/"}, router, *experts, *more)
    found: list[Weight] = []
    for weight in dense:
        if not weight.ours.startswith(BLOCKS):
            found.append(weight)
            continue
        if first:
            ours = weight.ours.replace(BLOCKS, DENSE)
            found.append(dataclasses.replace(weight, ours=ours, layers=(0, first)))
    # Apart from the dense layers: parts of one tensor stay neighbours.
    kept = [w for w in dense if w.ours.startswith(BLOCKS) and not w.ours.startswith(f"{BLOCKS}mlp/")]
    return (*found, *(dataclasses.replace(w, layers=(first, config.num_layers)) for w in (*kept, *mixture)))


def first_dense(keys: Keys, name: str, is_dense: Sequence[bool]) -> int:
    """Returns the number of layers without experts, which must be the first ones.

    Raises:
      UserError: others have none, either, or all.
    """
    number = sum(is_dense)
    if list(is_dense) != [True] * number + [False] * (len(is_dense) - number) or number == len(is_dense):
        raise UserError(
            f"{keys.where}: by {name}, the layers without experts are "
            f"{[layer for layer, dense in enumerate(is_dense) if dense]}. Supported are first layers without experts, "
            "and experts in all others."
        )
    return number
