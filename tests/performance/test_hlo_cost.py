"""Costs that are read off compiled programs, against counts by hand and by brute force."""

import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from diffusion_t5x.performance.hlo import Program
from diffusion_t5x.performance.hlo_cost import ProgramCost, group_size


def cost(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return ProgramCost(Program.parse(jax.jit(function).lower(*arguments).compile().as_text())).total()


def layers(x, kernels):
    return jnp.sum(jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0])


def test_products_count_at_every_turn_of_a_scan():
    rows, size, depth = 8, 32, 6
    forward = depth * 2 * rows * size * size
    assert cost(layers, (rows, size), (depth, size, size)).flops == forward
    # Behind it, the gradients of the kernels and of what goes into all of them.
    found = cost(jax.grad(layers, argnums=(0, 1)), (rows, size), (depth, size, size))
    assert found.flops == 3 * forward and found.unknown_loops == 0


def test_loops_in_loops_multiply():
    def product(x):
        inner = lambda _, y: y @ x  # noqa: E731
        return jax.lax.fori_loop(0, 5, lambda _, y: jax.lax.fori_loop(2, 6, inner, y), x)

    assert cost(product, (16, 16)).flops == 5 * 4 * 2 * 16**3


def test_a_loop_that_ends_where_the_data_say_is_one_turn_and_told():
    found = cost(lambda x: jax.lax.while_loop(lambda y: jnp.sum(y) < 1, lambda y: y @ x, x), (16, 16))
    assert found.flops == 2 * 16**3 and found.unknown_loops == 1


def test_contracted_and_batch_axes():
    found = cost(lambda x, y: jnp.einsum("bhqd,bkhd->bhqk", x, y), (2, 3, 5, 7), (2, 11, 3, 7))
    assert found.flops == 2 * (2 * 3 * 5 * 11) * 7


@pytest.mark.parametrize("stride,padding,dilation", [(1, (0, 0), 1), (2, (3, 1), 1), (1, (2, 2), 3)])
def test_convolutions_count_what_meets_the_input(stride, padding, dilation):
    size, window, batch, features, results = 7, 4, 2, 3, 5

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (stride,), [padding], lhs_dilation=(dilation,))

    shape = jax.eval_shape(convolve, jnp.zeros((batch, features, size)), jnp.zeros((results, features, window))).shape
    held = {padding[0] + dilation * n for n in range(size)}
    pairs = sum(stride * at + k in held for at, k in itertools.product(range(shape[2]), range(window)))
    found = cost(convolve, (batch, features, size), (results, features, window))
    assert found.flops == 2 * batch * features * results * pairs


def test_traffic_is_what_goes_in_and_out():
    assert cost(lambda x: x + 1, (1000,)).hbm_bytes == 8000
    # A turn reads its own slice of the stack and not the whole: kernels once, and their products.
    depth, size = 16, 128
    kernels = 4 * depth * size * size
    assert kernels < cost(layers, (1, size), (depth, size, size)).hbm_bytes < 3.5 * kernels


@pytest.mark.parametrize(
    "attributes,expected",
    [
        ("channel_id=1, replica_groups={{0,2,4},{1,3,5}}, dimensions={0}", 3),
        ("replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true", 2),
        ("replica_groups={}, to_apply=%add", 8),
        ("source_target_pairs={{0,1},{1,0}}", 2),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=4], device_ids=([4,8]T(1,0)) {'a','c'}, dimensions={1}", 16),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
    ],
)
def test_group_sizes(attributes, expected):
    assert group_size(attributes, 8) == expected


COLLECTIVES = """
import functools, json
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from diffusion_t5x.performance.hlo import Program
from diffusion_t5x.performance.hlo_cost import ProgramCost

mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def body(x):  # [16, 8] on a device
    def turn(_, x):
        x = jax.lax.psum(x, "a")
        x = jax.lax.all_to_all(x, "b", 0, 0, tiled=True)
        return jax.lax.ppermute(x, "b", [(n, (n + 1) % 4) for n in range(4)])
    x = jax.lax.fori_loop(0, 5, turn, x)
    x = jax.lax.all_gather(x, "b", tiled=True)
    return jax.lax.psum_scatter(x, ("a", "b"), tiled=True)

run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False))
program = Program.parse(run.lower(jax.ShapeDtypeStruct((128, 8), jnp.float32)).compile().as_text())
cost = ProgramCost(program).total()
print(json.dumps([[*key, count, cost.sent_bytes[key]] for key, count in sorted(cost.collectives.items())]))
"""


def test_collectives_and_what_a_ring_sends_for_them(eight_devices):
    done = subprocess.run(
        [sys.executable, "-c", COLLECTIVES], env=eight_devices, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    x = 16 * 8 * 4  # bytes a device holds
    assert json.loads(done.stdout) == [
        ["all-gather", 4, 1, 4 * x * 3 / 4],
        ["all-reduce", 2, 5, 5 * 2 * x / 2],
        ["all-to-all", 4, 5, 5 * x * 3 / 4],
        ["collective-permute", 2, 5, 5 * x],
        ["reduce-scatter", 8, 1, 4 * x * 7 / 8],
    ]


TPU = """HloModule step, num_partitions=16

%all-reduce-scatter (input: bf16[2048,64]) -> bf16[512,64] {
  %input = bf16[2048,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.5 = bf16[2048,64]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=5, replica_groups=[4,4]<=[16]
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = bf16[512,64]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.5, %zero, %zero)
}

%start (x: bf16[4,64]) -> (bf16[4,64], bf16[16,64], u32[]) {
  %x = bf16[4,64]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=8, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %c = (bf16[4,64], bf16[16,64], u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (y: bf16[4,64]) -> bf16[16,64] {
  %y = bf16[4,64]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.2 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%y), channel_id=8, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %d = bf16[16,64]{1,0} custom-call(%gather.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[2048,64], b: bf16[4,64]) -> bf16[16,64] {
  %a = bf16[2048,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,64]{1,0:T(8,128)(2,1)} parameter(1)
  %fusion.1 = bf16[512,64]{1,0:T(8,128)(2,1)S(1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
  %fusion.2 = (bf16[4,64]{1,0}, bf16[16,64]{1,0}, /*index=2*/u32[]{:S(2)}) fusion(%b), kind=kCustom, calls=%start
  ROOT %fusion.3 = bf16[16,64]{1,0:T(8,128)(2,1)} fusion(%b), kind=kCustom, calls=%done
}
"""


def test_collectives_in_fusions_of_the_tpu_compiler_count_once():
    found = ProgramCost(Program.parse(TPU)).total()
    assert found.collectives == {("reduce-scatter", 4): 1, ("all-gather", 4): 1}
    assert found.sent_bytes["reduce-scatter", 4] == 2048 * 64 * 2 * 3 / 4
    # Each collective reads and writes its arrays once; what lies in nearer memory, S(1), is no traffic.
    assert found.hbm_bytes == 2 * (2048 * 64 + 4 * 64 + 16 * 64)


KERNELS = """HloModule step

ENTRY %main (q: bf16[2,4,256,64], k: bf16[2,2,128,64], s: s8[1,2,2], a: bf16[8,8]) -> (bf16[8,8], bf16[2,4,256,64]) {
  %s = s8[1,2,2]{2,1,0} parameter(2)
  %q = bf16[2,4,256,64]{3,2,1,0} parameter(0)
  %k = bf16[2,2,128,64]{3,2,1,0} parameter(1)
  %a = bf16[8,8]{1,0} parameter(3)
  %NAME.3 = bf16[2,4,256,64]{3,2,1,0} custom-call(%s, %q, %k), custom_call_target="tpu_custom_call", more={data={
"of": "{several lines}"
}}, metadata={op_name="jit(step)"}
  %b = bf16[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %both = (bf16[8,8]{1,0}, bf16[2,4,256,64]{3,2,1,0}) tuple(%b, %NAME.3)
}
"""


@pytest.mark.parametrize(
    "name,products",
    [
        ("splash_mha_fwd_segmented_residuals", 2),
        ("splash_mha_dq_no_residuals", 3),
        ("splash_mha_dkv_no_residuals", 4),
        ("flash_attention", 2),
        ("flash_mha_bwd_dq_block_q_major_512", 3),
        ("flash_mha_bwd_dkv_block_q_major_512", 4),
        ("another", 0),
    ],
)
def test_attention_kernels_count_by_their_shapes(name, products):
    found = ProgramCost(Program.parse(KERNELS.replace("NAME", name))).total()
    assert found.flops == products * 2 * (2 * 4 * 256 * 64) * 128 + 2 * 8**3  # and what stands behind


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("ragged-dot-none.2", ("512,64", "8,64,32", "512,32")), ("tgmm.3", ("64,512", "512,32", "8,64,32"))],
)
def test_kernels_of_groups_of_rows_count_each_row_once(name, shapes):
    a, b, out = (f"bf16[{shape}]{{{'2,1,0' if shape.count(',') == 2 else '1,0'}}}" for shape in shapes)
    text = f"""HloModule step

ENTRY %main (s: s32[8], a: {a}, b: {b}) -> {out} {{
  %s = s32[8]{{0}} parameter(0)
  %a = {a} parameter(1)
  %b = {b} parameter(2)
  ROOT %{name} = {out} custom-call(%s, %a, %b), custom_call_target="tpu_custom_call"
}}
"""
    assert ProgramCost(Program.parse(text)).total().flops == 2 * 512 * 64 * 32


def test_a_reduce_scatter_of_several_arrays_is_one():
    text = """HloModule step, num_partitions=4

ENTRY %main (a: f32[64], b: f32[8,16]) -> (f32[16], f32[2,16]) {
  %a = f32[64]{0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %sums = (f32[64]{0}, f32[8,16]{1,0}) all-reduce(%a, %b), channel_id=1, replica_groups=[1,4]<=[4]
  %sum.1 = f32[64]{0} get-tuple-element(%sums), index=0
  %sum.2 = f32[8,16]{1,0} get-tuple-element(%sums), index=1
  %mine.1 = f32[16]{0} dynamic-slice(%sum.1, %zero)
  %mine.2 = f32[2,16]{1,0} dynamic-slice(%sum.2, %zero, %zero)
  ROOT %both = (f32[16]{0}, f32[2,16]{1,0}) tuple(%mine.1, %mine.2)
}
"""
    found = ProgramCost(Program.parse(text)).total()
    assert found.collectives == {("reduce-scatter", 4): 1}
    assert found.sent_bytes["reduce-scatter", 4] == 4 * (64 + 8 * 16) * 3 / 4
    kept = ProgramCost(Program.parse(text.replace("tuple(%mine.1, %mine.2)", "tuple(%mine.1, %sum.2)"))).total()
    assert kept.collectives == {("all-reduce", 4): 1}
