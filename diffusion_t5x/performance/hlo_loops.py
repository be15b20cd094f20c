"""Counts the iterations of the loops of a compiled program."""

import json
import re

from diffusion_t5x.performance.hlo import Computation, Instruction, Program, find


def trips(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """Returns the number of iterations of a loop; None if it depends on the data."""
    if match := re.search(r'"known_trip_count":(\{[^}]*\})', loop.attributes):
        return int(json.loads(match[1])["n"])
    # A counter that is compared with a constant, begins with one and grows by one, as `lax.scan` makes it.
    condition = program.computations[loop.called("condition")]
    comparison = condition.instructions[condition.root]
    if comparison.opcode != "compare" or "direction=LT" not in comparison.attributes:
        return None
    counter, bound = (condition.instructions[name] for name in comparison.operands)
    body = program.computations[loop.called("body")]
    if counter.opcode != "get-tuple-element" or bound.opcode != "constant":
        return None
    index = int(find(r"index=(\d+)", counter.attributes)[1])
    start = _constant(computation, computation.instructions[loop.operands[0]].operands[index])
    root = body.instructions[body.root]
    step = _step(body, root.operands[index], index) if root.opcode == "tuple" else None
    if step is None or start is None:
        return None
    return max(0, -(-(int(bound.operands[0]) - start) // step))


def _origin(computation: Computation, name: str) -> Instruction:
    """Returns the instruction whose result another one copies."""
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    origin = _origin(computation, name)
    is_number = origin.opcode == "constant" and re.fullmatch(r"-?\d+", origin.operands[0])
    return int(origin.operands[0]) if is_number else None


def _step(body: Computation, name: str, index: int) -> int | None:
    """Returns the increment of element `index` of the loop's state in one iteration."""
    added = _origin(body, name)
    if added.opcode != "add":
        return None
    parts = [_origin(body, operand) for operand in added.operands]
    steps = [_constant(body, part.name) for part in parts]
    element = rf"\bindex={index}\b"
    counts = [part.opcode == "get-tuple-element" and re.search(element, part.attributes) for part in parts]
    return next((step for step, counter in zip(steps, counts[::-1], strict=True) if step and counter), None)
