"""Parses the text of a compiled program (HLO) into computations of instructions."""

import dataclasses
import functools
import math
import re
from typing import Self

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_END = re.compile(r"^\}(, |\s*$)")  # a kernel's attributes go over several lines, of which one begins with braces
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


def find(pattern: str | re.Pattern[str], text: str, start: int = 0) -> re.Match[str]:
    """Returns the first match from `start` on; raises a ValueError if the text of a program has none."""
    found = re.compile(pattern).search(text, start)
    if found is None:
        raise ValueError(f"not the text of a compiled program: no {pattern} in {text[start : start + 200]!r}")
    return found


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that an instruction produces.

    Attributes:
      dtype: dtype as in HLO, "bf16".
      shape: shape on one device.
      in_hbm: it is in the device's main memory, not in a closer memory (or the host's).
    """

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = re.match(r"[a-z]+?(\d+)", self.dtype)  # pred and token have no number
        return -(-self.size * int(bits[1]) // 8) if bits else self.size * (self.dtype == "pred")

    @property
    def hbm_bytes(self) -> int:
        return self.bytes if self.in_hbm else 0

    @classmethod
    def all_in(cls, text: str) -> tuple[Self, ...]:
        """Returns the arrays of a type, with tuples flattened."""
        return tuple(
            cls(
                dtype=match[1],
                shape=tuple(int(size.lstrip("<=")) for size in match[2].split(",") if size),
                in_hbm="S(" not in (match[3] or ""),
            )
            for match in _ARRAY.finditer(text)
        )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
      name, opcode: its name and opcode.
      type: type of its result, as text.
      operands: names of instructions of the same computation; a parameter's number, a constant's value.
      attributes: everything after the operands, as text.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        return Array.all_in(self.type)

    def called(self, attribute: str) -> str:
        """Returns the computation that an attribute such as "body" names."""
        return find(rf"\b(?:{attribute})=%?([\w.\-]+)", self.attributes)[1]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order, and the name of the last, whose result is the computation's."""

    instructions: dict[str, Instruction]
    root: str

    def parameter(self, number: int) -> Instruction:
        return next(x for x in self.instructions.values() if x.opcode == "parameter" and x.operands == (str(number),))

    def users(self, name: str) -> list[Instruction]:
        return [x for x in self.instructions.values() if name in x.operands]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: name of the computation that runs.
      devices: number of devices that run it together.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses the text of `compiled.as_text()`."""
        computations: dict[str, Computation] = {}
        instructions: dict[str, Instruction] = {}
        entry = ""
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                name, instructions, root = header[2], {}, ""
                entry = name if header[1] else entry
            elif _END.match(line):
                computations[name] = Computation(instructions, root)
            elif match := _INSTRUCTION.match(line):
                instruction = _instruction(match[2], match[3])
                instructions[instruction.name] = instruction
                root = instruction.name if match[1] else root
        devices = re.search(r"num_partitions=(\d+)", text[:100_000])
        return cls(computations, entry, int(devices[1]) if devices else 1)


def _instruction(name: str, text: str) -> Instruction:
    end = _end(text, 0) if text.startswith("(") else text.index(" ")
    opcode = find(_OPCODE, text, end)
    last = _end(text, opcode.end() - 1)
    inside = text[opcode.end() : last - 1]
    is_leaf = opcode[1] in ("parameter", "constant")
    operands = (inside,) if is_leaf else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode[1], text[:end], operands, text[last:])


def _end(text: str, start: int) -> int:
    """Returns the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"no closing parenthesis: {text[:200]}")
