"""Checks that a model is used as it was trained: the only place that compares a checkpoint's record with settings."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Self

from diffusion_t5x.checkpointing.checkpoints import OpenCheckpoint
from diffusion_t5x.checkpointing.record import Record, class_name, describe, modes_of
from diffusion_t5x.errors import OtherModel, UserError
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.training.lora import Lora

logger = logging.getLogger(__name__)

# Fields of a ModelConfig that do not change what the model computes, or only how precisely. Arrays have the
# vocabulary's size in their shapes. `shifted` matters to diffusion alone, see `Agreement`.
_FREE = {"vocab_size", "dropout_rate", "dtype", "scan_unroll", "remat", "attention_backend", "max_length", "shifted"}
_SIZES = {"embed_dim", "num_layers", "num_heads", "head_dim", "mlp_dim", "num_kv_heads"}
_ROTARY = {
    "rotary_base", "rotary_dim", "rotary_factor", "rotary_stretched", "rotary_ramp", "local_rotary_base",
    "unrotated_layers",
}  # fmt: skip
_RELATIVE = {"relative_buckets", "relative_max_distance", "causal_buckets"}
# The gin files of objectives/ and decoding/ by the attention and noise of a mode.
_FILES = {
    ("causal", None): "autoregressive",
    ("prefix", None): "autoregressive",
    ("bidirectional", "mask"): "masked",
    ("bidirectional", "uniform"): "sundae",
    ("bidirectional", "resize"): "resizing",
    ("block_causal", "mask"): "block",
    ("block_causal", "uniform"): "block_uniform",
    ("block_drafts", "mask"): "drafts",
}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Compares the record of a checkpoint with the settings of a run.

    Attributes:
      path: the checkpoint's path, for messages.
      record: how it was trained. Unknown values are not compared.
      setting: the name of the setting that allows a mismatch: a gin setting such as "infer.infer.allow_mismatch", or an
        argument in Python.
      allowed: its value; if True, mismatches are logged instead of raised.
    """

    path: str
    record: Record
    setting: str
    allowed: bool = False

    @classmethod
    def of(cls, checkpoint: OpenCheckpoint, setting: str, allowed: bool) -> Self:
        """Returns the agreement with a checkpoint."""
        return cls(str(checkpoint), checkpoint.record, setting, allowed)

    def check(self, model: ModelConfig, users: Iterable[object] = ()) -> None:
        """Checks a reader of a checkpoint.

        Args:
          model: the model's config.
          users: objectives and decoders that use the model; None is skipped.

        Raises:
          UserError: it is another model, or was not trained for such a use.
        """
        self.check_model(model)
        self._judge([fault for user in users if user is not None for fault in self._misuses(model, user)])

    def check_model(self, model: ModelConfig) -> None:
        """Raises a UserError if the checkpoint's parameters would compute a different function from the trained one."""
        if other := other_settings(self.record.model, model):
            message = describe_other(other)
            if not self.allowed:
                hint = "" if _SIZES & other.keys() else f" {self._force()}"
                raise OtherModel(f"{self.path}: {message} Set the same.{hint}", self.record.model)
            logger.warning("%s: %s", self.path, message)

    def check_resumed(self, model: ModelConfig, objective: Objective, lora: Lora | None) -> None:
        """Checks a run that continues from its own checkpoint.

        Raises:
          UserError: it would continue with another model, objective or LoRA.
        """
        self.check_model(model)
        faults = []
        trained, now = self.record.objective, describe(objective)
        other_modes = self.record.modes and modes_of(objective) and modes_of(objective) != self.record.modes
        if trained and (class_name(trained) != class_name(now) or other_modes):
            faults.append(
                f"{self.path} was trained by {class_name(trained)} ({_in_words(self.record.modes)}), but here "
                f"train.objective is {class_name(now)} ({_in_words(modes_of(objective))}). Continue with the same one, "
                f"or start another run from it: another MODEL_DIR and --gin.INITIAL_CHECKPOINT_PATH={self.path}."
            )
        else:
            faults += self._shifts(model, objective)
        self._judge(faults)
        if (trained_by := self.record.lora) != (lora_now := lora and lora.describe()):
            raise UserError(
                f"{self.path} was trained with train.lora = {trained_by}, but here it is {lora_now}: continue with "
                "the former, or start another run with a new MODEL_DIR and this INITIAL_CHECKPOINT_PATH."
            )

    def check_initial(self, model: ModelConfig, objective: Objective) -> None:
        """Checks a run that starts from another run's checkpoint; its objective may teach the model new modes.

        So may another `reads_start`.

        Raises:
          UserError: it is another model, or a diffusion model that would be read in other slots than in training.
        """
        self.check_model(dataclasses.replace(model, reads_start=self.record.model.get("reads_start", True)))
        self._judge(list(self._shifts(model, objective)))

    def _misuses(self, model: ModelConfig, user: object) -> Iterable[str]:
        learned = self.record.modes
        for mode in modes_of(user) if learned else ():
            if not any(trained.serves(mode) for trained in learned):
                yield (
                    f"{self.path}: the model is trained for {_in_words(learned)}; {type(user).__name__} is for {mode}. "
                    f"{_remedy(user, mode, learned[0])}"
                )
                return
        yield from self._shifts(model, user)

    def _shifts(self, model: ModelConfig, user: object) -> Iterable[str]:
        """Yields a fault if a diffusion model would be read in other slots; autoregressive reading never differs."""
        trained = self.record.shifted
        if trained is not None and trained != model.shifted and not getattr(user, "autoregressive", False):
            yield (
                f"{self.path}: the model is trained with ModelConfig.shifted = {trained}; here it is {model.shifted}. "
                "Give adaptation/shifted.gin in training and in decoding, or in neither."
            )

    def _judge(self, faults: list[str]) -> None:
        if faults and not self.allowed:
            raise UserError(" ".join([*faults, self._force()]))
        for fault in faults:
            logger.warning("%s", fault)

    def _force(self) -> str:
        flag = f"--gin.{self.setting}" if "." in self.setting else self.setting
        return f"(To do it anyway: {flag}=True.)"


def other_settings(trained: Mapping[str, Any], now: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the fields in which two models compute different functions or have parameters of different shapes.

    Args:
      trained: fields of a ModelConfig; missing ones have their defaults, and unknown ones are ignored.
      now: the other model.

    Returns:
      The trained value and the other one, by name; {} if nothing is known about the trained model.
    """
    known = {field.name: trained[field.name] for field in dataclasses.fields(ModelConfig) if field.name in trained}
    try:
        then = ModelConfig(**known)
        before, after = _function(then), _function(now)
    except TypeError:  # not even the sizes are known
        return {}
    names = (name for name in before | after if before.get(name, "unused") != after.get(name, "unused"))
    fields = {name: (getattr(then, name) if name in known else None, getattr(now, name)) for name in names}
    return {name: values for name, values in fields.items() if values[0] != values[1]}  # others follow from these


def describe_other(other: Mapping[str, tuple[Any, Any]]) -> str:
    """Describes the result of `other_settings` in a sentence."""
    values = ", ".join(f"{name} = {trained!r} (here {now!r})" for name, (trained, now) in other.items())
    return f"The checkpoint's model has ModelConfig.{values}."


def _function(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a model that decide its function, with dependent defaults filled in."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    values |= {"num_kv_heads": config.kv_heads, "logits_scale": config.readout_scale, "rotary_dim": config.rotated_dim}
    if config.experts:
        values["experts"] = dataclasses.replace(config.experts, balance_weight=0, bias_rate=0)
        if config.experts.dense_layers == 0:
            del values["mlp_dim"]
    values["local_layers"] = tuple(config.local_layers or ())
    unused = _RELATIVE if config.position != "relative" else set()
    unused |= _ROTARY if config.position != "rotary" else set()
    if not any(values["local_layers"]):
        unused |= {"local_layers", "window", "local_rotary_base"}
    if config.rotary_factor == 1:
        unused |= {"rotary_stretched", "rotary_ramp"}
    for name in ("rotary_stretched", "rotary_ramp", "unrotated_layers"):  # lists, where they were read from JSON
        values[name] = None if values[name] is None else tuple(values[name])
    learned = {"max_length": config.max_length} if config.position == "learned" else {}
    return {name: value for name, value in values.items() if name not in unused} | learned


def _in_words(modes: Iterable[Mode]) -> str:
    return " and for ".join(map(str, modes)) or "what is not declared"


def _remedy(user: object, mode: Mode, learned: Mode) -> str:
    """Returns the settings with which a model is used in a mode that it has learned."""
    name = type(user).__name__
    if mode.noise is None and learned.noise is None:
        return f"Set --gin.{name}.prefix={learned.attention == 'prefix'}."
    block = f"--gin.BLOCK_SIZE={learned.block_size}" if learned.block_size else ""
    if learned.blocks_from != mode.blocks_from:
        block = " ".join(filter(None, [block, f"--gin.BLOCKS_FROM='\"{learned.blocks_from}\"'"]))
    if (mode.attention, mode.noise) == (learned.attention, learned.noise):
        return f"Set {block}."
    folder = "objectives" if hasattr(user, "loss") else "decoding"
    file = _FILES.get((learned.attention, learned.noise))
    prefix = "--gin.AutoregressiveDecoder.prefix=True" if learned.attention == "prefix" and folder == "decoding" else ""
    flags = " ".join(filter(None, [f"--gin_file={folder}/{file}.gin", block, prefix]))
    return f"Give {flags}." if file else f"Use an objective or decoder for {learned}."
