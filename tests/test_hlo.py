"""Reading compiled programs: products, messages and memory, against counts made by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import config_of
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data2vec_jax.core import sharding
from data2vec_jax.core.run import Run
from data2vec_jax.plan import hlo
from data2vec_jax.tasks import pretrain


def program_of(function, *args):
    return hlo.read(jax.jit(function).lower(*args).compile().as_text())


def test_products_in_loops_count_as_often_as_they_run():
    x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
    nested = lambda x, w: lax.scan(  # noqa: E731
        lambda x, w: (lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None), x, w
    )[0]
    program = program_of(nested, x, w)
    assert program.flops == 2 * 8 * 16 * 16 * 5 * 3
    assert program.unknown_loops == 0


def test_a_loop_of_unknown_length_is_said_and_counts_once():
    def until_large(x):
        return lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: jnp.sin(x @ x), x)

    program = program_of(until_large, jnp.ones((4, 4)))
    assert program.unknown_loops == 1
    assert program.flops == 2 * 4**3


def pairs(given, kernel, stride, padding, spread=1):
    """(output, tap) pairs of one axis that meet an input: the definition, one by one."""
    length = (given - 1) * spread + 1
    outputs = (length + 2 * padding - kernel) // stride + 1
    places = (o * stride + k - padding for o in range(outputs) for k in range(kernel))
    return sum(0 <= p < length and p % spread == 0 for p in places)


@pytest.mark.parametrize(
    "length, kernel, stride, padding, spread, groups",
    [(20, 3, 1, 0, 1, 1), (21, 10, 5, 0, 1, 1), (16, 5, 1, 2, 1, 4), (7, 3, 1, 2, 2, 1)],
)
def test_convolutions(length, kernel, stride, padding, spread, groups):
    x, w = jnp.ones((3, length, 8)), jnp.ones((kernel, 8 // groups, 12))
    convolve = functools.partial(
        lax.conv_general_dilated,
        window_strides=(stride,),
        padding=[(padding, padding)],
        lhs_dilation=(spread,),
        feature_group_count=groups,
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    text = jax.jit(convolve).lower(x, w).as_text("hlo")  # before the CPU's own rewriting
    taps = pairs(length, kernel, stride, padding, spread)
    assert hlo.read(text).flops == 2 * 3 * taps * (8 // groups) * 12


def test_convolutions_by_cudnn():
    """As compiled for an H100: 1-d, a window of 10, stride 5, and its two gradients."""
    x, kernel, y = "bf16[2,1600,6]{2,1,0}", "bf16[8,10,3]{2,1,0}", "bf16[2,319,8]{2,1,0}"
    text = "ENTRY main {\n"
    for name, array in (("x", x), ("k", kernel), ("y", y)):
        text += f"  %{name} = {array} parameter(0)\n"
    for call, given, result in (
        ("Forward", "%x, %k", y),
        ("BackwardFilter", "%x, %y", kernel),
        ("BackwardInput", "%y, %k", x),
    ):
        text += f"  %{call} = ({result}, u8[0]{{0}}) custom-call({given}), "
        text += "window={size=10 stride=5}, dim_labels=b0f_o0i->b0f, feature_group_count=2, "
        text += f'custom_call_target="__cudnn$conv{call}"\n'
    found = [w for w in hlo.read(text + "}\n").work if w.flops]
    assert [w.flops for w in found] == [2 * 2 * pairs(1600, 10, 5, 0, 1) * 3 * 8] * 3
    assert [w.bytes for w in found] == [2 * (2 * 1600 * 6 + 8 * 10 * 3 + 2 * 319 * 8)] * 3


def test_kernels_of_attention():
    """As compiled: ours says what it computes, cuDNN's gives the shape of its weights."""
    q, statistics = "bf16[2,197,12,64]{3,2,1,0}", "f32[2,12,197]{2,1,0}"
    text = f"ENTRY main {{\n  %q = {q} parameter(0)\n  %s = {statistics} parameter(1)\n"
    weights = '"intermediate_tensor_shape": {"dimensions": ["2", "12", "197", "197"]}'
    text += f"  %a = ({q}, u8[0]{{0}}) custom-call(%q, %q, %q), custom_call_target="
    text += f'"__cudnn$fmhaSoftmax", backend_config={{{weights}}}\n'
    text += f"  %b = ({q}, {q}, {q}) custom-call(%q, %q, %q, %s, %q, %q), custom_call_target="
    text += f'"__cudnn$fmhaSoftmaxBackward", backend_config={{{weights}}}\n'
    text += f'  %c = {q} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", '
    text += 'metadata={op_name="jit(f)/attention/pallas_call"}, backend_config='
    text += '{"custom_call_config":{"cost_estimate":{"flops":"1234","transcendentals":"5"}}}\n'
    array, product = 2 * 2 * 197 * 12 * 64, 2 * 2 * 12 * 197 * 197 * 64
    work = hlo.read(text + "}\n").work
    assert [w.flops for w in work] == [2 * product, 5 * product, 1234]
    assert [w.bytes for w in work] == [4 * array, 8 * array + 4 * 2 * 12 * 197, 4 * array]
    assert hlo.kernels(text) == {"attention": 1}


def test_messages_in_loops_count_as_often_as_they_run():
    mesh = sharding.make_mesh(2, 4)
    split, rows = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, sharding.BATCH)
    w = jax.ShapeDtypeStruct((6, 64, 128), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=rows)

    def forward(w, x):
        layer = lambda x, w: (jnp.tanh(x @ sharding.gather(w))[:, :64], None)  # noqa: E731
        return jnp.sum(lax.scan(layer, x, w)[0])

    with jax.set_mesh(mesh):
        program = program_of(forward, w, x)
    gathers = [c for c in program.collectives if c.kind == "all-gather"]
    assert sum(c.times for c in gathers) == 6
    assert {(c.bytes, c.group) for c in gathers} == {(64 * 128 * 4, 4)}
    (total,) = [c for c in program.collectives if c.kind == "all-reduce"]
    assert (total.bytes, total.times, total.group) == (4, 1, 8)
    assert program.summary()["all-gather"] == {"count": 6, "bytes": 6 * 64 * 128 * 4}


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("{{0},{1}}", 1),
        ("[2,8]<=[16]", 8),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}", 4),
        ("mesh['a'=8,'b'=4] {'a','b'}", 32),
    ],
)
def test_group_sizes(groups, size):
    assert hlo.group_size(f", channel_id=1, replica_groups={groups}, dimensions={{2}}") == size


# What libtpu writes, in small: messages inside fusions, arrays in the cache, sums between slices.
TPU = """HloModule jit_step, is_scheduled=true

%start (p: bf16[8,32]) -> (bf16[8,32], bf16[32,32]) {
  %p = bf16[8,32]{1,0:T(8,128)S(1)} parameter(0)
  %all-gather.1 = bf16[32,32]{1,0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3}}, \
dimensions={0}, metadata={op_name="jit(step)/encoder/while/body/gather"}, backend_config={\
"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %s = (bf16[8,32]{1,0}, bf16[32,32]{1,0}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%beside (q: bf16[8,32], x: bf16[16,32], w: bf16[32,64]) -> bf16[16,64] {
  %q = bf16[8,32]{1,0} parameter(0)
  %x = bf16[16,32]{1,0} parameter(1)
  %w = bf16[32,64]{1,0} parameter(2)
  %all-gather.2 = bf16[32,32]{1,0} all-gather(%q), channel_id=3, replica_groups={{0,1,2,3}}, \
dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"0"}}
  ROOT %c = bf16[16,64]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

%scatter (g: f32[32,32]) -> f32[8,32] {
  %g = f32[32,32]{1,0} parameter(0)
  %all-reduce.1 = f32[32,32]{1,0} all-reduce(%g), channel_id=1, replica_groups={{0,1,2,3}}, \
to_apply=%add
  %zero = s32[] constant(0)
  ROOT %d = f32[8,32]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,32}
}

%layer (stack: bf16[6,32,64], i: s32[]) -> bf16[1,32,64] {
  %stack = bf16[6,32,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %none = s32[] constant(0)
  ROOT %slice = bf16[1,32,64]{2,1,0} dynamic-slice(%stack, %i, %none, %none), \
dynamic_slice_sizes={1,32,64}
}

%body (t: (s32[], bf16[16,32], bf16[6,32,64])) -> (s32[], bf16[16,32], bf16[6,32,64]) {
  %t = (s32[], bf16[16,32]{1,0}, bf16[6,32,64]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %y = bf16[16,32]{1,0:S(1)} get-tuple-element(%t), index=1
  %ws = bf16[6,32,64]{2,1,0} get-tuple-element(%t), index=2
  %f = bf16[1,32,64]{2,1,0} fusion(%ws, %n), kind=kLoop, calls=%layer
  %begin = (bf16[8,32]{1,0}, bf16[32,32]{1,0}) fusion(%y), kind=kCustom, calls=%start
  %product = bf16[16,64]{1,0:S(1)} fusion(%y, %y, %f), kind=kOutput, calls=%beside
  ROOT %out = (s32[], bf16[16,32]{1,0}, bf16[6,32,64]{2,1,0}) tuple(%n, %y, %ws)
}

%turns (t: (s32[], bf16[16,32], bf16[6,32,64])) -> pred[] {
  %limit = s32[] constant(6)
  %state = (s32[], bf16[16,32]{1,0}, bf16[6,32,64]{2,1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  ROOT %lt = pred[] compare(%count, %limit), direction=LT
}

ENTRY %main (a: (s32[], bf16[16,32], bf16[6,32,64]), b: f32[32,32]) -> f32[8,32] {
  %a = (s32[], bf16[16,32]{1,0}, /*index=2*/bf16[6,32,64]{2,1,0}) parameter(0)
  %b = f32[32,32]{1,0} parameter(1)
  %loop = (s32[], bf16[16,32]{1,0}, bf16[6,32,64]{2,1,0}) while(%a), condition=%turns, body=%body
  %copy-start = (f32[32,32]{1,0:S(1)}, f32[32,32]{1,0}, u32[]{:S(2)}) copy-start(%b)
  %copy-done = f32[32,32]{1,0:S(1)} copy-done(%copy-start)
  %sum = f32[8,32]{1,0} fusion(%copy-done), kind=kCustom, calls=%scatter, \
metadata={op_name="jit(step)/transpose(jvp())/sum"}
  %token = token[] after-all()
  %send = (f32[8,32]{1,0}, u32[], token[]) send(%sum, %token), channel_id=9, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %send-done = token[] send-done(%send), channel_id=9
  ROOT %copy = f32[8,32]{1,0} copy(%sum)
}
"""


def test_what_libtpu_writes():
    program = hlo.read(TPU)
    gather, scatter, between = program.collectives
    where = "jit(step)/encoder/while/body/gather"
    assert gather == hlo.Collective("all-gather", 32 * 32 * 2, 6, 4, True, where)
    assert scatter[:5] == ("reduce-scatter", 32 * 32 * 4, 1, 4, False)
    assert scatter.where == "jit(step)/transpose(jvp())/sum"
    assert between[:3] == (hlo.BETWEEN_SLICES, 8 * 32 * 4, 1)
    assert program.flops == 6 * 2 * 16 * 32 * 64

    layer, product, prefetch, copy = program.work
    assert layer.bytes == 2 * 32 * 64 * 2 + 4  # one layer is read and written, not the stack
    assert product.bytes == 32 * 64 * 2  # everything but the weights is in the cache
    assert (prefetch.bytes, prefetch.overlaps) == (32 * 32 * 4, True)
    assert copy.bytes == 2 * 8 * 32 * 4


STACK = """HloModule step

%take (stack: f32[6,8,32], i: s32[]) -> f32[8,32] {
  %stack = f32[6,8,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %none = s32[] constant(0)
  %slice = f32[1,8,32]{2,1,0} dynamic-slice(%stack, %i, %none, %none), dynamic_slice_sizes={1,8,32}
  ROOT %flat = f32[8,32]{1,0} bitcast(%slice)
}

%add_to (sums: f32[6,8,32], from: f32[6,8,32], i: s32[]) -> f32[6,8,32] {
  %sums = f32[6,8,32]{2,1,0} parameter(0)
  %from = f32[6,8,32]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %none = s32[] constant(0)
  %layer = f32[8,32]{1,0} fusion(%from, %i), kind=kLoop, calls=%take
  %row = f32[1,8,32]{2,1,0} bitcast(%layer)
  ROOT %put = f32[6,8,32]{2,1,0} dynamic-update-slice(%sums, %row, %i, %none, %none)
}

ENTRY %main (sums: f32[6,8,32], from: f32[6,8,32], i: s32[]) -> f32[6,8,32] {
  %sums = f32[6,8,32]{2,1,0} parameter(0)
  %from = f32[6,8,32]{2,1,0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  ROOT %f = f32[6,8,32]{2,1,0} fusion(%sums, %from, %i), kind=kLoop, calls=%add_to
}
"""


def test_a_layer_of_a_stack_is_read_and_written_alone():
    (work,) = hlo.read(STACK).work
    assert work.bytes == 2 * 8 * 32 * 4


@pytest.mark.parametrize("name", ["speech_v1", "vision_v2", "text_v2"])
def test_the_analytic_count_is_that_of_the_program(name):
    """Student, teacher, clones, front end, decoder: products of the compiled step on one device."""
    config = config_of(name).to_dict()
    config["model"]["width"] = 64  # or the monitor's own product, of width x width, would show
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        task = pretrain.abstract_task(config)
        run = Run(config, task, mesh)
        batch = task.shapes[-1]
        lowered = run._jit_step.lower(run.abstract, batch)
    counted = hlo.read(lowered.compile().as_text()).flops
    assert counted == pytest.approx(task.flops(batch), rel=0.1)


def test_sizes_of_arrays():
    shape = "(pred[3], s4[8]{0}, bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f8e4m3fn[4], token[], f32[])"
    assert [a.bytes for a in hlo.arrays(shape)] == [3, 4, 12, 4, 0, 4]
    assert [a.main for a in hlo.arrays(shape)] == [True, True, False, True, True, True]
    assert np.prod(hlo.arrays("f32[]")[0].dims) == 1


@pytest.mark.parametrize("waits", [False, True])
def test_messages_of_a_loop_and_beside_it_are_in_order_if_one_needs_the_other(waits):
    def of_a_device(x, y):
        total = lax.scan(lambda c, x: (jnp.sin(c) + lax.psum(x, "data"), None), y, x)[0]
        if waits:
            y = jnp.where(total > 0, y, 2 * y)
        return total, lax.psum(y, "data")

    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    run = jax.shard_map(
        of_a_device,
        mesh=mesh,
        in_specs=(P(None, "data"), P("data")),
        out_specs=P("data"),
        check_vma=False,
    )
    text = jax.jit(run).lower(jnp.ones((3, 8)), jnp.ones(8)).compile().as_text()
    assert len(hlo.read(text).collectives) == 2
    assert len(hlo.unordered(text)) == (0 if waits else 1)
