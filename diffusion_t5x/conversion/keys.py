"""Reading a config.json so that nothing in it goes unnoticed."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from diffusion_t5x.errors import UserError

REQUIRED = object()
_COUNTS = re.compile(
    r"(_size|_heads|_layers|_dim|_buckets|_distance|_pattern|position_embeddings|^sliding_window|^d_\w+|^n_\w+)$"
)
_NUMBERS = re.compile(r"(_eps|_epsilon|_theta|_base_freq|factor|softcapping|_scalar)$")
# What says nothing about the function that a model computes without dropout.
_HARMLESS = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward",
    "classifier_dropout", "decoder_start_token_id", "dropout_rate", "dtype", "eos_token_id", "finetuning_task",
    "gradient_checkpointing", "id2label", "initializer_factor", "initializer_range", "is_decoder", "label2id",
    "max_window_layers", "model_type", "n_positions", "output_attentions", "output_hidden_states", "output_past",
    "pad_token_id", "problem_type", "return_dict", "task_specific_params", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip


class Keys:
    """The keys of a config.json. Those that nobody has asked for when all is read are refused by name.

    Args:
      values: by name. None is as good as absent.
      where: what to call it in messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values = {name: value for name, value in values.items() if value is not None}
        self._where = where
        self._asked = set(_HARMLESS)

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """A key's value, or the default.

        Raises:
          UserError: there is neither, or it is no number where one is wanted.
        """
        self._asked.add(name)
        value = self._values.get(name, default)
        if value is REQUIRED:
            raise UserError(f"{self._where} has no {name!r}.")
        if name in self._values:
            wanted = "whole number" if _COUNTS.search(name) else "number" if _NUMBERS.search(name) else None
            kinds = int if wanted == "whole number" else int | float
            if wanted and (not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf):
                raise UserError(f"{self._where}: {name} = {json.dumps(value)[:60]} should be a positive {wanted}.")
        return value

    def require(self, name: str, *supported: Any, default: Any = None) -> Any:
        """A key's value, or where it is absent the default.

        Raises:
          UserError: it is none of the values supported.
        """
        value = self.get(name, supported[0] if default is None else default)
        if value not in supported:
            only = " or ".join(json.dumps(each) for each in supported)
            raise UserError(f"{self._where}: {name} = {json.dumps(value)} is not supported, only {only}.")
        return value

    def require_each(self, name: str, supported: Any) -> None:
        """Raises a UserError if a key's list holds anything else."""
        values = self.get(name, [])
        if not isinstance(values, list):
            raise UserError(f"{self._where}: {name} = {json.dumps(values)[:60]} should be a list.")
        for value in values:
            if value != supported:
                raise UserError(
                    f"{self._where}: {json.dumps(value)} in {name} is not supported, only {json.dumps(supported)}."
                )

    def ignore(self, *names: str) -> None:
        """These keys mean nothing beside what has been read."""
        self._asked.update(names)

    def inside(self, name: str) -> "Keys":
        """The keys of an object within; none where it is absent."""
        values = self.get(name, {})
        if not isinstance(values, dict):
            raise UserError(f"{self._where}: {name} = {json.dumps(values)[:60]} should be an object.")
        return Keys(values, f"{self._where}, {name}")

    def check_all_read(self) -> None:
        """Raises a UserError that names the keys nobody has asked for."""
        unknown = {name: value for name, value in self._values.items() if name not in self._asked}
        if unknown:
            listed = ", ".join(f"{name} = {json.dumps(value)[:60]}" for name, value in sorted(unknown.items()))
            raise UserError(
                f"{self._where} has keys that are not known here, and may change what the model computes: {listed}."
            )
