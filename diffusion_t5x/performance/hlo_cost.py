"""Cost of a compiled program on one device: matrix products, memory traffic, collectives; loops count every iteration.

XLA's own `cost_analysis` counts a loop's body once.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Self

from diffusion_t5x.performance.hlo import Array, Computation, Instruction, Program
from diffusion_t5x.performance.hlo_loops import trips
from diffusion_t5x.performance.hlo_products import product_flops

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# They move nothing, or what they move is counted where it is used.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "opt-barrier"),
    *("partition-id", "replica-id", "add-dependency", "copy-start", "slice-start", "dynamic-slice-start"),
}


@dataclasses.dataclass
class Cost:
    """Cost of a compiled program on one device: FLOPs, HBM bytes, collective bytes.

    Attributes:
      flops: FLOPs of matrix products (and convolutions, which the TPU compiler makes of them) and attention kernels.
      hbm_bytes: traffic between the device's main memory and its compute units: operands and results of every fusion.
      collectives: number of runs by (kind, number of devices that take part).
      sent_bytes: bytes that the device sends, by the same key: a ring's share, `(n - 1) / n` of the whole array for
        all-gather and reduce-scatter and twice that for all-reduce.
      unknown_loops: loops whose number of iterations is unknown before the program runs; each is counted as one
        iteration.
    """

    flops: float = 0
    hbm_bytes: float = 0
    collectives: collections.Counter[tuple[str, int]] = dataclasses.field(default_factory=collections.Counter)
    sent_bytes: dict[tuple[str, int], float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    unknown_loops: int = 0

    def add(self, other: Self, times: int = 1) -> None:
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        self.unknown_loops += other.unknown_loops
        for key in other.collectives:
            self.collectives[key] += times * other.collectives[key]
            self.sent_bytes[key] += times * other.sent_bytes[key]


class ProgramCost:
    """The cost of a program, one computation at a time."""

    def __init__(self, program: Program):
        self._program = program
        self._known: dict[str, Cost] = {}

    def total(self) -> Cost:
        return self._of(self._program.entry)

    def _of(self, name: str) -> Cost:
        """Returns the cost of a computation that runs by itself: the entry, a loop's body, a branch."""
        if name not in self._known:
            computation, cost = self._program.computations[name], Cost()
            channels: set[str] = set()
            for instruction in computation.instructions.values():
                self._add(cost, computation, instruction, channels)
            self._known[name] = cost
        return self._known[name]

    def _add(self, cost: Cost, computation: Computation, instruction: Instruction, channels: set[str]) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            turns = trips(self._program, computation, instruction)
            cost.unknown_loops += turns is None
            for part in ("condition", "body"):
                cost.add(self._of(instruction.called(part)), 1 if turns is None else turns)
        elif opcode == "conditional":
            names = re.findall(r"%([\w.\-]+)", instruction.attributes.split("metadata=")[0])
            cost.add(max((self._of(name) for name in names), key=lambda branch: (branch.flops, branch.hbm_bytes)))
        elif opcode in ("call", "async-start"):
            cost.add(self._of(instruction.called("to_apply|calls")))
        elif opcode == "fusion":
            for inner, within in self._inside(instruction.called("calls")):
                cost.flops += product_flops(within, inner)
                # One that runs beside other work stands in the fusion that starts it, in those beside it and in the
                # one that ends it, always with the same channel.
                channel = re.search(r"channel_id=\d+", inner.attributes)
                if _collective(inner.opcode) and not (channel and channel[0] in channels):
                    channels |= {channel[0]} if channel else set()
                    self._add_collective(cost, within, inner)
            cost.hbm_bytes += self._fusion_bytes(computation, instruction)
        elif _collective(opcode):
            self._add_collective(cost, computation, instruction)
        else:
            cost.flops += product_flops(computation, instruction)
            cost.hbm_bytes += _bytes(computation, instruction)

    def _inside(self, name: str) -> Iterator[tuple[Instruction, Computation]]:
        """Yields all instructions of a fusion, and of the fusions in it."""
        computation = self._program.computations[name]
        for instruction in computation.instructions.values():
            if instruction.opcode == "fusion":
                yield from self._inside(instruction.called("calls"))
            else:
                yield instruction, computation

    def _add_collective(self, cost: Cost, computation: Computation, instruction: Instruction) -> None:
        kind = _collective(instruction.opcode) or instruction.opcode
        operands = [array for name in instruction.operands for array in computation.instructions[name].arrays]
        results = instruction.arrays
        if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
            results = results[len(operands) :][: len(operands)]  # a tuple of operands, results and more
        # The TPU compiler has a fusion for reduce-scatter: an all-reduce of which every device takes its slice.
        users = _users(computation, instruction.name)
        if kind == "all-reduce" and users and all(user.opcode == "dynamic-slice" for user in users):
            kind, results = "reduce-scatter", tuple(array for user in users for array in user.arrays)
        devices = group_size(instruction.attributes, self._program.devices)
        largest = max(sum(array.bytes for array in arrays) for arrays in (operands, results))
        share = {"all-reduce": 2, "collective-permute": devices / max(devices - 1, 1)}.get(kind, 1)
        cost.collectives[kind, devices] += 1
        cost.sent_bytes[kind, devices] += share * largest * (devices - 1) / devices
        cost.hbm_bytes += sum(array.hbm_bytes for array in (*operands, *results))

    def _fusion_bytes(self, computation: Computation, fusion: Instruction) -> float:
        called = self._program.computations[fusion.called("calls")]
        read = sum(
            self._read(called, called.parameter(number).name, sum(x.hbm_bytes for x in arrays), arrays)
            for number, name in enumerate(fusion.operands)
            if (arrays := computation.instructions[name].arrays)
        )
        root = called.instructions[called.root]
        results = [called.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(results) != len(fusion.arrays):  # one instruction with several results
            return read + (_written(called, root) and sum(array.hbm_bytes for array in fusion.arrays))
        return read + sum(
            min(array.hbm_bytes, _written(called, result)) for array, result in zip(fusion.arrays, results, strict=True)
        )

    def _read(self, called: Computation, name: str, whole: int, arrays: tuple[Array, ...]) -> int:
        """Returns the bytes that a fusion reads of an operand of `whole` bytes."""
        if not whole:
            return 0
        total = 0
        for user in called.users(name):
            if user.opcode in ("dynamic-slice", "gather") and user.operands[0] == name:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode == "bitcast":
                total += self._read(called, user.name, whole, arrays)
            elif user.opcode == "fusion":
                inner = self._program.computations[user.called("calls")]
                for number, operand in enumerate(user.operands):
                    if operand == name:
                        total += self._read(inner, inner.parameter(number).name, whole, arrays)
            elif not _in_place(user, name):
                return whole
        return min(total, whole)


def _users(computation: Computation, name: str) -> list[Instruction]:
    """Returns the instructions that use a result, or a part of it if it is a tuple."""
    found = []
    for user in computation.users(name):
        found += _users(computation, user.name) if user.opcode == "get-tuple-element" else [user]
    return found


def _collective(opcode: str) -> str | None:
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _in_place(user: Instruction, name: str) -> bool:
    """True if a fusion only passes the operand on, or writes into it."""
    if user.opcode in ("dynamic-update-slice", "scatter"):
        return user.operands[0] == name
    return user.opcode == "tuple" or bool(_collective(user.opcode)) or "AsyncCollective" in user.attributes


def _written(called: Computation, result: Instruction) -> float:
    """Returns the maximum bytes that a fusion writes of this result."""
    while result.opcode == "bitcast":
        result = called.instructions[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in called.instructions[result.operands[1]].arrays)
    handed_on = result.opcode == "parameter" or _collective(result.opcode) or "AsyncCollective" in result.attributes
    return 0 if handed_on else math.inf


def _bytes(computation: Computation, instruction: Instruction) -> int:
    """Returns the HBM traffic of a single instruction, in bytes."""
    opcode = instruction.opcode
    is_copy = opcode in ("copy-done", "slice-done", "dynamic-slice-done")
    if opcode in _FREE or "AsyncCollective" in instruction.attributes:
        return 0
    if opcode.endswith(("-update", "-done")) and not is_copy:
        return 0
    operands = [computation.instructions[name] for name in instruction.operands]
    results = sum(array.hbm_bytes for array in instruction.arrays)
    if is_copy:  # what was started before
        source = computation.instructions[operands[0].operands[0]].arrays[0]
        return results + (instruction.arrays[0].bytes if source.in_hbm else 0)
    if opcode in ("dynamic-slice", "gather"):
        return results + (instruction.arrays[0].bytes if operands[0].arrays[0].in_hbm else 0)
    if opcode in ("dynamic-update-slice", "scatter"):
        part = operands[1 if opcode == "dynamic-update-slice" else -1]
        return 2 * sum(array.bytes for array in part.arrays) if instruction.arrays[0].in_hbm else 0
    return results + sum(array.hbm_bytes for operand in operands for array in operand.arrays)


def group_size(attributes: str, devices: int) -> int:
    """Returns the number of devices in one group of a collective."""
    if "source_target_pairs" in attributes:
        return 2
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return devices
