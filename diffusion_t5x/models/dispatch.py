"""Brings tokens to their experts, which may be on other devices, and what the experts return back to the tokens."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from diffusion_t5x.models.grouped import grouped
from diffusion_t5x.models.layers import dequantizing
from diffusion_t5x.models.low_rank import LowRank
from diffusion_t5x.models.quantized import Quantized
from diffusion_t5x.partitioning import cut_on, rules_of
from diffusion_t5x.shapes import FloatBLD

Kernel = jax.Array | LowRank | Quantized
Kernels = tuple[Kernel, Kernel, Kernel]
Activation = Callable[[jax.Array], jax.Array]
FloatND = Float[jax.Array, "tokens embed"]
IntNC = Int[jax.Array, "tokens chosen"]
FloatNCD = Float[jax.Array, "tokens chosen embed"]
BoolNC = Bool[jax.Array, "tokens chosen"]


def routed(
    x: FloatBLD,
    chosen: Int[jax.Array, "batch length chosen"],
    factors: Float[jax.Array, "batch length chosen"],
    kernels: Kernels,
    activation: Activation,
    capacity_factor: float | None = None,
) -> tuple[FloatBLD, Bool[jax.Array, "batch length chosen"]]:
    """Returns the sum over a token's experts of `factor * wo(activation(wi_0 x) * wi_1 x)`, and which of them read it.

    Devices along a mesh axis that shards both experts and tokens, such as `expert`, exchange tokens. Those along an
    axis that shards experts alone, such as `tensor`, apply their own experts to the same tokens, and add the outputs.

    Args:
      x: the tokens.
      chosen, factors: see `mixture.choose`.
      kernels: `wi_0` and `wi_1` `[E, D, inner]`, and `wo` `[E, inner, D]`.
      activation: of the gate.
      capacity_factor: see `Experts`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    of_experts = () if mesh.empty else [axis for axis in rules_of(mesh)["experts"] if mesh.shape[axis] > 1]
    of_tokens = PartitionSpec() if mesh.empty else cut_on(mesh, ("batch", "length", "embed"), x.shape)
    exchange = tuple(axis for axis in of_experts if axis in jax.tree.leaves(tuple(of_tokens)))
    add = tuple(axis for axis in of_experts if axis not in exchange)

    def run(x, chosen, factors, kernels):
        held = _matrices(kernels[0])
        first = jax.lax.axis_index(add) * held if add else 0

        def read(tokens, experts):
            return _read(tokens, experts - first, kernels, activation)

        tokens, experts, shares = (each.reshape(-1, each.shape[-1]) for each in (x, chosen, factors))
        if exchange:
            held_together = held * math.prod(mesh.shape[axis] for axis in add)
            returned, kept = _exchanged(tokens, experts, shares, read, exchange, held_together, capacity_factor)
        else:
            returned, kept = read(tokens, experts), jnp.ones(experts.shape, bool)
        update = jnp.sum(returned.astype(jnp.float32) * shares[..., None], axis=1).astype(x.dtype)
        return (jax.lax.psum(update, add) if add else update).reshape(x.shape), kept.reshape(chosen.shape)

    if mesh.empty or mesh.size == 1:
        return run(x, chosen, factors, kernels)
    specs = (of_tokens, of_tokens, of_tokens, PartitionSpec((*exchange, *add)))
    run = jax.shard_map(run, in_specs=specs, out_specs=(of_tokens, of_tokens), check_vma=False)
    return run(x, chosen, factors, kernels)


def _exchanged(
    tokens: FloatND,
    chosen: IntNC,
    factors: Float[jax.Array, "tokens chosen"],
    read: Callable[[FloatND, IntNC], FloatNCD],
    axes: tuple[str, ...],
    held: int,
    capacity_factor: float | None,
) -> tuple[FloatNCD, BoolNC]:
    """Returns what the chosen experts return, 0 for those that do not read a token, and which of them do.

    Every device sends each device along `axes` a buffer of the same size and gets as large a one back. Of the choices
    that go to one device, those with the largest factors have a place in it.

    Args:
      read: returns what this device's `held` experts return for tokens, of which each has one; 0 for other numbers.
    """
    devices, (number, per_token) = jax.lax.axis_size(axes), chosen.shape
    capacity = number * min(per_token, held)  # a token's choices are different experts
    if capacity_factor is not None:
        capacity = min(capacity, math.ceil(capacity_factor * number * per_token / devices))
    chosen = chosen.reshape(-1)
    to = chosen // held
    order = jnp.lexsort((-jax.lax.stop_gradient(factors).reshape(-1), to))
    sizes = jnp.zeros(devices, jnp.int32).at[to].add(1)
    starts = jnp.cumsum(sizes) - sizes
    places = jnp.arange(capacity)
    source = order.at[starts[:, None] + places].get(mode="clip")  # [devices, capacity]
    experts = jnp.where(places < sizes[:, None], chosen[source] % held, held)
    swap = functools.partial(jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0, tiled=True)
    received = swap(tokens[source // per_token]).reshape(devices * capacity, -1)
    returned = swap(read(received, swap(experts).reshape(-1, 1)).reshape(devices, capacity, -1))
    place = jnp.argsort(order) - starts[to]
    returned = returned.at[to, place].get(mode="fill", fill_value=0)
    return returned.reshape(number, per_token, -1), (place < capacity).reshape(number, per_token)


def _read(tokens: FloatND, chosen: IntNC, kernels: Kernels, activation: Activation) -> FloatNCD:
    """Returns what experts return for the tokens that chose them; 0 for a number that has no kernels here."""
    wi_0, wi_1, wo = kernels
    held, expert = _matrices(wo), chosen.reshape(-1)
    expert = jnp.where((expert >= 0) & (expert < held), expert, held)  # others come last
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.zeros(held, jnp.int32).at[expert].add(1, mode="drop")
    is_held = (expert[order] < held)[:, None]
    # Rows that belong to no group are undefined in the kernel's output, and so are their gradients.
    rows = jnp.where(is_held, tokens[order // chosen.shape[-1]], 0)
    product = functools.partial(_grouped, sizes=sizes)
    returned = product(activation(product(rows, wi_0)) * product(rows, wi_1), wo)
    return jnp.where(is_held, returned, 0)[jnp.argsort(order)].reshape(*chosen.shape, -1)


def _matrices(kernel: Kernel) -> int:
    """Returns the number of experts whose matrices these are."""
    return (kernel.base if isinstance(kernel, LowRank) else kernel).shape[0]


def _grouped(
    x: Float[jax.Array, "rows inputs"], kernel: Kernel, *, sizes: Int[jax.Array, " experts"]
) -> Float[jax.Array, "rows outputs"]:
    """Returns the products of consecutive groups of rows with one matrix of the kernel each."""
    if isinstance(kernel, LowRank):
        update = _grouped(_grouped(x, kernel.down, sizes=sizes), kernel.up, sizes=sizes)
        return _grouped(x, kernel.base, sizes=sizes) + jnp.asarray(kernel.scale, x.dtype) * update
    if isinstance(kernel, Quantized):
        return dequantizing(functools.partial(_grouped, sizes=sizes))(x, kernel)
    return grouped(x, kernel.astype(x.dtype), sizes)
