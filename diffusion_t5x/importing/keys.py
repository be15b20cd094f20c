"""Reads a config.json so that no key goes unnoticed."""

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import config_keys

REQUIRED = object()
_COUNTS = re.compile(
    r"(_size|_heads|(?<!shared)_experts|_per_tok|_group|(?<!rope)(?<!only)_layers|_dim|_buckets|_distance|_pattern|position_embeddings|^sliding_window|^d_\w+|^n_\w+)$"
)
_NUMBERS = re.compile(r"(_eps|_epsilon|_theta|_base_freq|factor|softcapping|_scalar)$")


class Keys:
    """The keys of a config.json. Keys that a family does not ask for are judged by `config_keys`.

    Args:
      values: values by name. None counts as absent, except for `nullable`.
      where: name of the config.json in messages.
      aliases: other names of keys, as in `transformers`.
      most_layers: maximum number of layers that the files can contain.

    Raises:
      UserError: a key and its alias have different values.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        aliases: Mapping[str, str] | None = None,
        most_layers: int | None = None,
    ):
        self._nulls = {name for name, value in values.items() if value is None}
        self._values = {name: value for name, value in values.items() if value is not None}
        self.where = where
        self._most_layers = most_layers
        self.asked: set[str] = set()
        for alias, name in (aliases or {}).items():
            if alias in self._values:
                value = self._values.pop(alias)
                if self._values.setdefault(name, value) != value:
                    raise UserError(
                        f"{where}: {alias} = {_show(value)} and {name} = {_show(self._values[name])} are two names of "
                        "one size: remove the wrong one."
                    )

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """Returns a key's value, or the default.

        Raises:
          UserError: there is neither, or the value is not a number although one is expected.
        """
        self.asked.add(name)
        value = self._values.get(name, default)
        if value is REQUIRED:
            raise UserError(f"{self.where} has no {name!r}.")
        if name in self._values:
            wanted = "whole number" if _COUNTS.search(name) else "number" if _NUMBERS.search(name) else None
            kinds = int if wanted == "whole number" else int | float
            if wanted and (not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf):
                raise UserError(f"{self.where}: {name} = {_show(value)} should be a positive {wanted}.")
        return value

    def nullable(self, name: str, default: Any) -> Any:
        """Returns a key's value; None if it is null, the default if it is absent."""
        return self.get(name, None if name in self._nulls else default)

    def count(self, name: str) -> int:
        """Returns a whole number that may be 0. Raises a UserError if the value is not one."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"{self.where}: {name} = {_show(value)} should be a whole number of at least 0.")
        return value

    def layers(self, name: str) -> int:
        """Returns a number of layers, each of which has its own tensors in the files.

        Raises:
          UserError: more than the files can contain, or as `get`.
        """
        count = self.get(name)
        if self._most_layers is not None and count > self._most_layers:
            raise UserError(
                f"{self.where}: {name} = {_show(count)}, but the files hold only {self._most_layers} tensors."
            )
        return count

    def require(self, name: str, *supported: Any, default: Any = None) -> Any:
        """Returns a key's value, or the default if it is absent.

        Raises:
          UserError: the value is not supported.
        """
        value = self.get(name, supported[0] if default is None else default)
        if value not in supported:
            only = " or ".join(json.dumps(each) for each in supported)
            raise UserError(f"{self.where}: {name} = {_show(value)} is not supported, only {only}.")
        return value

    def list_of(self, name: str, length: int, *supported: Any) -> list[Any] | None:
        """Returns a key's list; None if it is absent.

        Raises:
          UserError: it is not a list of this length with supported values.
        """
        values = self.get(name, None)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) != length:
            raise UserError(f"{self.where}: {name} = {_show(values)} should be a list of {length}.")
        for value in values:
            if value not in supported:
                only = " or ".join(json.dumps(each) for each in supported)
                raise UserError(f"{self.where}: {_show(value)} in {name} is not supported, only {only}.")
        return values

    def ignore(self, *names: str) -> None:
        """Ignores these keys, which add nothing to what has been read."""
        self.asked.update(names)

    def mapping(self, name: str) -> dict[str, Any]:
        """Returns an object; an empty one if it is absent. Raises a UserError if the value is none."""
        values = self.get(name, {})
        if not isinstance(values, dict):
            raise UserError(f"{self.where}: {name} = {_show(values)} should be an object.")
        return values

    def inside(self, name: str) -> "Keys":
        """Returns the keys of a nested object; no keys if it is absent."""
        return Keys(self.mapping(name), f"{self.where}, {name}")

    def updated(self, other: "Keys") -> "Keys":
        """Returns the keys updated with another object's values."""
        return Keys(self._values | other._values, self.where)

    def check_all_read(self) -> None:
        """Raises a UserError that names all keys that nobody has asked for."""
        if unread := self._unread():
            raise UserError(
                f"{self.where} has keys that are not known here, and may change what the model computes: "
                f"{_listed(unread)}."
            )

    def judge(self) -> str:
        """Judges the keys that nobody has asked for: returns a line about ignored ones, empty if there are none.

        Raises:
          UserError: keys that change what the model computes.
        """
        unread = self._unread(config_keys.QUIET)
        reasons = {name: config_keys.refusal(name, value) for name, value in unread.items()}
        if refused := {name: unread[name] for name, reason in reasons.items() if reason}:
            why = "; ".join(f"{name}: {reasons[name]}" for name in sorted(refused))
            raise UserError(
                f"{self.where} has keys that change what the model computes, and are not supported: "
                f"{_listed(refused)} ({why}). To import the model as if they were not there: "
                f"--ignore_keys={','.join(sorted(refused))}."
            )
        harmless = {name: value for name, value in unread.items() if config_keys.is_known(name)}
        unknown = {name: value for name, value in unread.items() if name not in harmless}
        said = [f"passed over, as they do not change what the model computes: {_listed(harmless)}"] if harmless else []
        if unknown:
            said.append(f"passed over, as transformers does not read them for this family: {_listed(unknown)}")
        return f"{self.where}: keys {'; and '.join(said)}." if said else ""

    def _unread(self, also: Collection[str] = ()) -> dict[str, Any]:
        return {name: value for name, value in self._values.items() if name not in self.asked and name not in also}


def _show(value: Any) -> str:
    return json.dumps(value)[:60]


def _listed(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {_show(value)}" for name, value in sorted(keys.items()))
