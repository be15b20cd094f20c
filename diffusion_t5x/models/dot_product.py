"""Dot-product attention: with a kernel that suits the device and the call, or with plain XLA."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.layers import softcap
from diffusion_t5x.models.masks import Sight
from diffusion_t5x.partitioning import cut_on, pieces_of, platform
from diffusion_t5x.shapes import FloatBKHD, FloatBQHD, FloatNHQK

logger = logging.getLogger(__name__)

QUERIES = ("batch", "length", "heads", "head_dim")
KEYS = ("batch", "keys", "kv_heads", "head_dim")
_TPU_LANES = 128  # lengths of the kernels for TPUs are multiples of this
_NAMES = {"xla": "XLA", "cudnn": "cuDNN", "splash": "splash", "flash": "flash"}
_told: set[str] = set()  # backends that the log has named


@dataclasses.dataclass(frozen=True)
class Call:
    """The properties of an attention call that decide its backend.

    Attributes:
      platform: platform of the devices: "cpu", "gpu", "tpu".
      capability: compute capability of an NVIDIA GPU, (9, 0) for Hopper; otherwise None.
      dtype: dtype of queries and keys.
      head_dim, query_length, key_length: their sizes.
      has_bias: a bias is added to the query-key products.
      has_softcap: the products are capped before that.
      whole: the queries are whole rows, not the next slots over a cache.
      length_is_cut: the mesh shards the length.
      heads_are_cut_alike: query heads and key heads are sharded over the same devices, or not at all.
    """

    platform: str
    dtype: str
    head_dim: int
    query_length: int
    key_length: int
    capability: tuple[int, int] | None = None
    has_bias: bool = False
    has_softcap: bool = False
    whole: bool = True
    length_is_cut: bool = False
    heads_are_cut_alike: bool = True


def choose(asked: str, call: Call) -> tuple[str, str]:
    """Returns the backend of a call, and the reason for it.

    Raises:
      UserError: a backend other than "auto" and "xla" was asked for and cannot run a call over whole rows.
    """
    if asked == "xla":
        return "xla", "it was asked for"
    if asked == "auto":
        asked = {"gpu": "cudnn", "tpu": "flash" if call.has_bias else "splash"}.get(call.platform, "xla")
        if asked == "xla":
            return "xla", f"no fused kernel on {call.platform.upper()}"
        reason = _refusal(asked, call)
        return ("xla", reason) if reason else (asked, "it suits device and model")
    reason = _refusal(asked, call)
    if reason and call.whole:
        raise UserError(
            f'ModelConfig.attention_backend = "{asked}" cannot be used: {reason}. Set it to "auto" or "xla", or change '
            "that."
        )
    return ("xla", reason) if reason else (asked, "it was asked for")


def _refusal(backend: str, call: Call) -> str | None:
    """Returns the reason why a kernel cannot run a call; None if it can."""
    lengths = f"{call.query_length} queries and {call.key_length} keys"
    if call.platform != ("gpu" if backend == "cudnn" else "tpu"):
        return f"{backend} does not run on a {call.platform}"
    if call.length_is_cut:
        return "the mesh cuts the length, and kernels need whole rows"
    if not call.heads_are_cut_alike:
        return "the mesh cuts query heads otherwise than those of keys and values"
    if backend == "cudnn":
        largest = 256 if call.capability and call.capability >= (9, 0) else 128
        if call.capability is None:
            return "cuDNN needs an NVIDIA GPU"
        if call.dtype not in ("bfloat16", "float16"):
            return f"cuDNN computes in bfloat16 or float16, not {call.dtype}"
        if call.head_dim % 8 or call.head_dim > largest:
            return f"cuDNN needs a head_dim that 8 divides, up to {largest} on this GPU, not {call.head_dim}"
        if call.query_length % 2 or call.key_length % 2:
            return f"cuDNN needs even lengths, not {lengths}"
        return "cuDNN has no soft cap" if call.has_softcap else None
    if min(call.query_length, call.key_length) < _TPU_LANES:
        return f"TPU kernels are not worth it for fewer than {_TPU_LANES} queries or keys, here {lengths}"
    if backend == "splash":
        return "splash attention takes no relative position bias" if call.has_bias else None
    if call.head_dim > 128 and call.head_dim % 128:
        return f"flash attention needs a head_dim up to 128 or that 128 divides, not {call.head_dim}"
    return "flash attention has no soft cap" if call.has_softcap else None


def attend(
    config: ModelConfig, query: FloatBQHD, key: FloatBKHD, value: FloatBKHD, bias: FloatNHQK | None, sight: Sight
) -> FloatBQHD:
    """Returns attention; a query that sees nothing gets the mean of all values.

    Args:
      config: sets the backend, and scale and cap of the products.
      query, key, value: projected hidden states.
      bias: added to the query-key products; one for each of some equal groups of rows.
      sight: the keys that the queries see.

    Raises:
      UserError: the config's backend cannot run this.
    """
    call = _call(config, query, key, bias, sight)
    backend, reason = choose(config.attention_backend, call)
    if call.whole and backend not in _told:  # the same in every step and layer: told once
        _told.add(backend)
        logger.info("Attention: %s (%s).", _NAMES[backend], reason)
    if backend == "xla":
        return xla(query, key, value, bias, sight, config.attention_scale, config.attention_softcap)
    return by_kernel(backend, query, key, value, bias, sight, config.attention_scale, config.attention_softcap)


def _call(config, query, key, bias, sight):
    mesh, device = jax.sharding.get_abstract_mesh(), platform()
    capability = getattr(jax.devices()[0], "compute_capability", "") if device == "gpu" else ""
    is_number = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return Call(
        platform=device,
        capability=is_number and (int(is_number[1]), int(is_number[2])),
        dtype=str(query.dtype),
        head_dim=query.shape[3],
        query_length=query.shape[1],
        key_length=key.shape[1],
        has_bias=bias is not None,
        has_softcap=config.attention_softcap is not None,
        whole=sight.whole,
        length_is_cut=pieces_of("length") > 1,
        heads_are_cut_alike=mesh.empty or cut_on(mesh, QUERIES, query.shape)[2] == cut_on(mesh, KEYS, key.shape)[2],
    )


def xla(
    query: FloatBQHD,
    key: FloatBKHD,
    value: FloatBKHD,
    bias: FloatNHQK | None,
    sight: Sight,
    scale: float,
    cap: float | None,
) -> FloatBQHD:
    """Attention in plain XLA; arguments as for `attend`."""
    if bias is not None and len(bias) > 1:
        bias = jnp.repeat(bias, len(query) // len(bias), axis=0)
    if cap is None:
        mask = sight.mask[:, None]
        return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale, implementation="xla")
    return _capped(query, key, value, bias, sight.mask, scale, cap)


def _capped(query, key, value, bias, mask, scale, cap):
    """Computes `jax.nn.dot_product_attention` with query-key products capped before the bias is added."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    logits = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, key, preferred_element_type=jnp.float32)
    logits = softcap(logits * scale, cap)
    if bias is not None:
        logits += bias.reshape(bias.shape[0], kv_heads, -1, *bias.shape[2:])
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhgqk,bkhd->bqhgd", weights, value).reshape(query.shape)


def by_kernel(
    backend: str,
    query: FloatBQHD,
    key: FloatBKHD,
    value: FloatBKHD,
    bias: FloatNHQK | None,
    sight: Sight,
    scale: float,
    cap: float | None,
) -> FloatBQHD:
    """Attention by a kernel; arguments as for `attend`. Each device runs it on its own rows and heads."""
    from diffusion_t5x.models import attention_kernels  # half a second that few machines need

    sees, groups = sight.sees, query.shape[2] // key.shape[2]
    # What the order says, no mask need say.
    given = sight.replace(mask=None) if sight.order else sight
    # Kernels give padding, or a text without inputs, something of their own, with gradients to match or without.
    mean = jnp.mean(value, axis=1, keepdims=True, dtype=jnp.float32).astype(value.dtype)
    length = query.shape[1]
    if backend != "cudnn":
        query, key, value, bias, given = _padded(query, key, value, bias, given)

    def run(query, key, value, bias, sight):
        return attention_kernels.KERNELS[backend](query, key, value, bias, sight, scale, cap)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and backend != "cudnn":  # which says itself how it is cut
        of_queries, of_keys = cut_on(mesh, QUERIES, query.shape), cut_on(mesh, KEYS, key.shape)
        of_rows = jax.sharding.PartitionSpec(of_queries[0])
        of_bias = None if bias is None else cut_on(mesh, ("batch", "heads", "length", "keys"), bias.shape)
        cuts = (of_queries, of_keys, of_keys, of_bias, of_rows)
        run = jax.shard_map(run, in_specs=cuts, out_specs=of_queries, check_vma=False)
    attended = run(query, key, value, bias, given)[:, :length]
    return jnp.where(sees[:, :, None, None], attended, jnp.repeat(mean, groups, axis=2))


def _padded(query, key, value, bias, sight):
    """Pads the arguments to TPU lengths; the padding is in no segment, so nothing attends to it."""
    queries, keys = ((0, -x.shape[1] % _TPU_LANES) for x in (query, key))

    def pad(x, by_axis):
        return x if x is None else jnp.pad(x, [by_axis.get(axis, (0, 0)) for axis in range(x.ndim)])

    sight = sight.replace(
        mask=pad(sight.mask, {1: queries, 2: keys}),
        sees=pad(sight.sees, {1: queries}),
        query_segments=pad(sight.query_segments, {1: queries}),
        key_segments=pad(sight.key_segments, {1: keys}),
    )
    key, value = pad(key, {1: keys}), pad(value, {1: keys})
    return pad(query, {1: queries}), key, value, pad(bias, {2: queries, 3: keys}), sight
