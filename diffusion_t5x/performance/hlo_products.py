"""Floating-point operations of the matrix products, convolutions and kernels of a compiled program."""

import functools
import math
import re

import numpy as np

from diffusion_t5x.performance.hlo import Computation, Instruction, find

# Attention kernels of JAX by their names, and how many products of queries by keys by head_dim each computes.
_KERNELS = (
    (re.compile(r"splash_m[hq]a_fwd|flash_attention"), 2),
    (re.compile(r"splash_m[hq]a_dq|flash_mha_bwd_dq"), 3),
    (re.compile(r"splash_m[hq]a_dkv|flash_mha_bwd_dkv"), 4),
)
# Kernels of products of rows with one matrix of several, and of the matrices' gradients.
_GROUPED = re.compile(r"ragged-dot-none|tgmm")


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of a matrix product, a convolution or a kernel on one device; otherwise 0."""
    if instruction.opcode == "dot":
        left = computation.instructions[instruction.operands[0]].arrays[0]
        axes = find(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
        return 2 * instruction.arrays[0].size * math.prod(left.shape[int(axis)] for axis in axes.split(",") if axis)
    if instruction.opcode == "custom-call":
        return _kernel_flops(computation, instruction)
    return _convolution_flops(computation, instruction) if instruction.opcode == "convolution" else 0


def _kernel_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs for all pairs of queries and keys, although a kernel may skip masked blocks; or for all rows.

    Rows of a mixture's buffers that are not in use cost nothing, but nobody knows their number.
    """
    if 'custom_call_target="tpu_custom_call"' not in instruction.attributes:
        return 0
    operands = [array for name in instruction.operands for array in computation.instructions[name].arrays[:1]]
    floats = [array for array in operands if "f" in array.dtype]
    if _GROUPED.match(instruction.name):
        return 2.0 * floats[0].size * instruction.arrays[0].shape[-1]
    products = next((count for name, count in _KERNELS if name.match(instruction.name)), 0)
    return 2.0 * products * floats[0].size * floats[1].shape[-2] if products else 0


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs, without products with padding or dilation holes, which batched products have."""
    left, right = (computation.instructions[name].arrays[0] for name in instruction.operands)
    labels = find(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    of_left, of_right, of_result = labels[1], labels[2], labels[3]
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    window = {
        key: [tuple(map(int, size.split("_"))) for size in values.split("x")]
        for key, values in re.findall(
            r"(\w+)=([\d_x\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.attributes) or ("", ""))[1]
        )
    }
    pairs = 1
    for number, label in enumerate(sorted(label for label in of_left if label.isdigit())):
        get = lambda key, default: window.get(key, [default] * (number + 1))[number]  # noqa: B023, E731
        pairs *= _valid_pairs(
            left.shape[of_left.index(label)],
            instruction.arrays[0].shape[of_result.index(label)],
            right.shape[of_right.index(label)],
            get("stride", (1,))[0],
            get("pad", (0, 0))[0],
            get("lhs_dilate", (1,))[0],
            get("rhs_dilate", (1,))[0],
        )
    batch = left.shape[of_left.index("b")] // int(groups[1] if groups else 1)
    features = instruction.arrays[0].shape[of_result.index("f")]
    return 2.0 * batch * features * right.shape[of_right.index("i")] * pairs


@functools.cache
def _valid_pairs(
    size: int, results: int, window: int, stride: int, padding: int, left_dilation: int, right_dilation: int
) -> int:
    """Returns the number of (result, window element) pairs that meet an element of the input."""
    at = np.arange(results)[:, None] * stride + np.arange(window)[None] * right_dilation - padding
    return int(np.sum((at >= 0) & (at % left_dilation == 0) & (at // left_dilation < size)))
