"""Array types of signatures, with dtype and shape.

Letters name the axes: B rows, L slots of a row, D width of a hidden state, V ids of the vocabulary. Integers are int32
and floats float32; hidden states have the model's dtype. Type checkers see plain arrays. The tests check every call of
the rooms that use these types: an axis has one size in all arguments of a call and in what it returns.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Key

Array = jax.Array | np.ndarray

KeyScalar = Key[jax.Array, ""]
IntScalar = Int[jax.Array, ""]
FloatScalar = Float[jax.Array, ""]

KeyB = Key[jax.Array, "batch"]
IntB = Int[jax.Array, "batch"]
FloatB = Float[jax.Array, "batch"]
BoolB = Bool[jax.Array, "batch"]

# A number for each row that meets all slots of the row.
BoolB1 = Bool[jax.Array, "batch 1"]
IntB1 = Int[jax.Array, "batch 1"]

IntBL = Int[jax.Array, "batch length"]
FloatBL = Float[jax.Array, "batch length"]
BoolBL = Bool[jax.Array, "batch length"]

# Arrays that may also be on the host.
AnyIntBL = Int[Array, "batch length"]
AnyBoolBL = Bool[Array, "batch length"]

FloatBLD = Float[jax.Array, "batch length embed"]
FloatBLV = Float[jax.Array, "batch length vocab"]

# Axes of attention: queries and keys in place of slots, heads, and a width of each.
BoolBQK = Bool[jax.Array, "batch queries keys"]
IntBQ = Int[jax.Array, "batch queries"]
FloatBQD = Float[jax.Array, "batch queries embed"]
FloatBQHD = Float[jax.Array, "batch queries heads head_dim"]
FloatBKHD = Float[jax.Array, "batch keys kv_heads head_dim"]
FloatBIHD = Float[jax.Array, "batch inputs kv_heads head_dim"]
FloatNHQK = Float[jax.Array, "groups heads queries keys"]
FloatNBLHD = Float[jax.Array, "layers batch length kv_heads head_dim"]
