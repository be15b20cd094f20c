"""LoRA (arXiv 2106.09685): the model is frozen, and each chosen matrix gets a trained low-rank update."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from diffusion_t5x.checkpointing.assignment import Rule, compile_pattern
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError, check_choices, did_you_mean
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.frozen import Axes, FrozenDtype, cut, freeze, frozen_axes
from diffusion_t5x.models.layers import normal
from diffusion_t5x.models.low_rank import LowRank
from diffusion_t5x.models.quantized import FewBits, Quantized
from diffusion_t5x.models.transformer import ModelDefinition, Params, is_matrix
from diffusion_t5x.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA settings: which matrices get low-rank updates and which parameters are trained in full.

    A name in `targets` or `whole` is a regular expression for the end of a parameter's name: "query" means the query
    matrices of every attention, "decoder/blocks/mlp/wo" those of one stack. Each layer and each expert has its own
    factors.

    Attributes:
      rank: rank of the updates.
      alpha: updates are multiplied by `alpha / rank`.
      targets: matrices of the layers that get low-rank updates.
      whole: parameters that are trained in full, such as "embedding", which contains the row of MASK.
      base_dtype: dtype of frozen matrices and embeddings; norms and biases stay float32. If `ModelConfig.dtype` is
        bfloat16, "bfloat16" does not change what a step computes. "int8" and "nf4" quantize the matrices of the layers
        (see `models.quantized`); embeddings and the output matrix are then in `ModelConfig.dtype`.
      drafts_only: updates apply only to drafts (gated LoRA, arXiv 2507.11851), so that token by token the model writes
        the same as before training. For the objective `Drafts`.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: Sequence[str] = ("query", "key", "value", "out", "wi_[01]", "wo")
    whole: Sequence[str] = ()
    base_dtype: FrozenDtype = "float32"
    drafts_only: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"Lora.rank must be at least 1, not {self.rank}.")
        check_choices(self)
        for field in ("targets", "whole"):
            names = getattr(self, field)
            if isinstance(names, str):
                raise UserError(f'Lora.{field} must be a list of names, such as ["{names}"], not a string.')
            object.__setattr__(self, field, tuple(names))
        if not self.targets:
            raise UserError("Lora.targets must name at least one matrix.")
        if self.drafts_only and self.whole:
            raise UserError(
                f"Lora.drafts_only does not change the model, but Lora.whole trains {', '.join(self.whole)}: "
                "set --gin.LORA_WHOLE=()."
            )

    def describe(self) -> dict[str, Any]:
        """Returns its fields as JSON-serialisable values; `drafts_only`, which older records do not have, if set."""
        fields = dataclasses.asdict(self) | {"targets": list(self.targets), "whole": list(self.whole)}
        return {name: value for name, value in fields.items() if name != "drafts_only" or value}


def define(config: ModelConfig, vocabulary: TokenIds, lora: Lora | None = None) -> ModelDefinition:
    """Returns the definition of the model to train, in full or with LoRA."""
    return ModelDefinition(config, vocabulary) if lora is None else LoraDefinition(config, vocabulary, lora)


def over(frozen_dtype: FewBits | None, lora: Lora | None, has_teacher: bool) -> Lora | None:
    """Returns the settings with a base of this dtype; None leaves them.

    Raises:
      UserError: there is neither LoRA nor a teacher, so nothing is frozen.
    """
    if frozen_dtype and not (lora or has_teacher):
        raise UserError(
            f"FROZEN_DTYPE = {frozen_dtype!r} quantizes what is frozen, and nothing is: there is neither LoRA nor a "
            "teacher. Give runs/lora.gin after the other files, or --gin.FROZEN_DTYPE=None."
        )
    return dataclasses.replace(lora, base_dtype=frozen_dtype) if lora and frozen_dtype else lora


def start_of(own: Params, trained: Params) -> Params:
    """Returns the parameters of the plain model from which a LoRA run started, without a copy of what is frozen.

    Args:
      own: those of its parameters that the run trains in full, as they were.
      trained: the run's parameters; their updates are left out.
    """
    whole = traverse_util.flatten_dict(own, sep="/")
    others = traverse_util.flatten_dict(trained, sep="/")
    bases = {name: leaf.base if isinstance(leaf, LowRank) else leaf for name, leaf in others.items()}
    return traverse_util.unflatten_dict(bases | whole, sep="/")


def of_drafts(described: Mapping[str, Any] | None) -> Lora | None:
    """Returns the settings that `Lora.describe` described if they are of drafts only; else None."""
    return Lora(**described) if described and described.get("drafts_only") else None


def check_drafts(lora: Lora | None, objective: Objective) -> None:
    """Raises a UserError if drafts are to be trained and more than these would be, or the other way round."""
    if objective.trains_drafts and not (lora and lora.drafts_only):
        raise UserError(
            f"{type(objective).__name__} trains drafts without changing the model: give runs/lora.gin, "
            "--gin.LORA_DRAFTS_ONLY=True and --gin.LORA_WHOLE=()."
        )
    if lora and lora.drafts_only and not objective.trains_drafts:
        raise UserError(
            f"Lora.drafts_only trains drafts alone, but {type(objective).__name__} trains the text: give "
            "objectives/drafts.gin, or --gin.LORA_DRAFTS_ONLY=False."
        )


@dataclasses.dataclass(frozen=True)
class LoraDefinition(ModelDefinition):
    """A model with a `LowRank` in place of each targeted parameter.

    Raises:
      UserError: a name matches no parameter, or a target is not a matrix of the layers or is also to be trained in
        full.
    """

    lora: Lora

    def __post_init__(self) -> None:
        super().__post_init__()
        if odd := [x for x in self._targets if not ("layers" in self._axes[x] and is_matrix(self._axes[x]))]:
            raise UserError(
                f"Lora.targets matches {', '.join(odd)}: not a matrix of the layers. Lora.whole trains any parameter."
            )
        if self.lora.drafts_only and (experts := [x for x in self._targets if "experts" in self._axes[x]]):
            raise UserError(
                f"Lora.drafts_only does not reach experts, but Lora.targets matches {', '.join(sorted(experts))}. Set "
                '--gin.LORA_TARGETS=\'["query", "key", "value", "out"]\'.'
            )
        if self.lora.drafts_only and self.config.experts and self.config.experts.bias_rate:
            raise UserError("Lora.drafts_only does not change the model, but Experts.bias_rate does: set it to 0.")
        if both := self._targets & self._whole:
            raise UserError(f"Both Lora.targets and Lora.whole match {', '.join(sorted(both))}.")

    def restore_rules(self, others: Sequence[Rule] = ()) -> tuple[Rule, ...]:
        """Returns restore rules for plain parameters: matrices become bases; factors and their average start fresh.

        Raises:
          UserError: one of them matches a base, which LoRA's own rules restore.
        """
        for pattern, _ in others:
            matches = compile_pattern(pattern).fullmatch
            for name in sorted(self._targets):
                if matches(f"params/{name}") or matches(f"params/{name}/base"):
                    raise UserError(
                        f"The restore rule {pattern!r} matches params/{name}, whose base LoRA reads from the parameter "
                        "of that name itself. Leave Lora.targets out of the rule, or export that checkpoint first."
                    )
        whole = "|".join(map(re.escape, sorted(self._whole)))
        return (r"params/(.*)/base", r"params/\1"), (rf"params/.*/(down|up)|ema/(?!({whole})$).*", None), *others

    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters: `down` is normal with variance 1 / inputs, `up` is zero."""
        base_key, factors_key = jax.random.split(key)
        return self.adapt(super().init(base_key), factors_key)

    def abstract(self) -> Params:
        return jax.eval_shape(self.adapt, super().abstract(), jax.random.key(0))

    def axes(self) -> Params:
        def of_factors(name: str, axes: Axes) -> LowRank:
            stacked, inputs, outputs = cut(axes, axes)  # heads are cut, never what is in them
            base = frozen_axes(axes, self.lora.base_dtype)
            return self._low_rank(base, (*stacked, inputs[0], "rank"), (*stacked, "rank", outputs[0]))

        def of_other(name: str, axes: Axes) -> Axes | Quantized:
            return axes if name in self._whole else frozen_axes(axes, self.lora.base_dtype)

        return self._map(of_factors, of_other, super().axes())

    def trained(self) -> Params:
        return self._map(
            lambda name, _: self._low_rank(False, True, True), lambda name, _: name in self._whole, super().trained()
        )

    def only_whole(self, plain: Params) -> Params:
        """Returns those of the plain model's parameters that are trained in full."""
        leaves = traverse_util.flatten_dict(plain, sep="/")
        return traverse_util.unflatten_dict({name: leaves[name] for name in sorted(self._whole)}, sep="/")

    def adapt(self, params: Params, key: jax.Array) -> Params:
        """Returns parameters of the plain model with new factors."""
        rank = self.lora.rank
        numbers = {name: number for number, name in enumerate(sorted(self._targets))}

        def with_factors(name: str, matrix: jax.Array) -> LowRank:
            stacked, inputs, outputs = cut(self._axes[name], matrix.shape)
            size = math.prod(inputs)
            down = normal(1 / size)(jax.random.fold_in(key, numbers[name]), (*stacked, size, rank), jnp.float32)
            up = jnp.zeros((*stacked, rank, math.prod(outputs)), jnp.float32)
            return self._low_rank(self._freeze(name, matrix), down, up)

        def without(name: str, array: jax.Array) -> jax.Array | Quantized:
            return array if name in self._whole else self._freeze(name, array)

        return self._map(with_factors, without, params)

    def _freeze(self, name: str, array: jax.Array) -> jax.Array | Quantized:
        return freeze(array, self._axes[name], self.lora.base_dtype, self.config.dtype)

    def _low_rank(self, base: Any, down: Any, up: Any) -> LowRank:
        return LowRank(base, down, up, self.lora.alpha / self.lora.rank, self.lora.drafts_only)

    def _map(self, on_target: Callable[[str, Any], Any], on_other: Callable[[str, Any], Any], tree: Params) -> Params:
        """Maps a tree of the plain model's form: each leaf becomes the result of a function of its name and value."""
        leaves = traverse_util.flatten_dict(tree, sep="/")
        return traverse_util.unflatten_dict(
            {name: (on_target if name in self._targets else on_other)(name, leaf) for name, leaf in leaves.items()},
            sep="/",
        )

    @functools.cached_property
    def _axes(self) -> dict[str, Axes]:
        """The plain model's logical axes, by name."""
        return traverse_util.flatten_dict(super().axes(), sep="/")

    @functools.cached_property
    def _targets(self) -> frozenset[str]:
        return _matching("targets", self.lora.targets, self._axes)

    @functools.cached_property
    def _whole(self) -> frozenset[str]:
        return _matching("whole", self.lora.whole, self._axes)


def _matching(field: str, patterns: Iterable[str], names: Iterable[str]) -> frozenset[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            compiled = re.compile(f"(.*/)?({pattern})")
        except re.error as error:
            raise UserError(f"Lora.{field}: {pattern!r} is not a regular expression: {error}.") from error
        if not (matching := {name for name in names if compiled.fullmatch(name)}):
            ends = {name.split("/", cuts)[-1] for name in names for cuts in range(name.count("/") + 1)}
            raise UserError(
                f"Lora.{field}: no parameter's name ends in {pattern!r}.{did_you_mean(pattern, ends)} "
                f"There are {', '.join(sorted(names))}."
            )
        found |= matching
    return frozenset(found)
