"""JAX's fused attention kernels with one signature: `[heads, Lq, Lk]` scores are never materialised.

TPU kernels get a device's own rows and heads. Arguments are query `[B, Lq, heads, D]`, key and value
`[B, Lk, kv_heads, D]`, bias float32 `[n, heads, Lq, Lk]` or None, the queries' sight (with a mask only if no order
expresses it), the scale of the products, and their cap or None. Each returns `[B, Lq, heads, D]`; values of queries
that see nothing are undefined.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as pallas_flash
from jax.experimental.pallas.ops.tpu import splash_attention as pallas_splash

from diffusion_t5x.models.masks import Sight, same_segment

_HIDDEN = pallas_flash.DEFAULT_MASK_VALUE  # what a bias says of a key that is not seen


def cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, sight: Sight, scale: float, cap: None
) -> jax.Array:
    """cuDNN's flash attention; it has no segments, so they become a mask (one for all heads).

    JAX adds bias and mask into one array, `[B, heads, Lq, Lk]` with a bias, otherwise `[B, 1, Lq, Lk]`.
    """
    mask = sight.mask if sight.order is None else same_segment(sight.query_segments, sight.key_segments)
    if bias is not None:
        bias = bias.astype(query.dtype)
        bias = bias if len(bias) == 1 else jnp.repeat(bias, len(query) // len(bias), axis=0)
    is_causal = sight.order == "before"
    return jax.nn.dot_product_attention(
        query, key, value, bias, mask[:, None], scale=scale, is_causal=is_causal, implementation="cudnn"
    )


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: None, sight: Sight, scale: float, cap: float | None
) -> jax.Array:
    """Splash attention for TPUs; it skips blocks that the order or the mask hides completely."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * scale, key, value))
    shape = (query.shape[2], key.shape[2])
    queries, keys = (_block(length) for length in shape)
    make = functools.partial(
        pallas_splash.make_splash_mha_single_device,
        block_sizes=pallas_splash.BlockSizes(
            block_q=queries, block_kv=keys, block_q_dkv=queries, block_kv_dkv=keys, block_q_dq=queries, block_kv_dq=keys
        ),
        attn_logits_soft_cap=cap,
    )
    if sight.order is None:

        def by_mask(mask, *row):
            kernel = make(mask[None])
            # It asks this of Python, and has made an array of it.
            kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
            return kernel(*row)

        attended = _by_row(by_mask, (sight.mask, query, key, value))
    else:
        seen = pallas_splash.CausalMask(shape) if sight.order == "before" else pallas_splash.FullMask(shape)
        kernel = make(pallas_splash.MultiHeadMask([seen] * query.shape[1]))
        segments = pallas_splash.SegmentIds(jnp.asarray(sight.query_segments), jnp.asarray(sight.key_segments))
        attended = jax.vmap(kernel)(query, key, value, segments)
    return jnp.swapaxes(attended, 1, 2)


def flash(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, sight: Sight, scale: float, cap: None
) -> jax.Array:
    """Pallas flash attention for TPUs, row by row, so that the bias and its gradient exist once for all rows."""
    heads = query.shape[2]
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * scale, key, value))
    shape = (heads, query.shape[2], key.shape[2])
    queries, keys = _block(shape[1]), _block(shape[2])
    kernel = functools.partial(
        pallas_flash.flash_attention,
        causal=sight.order == "before",
        block_sizes=pallas_flash.BlockSizes(
            block_q=queries,
            block_k_major=keys,
            block_k=keys,
            block_b=1,
            block_q_major_dkv=queries,
            block_k_major_dkv=keys,
            block_k_dkv=keys,
            block_q_dkv=queries,
            block_k_major_dq=keys,
            block_k_dq=keys,
            block_q_dq=queries,
        ),
    )
    bias = jnp.zeros((1, *shape), jnp.float32) if bias is None else bias

    def some_rows(bias, rows):
        def one(sight, *row):
            row = tuple(x[None] for x in row)
            if sight.order is None:
                return kernel(*row, jnp.where(sight.mask, bias, _HIDDEN)[None])[0]
            segments = pallas_flash.SegmentIds(sight.query_segments[None], sight.key_segments[None])
            return kernel(*row, bias[None], segments)[0]

        return _by_row(one, rows)

    rows = jax.tree.map(lambda x: x.reshape(len(bias), -1, *x.shape[1:]), (sight, query, key, value))
    attended = jax.lax.map(lambda part: some_rows(*part), (bias, rows))
    return jnp.swapaxes(attended.reshape(query.shape), 1, 2)


KERNELS: dict[str, Callable[..., jax.Array]] = {"cudnn": cudnn, "splash": splash, "flash": flash}


def _block(length: int) -> int:
    """Returns the number of slots per kernel block: the largest of a few sizes that divides the length."""
    return next(size for size in (512, 256, 128) if length % size == 0)


def _by_row(function, rows):
    """Applies a function to the rows of its arguments, one after another.

    The kernel's outputs are kept for the backward pass, and each row's mask is recomputed: otherwise the masks of all
    rows would be kept.
    """
    kept = ("pallas_call", "custom_vjp_call")  # the kernel, and flash attention's around it
    function = jax.checkpoint(function, policy=lambda primitive, *_, **__: primitive.name in kept)
    return jax.lax.map(lambda row: function(*row), rows)
