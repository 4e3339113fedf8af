"""Collectives read from HLO text.

The first part reads handwritten texts. The second part compiles programs whose collectives are
known with the TPU compiler.
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from runs import needs_libtpu

from msllm.pod.aot import topology_devices
from msllm.pod.collectives import axes_of, read, replica_groups
from msllm.pod.hlo import parse, shapes_of, size_of

AXES = ("data", "fsdp", "stream", "tensor")


def devices(count):
    """Stand-ins for the devices of one slice."""
    return [SimpleNamespace(id=i) for i in range(count)]


def found(text, count=4, mesh=(1, 2, 2, 1)):
    """{(kind, axes, asynchronous): (executions, bytes of one execution)} of the collectives."""
    sizes = dict(zip(AXES, mesh))
    collectives = read(text, devices(count)).collectives
    result = {
        (one.kind, axes_of(one.groups, sizes), one.asynchronous): (one.count, one.bytes)
        for one in collectives
    }
    assert len(result) == len(collectives), "two collectives share a key"
    return result


def computation(header, line):
    """The text of a computation of parameter %x that has one line."""
    return f"{header} {{\n  %x = f32[8,16]{{1,0}} parameter(0)\n  {line}\n}}\n"


def module(*lines, computations=""):
    """The text of a module whose entry computation has these lines."""
    entry = "\n".join(f"  {line}" for line in ("%x = f32[8,16]{1,0:T(8,128)} parameter(0)", *lines))
    return f"HloModule m\n{computations}\nENTRY %main (x: f32[8,16]) -> f32[8,16] {{\n{entry}\n}}\n"


GROUPS = "channel_id=1, replica_groups={{0,2},{1,3}}"


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        (f"%y = f32[16,16]{{1,0}} all-gather(%x), {GROUPS}, dimensions={{0}}", "all-gather", 1024),
        (
            f"%y = f32[4,16]{{1,0}} reduce-scatter(%x), {GROUPS}, dimensions={{0}}, to_apply=%add",
            "reduce-scatter",
            512,
        ),
        (f"%y = f32[8,16]{{1,0}} all-reduce(%x), {GROUPS}, to_apply=%add", "all-reduce", 512),
        (
            "%y = (f32[8,16]{1,0}, f32[8,16]{1,0}) "
            f"all-reduce(%x, %x), {GROUPS}, to_apply=%add",
            "all-reduce",
            1024,
        ),
        (f"%y = f32[8,16]{{1,0}} all-to-all(%x), {GROUPS}, dimensions={{0}}", "all-to-all", 512),
        (
            "%y = f32[8,16]{1,0} collective-permute(%x), source_target_pairs={{0,2},{2,0}}",
            "collective-permute",
            512,
        ),
    ],
)
def test_bytes_are_those_of_the_larger_side(line, kind, size):
    assert found(module(line)) == {(kind, ("fsdp",), False): (1, size)}
    # The asynchronous form returns a tuple. Its `done` instruction is not a second collective.
    started = line.replace(f"{kind}(", f"{kind}-start(")
    if not line.startswith("%y = ("):
        started = started.replace("%y = ", "%y = (f32[8,16]{1,0}, ")
        started = started.replace(f"}} {kind}", f"}}) {kind}")
    done = f"ROOT %z = f32[8,16]{{1,0}} {kind}-done(%y)"
    assert found(module(started, done)) == {(kind, ("fsdp",), True): (1, size)}


@pytest.mark.parametrize(
    ("opcode", "attribute"),
    [("async", "calls=%w"), ("call", "to_apply=%w"), ("custom-call", "called_computations={%w}")],
)
def test_a_collective_in_a_wrapper_that_is_started_is_asynchronous(opcode, attribute):
    wrapped = f"""
%w (p: f32[8,16]) -> f32[4,16] {{
  %p = f32[8,16]{{1,0}} parameter(0)
  ROOT %r = f32[4,16]{{1,0}} reduce-scatter(%p), {GROUPS}, dimensions={{0}}
}}
"""
    start = f"%s = ((f32[8,16]{{1,0}}), f32[4,16]{{1,0}}, u32[]) {opcode}-start(%x), {attribute}"
    text = module(
        start, f"%d = f32[4,16]{{1,0}} {opcode}-done(%s), {attribute}", computations=wrapped
    )
    assert found(text) == {("reduce-scatter", ("fsdp",), True): (1, 512)}


def loop(trips: str, body_line: str, name: str, start=0, step=1):
    """(line of a while loop, its computations).

    `trips` is the limit of the loop: a number, or "dynamic" for one that the text does not state.
    """
    kind = "(s32[]{:T(128)}, f32[8,16]{1,0})"
    computations = f"""
%{name}_condition (p: (s32[], f32[8,16])) -> pred[] {{
  %p = {kind} parameter(0)
  %limit = s32[]{{:T(128)}} constant({trips})
  %dynamic = s32[] get-tuple-element(%p), index=1
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %{"limit" if trips.isdigit() else trips}), direction=LT
}}

%{name}_body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {{
  %p = {kind} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %x = f32[8,16]{{1,0}} get-tuple-element(%p), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  {body_line}
  ROOT %out = {kind} tuple(%next, %x)
}}
"""
    lines = (
        f"%{name}_begin = s32[] constant({start})",
        f"%{name}_tuple = {kind} tuple(%{name}_begin, %x)",
        f"%{name} = {kind} while(%{name}_tuple), condition=%{name}_condition, body=%{name}_body",
    )
    return "\n  ".join(lines), computations


REDUCE = f"%y = f32[8,16]{{1,0}} all-reduce(%x), {GROUPS}, to_apply=%add"


def test_loops_multiply_the_counts_of_their_collectives():
    inner, inner_text = loop("5", REDUCE, "inner")
    outer, outer_text = loop("3", inner, "outer")
    assert found(module(outer, computations=inner_text + outer_text)) == {
        ("all-reduce", ("fsdp",), False): (15, 512)
    }


@pytest.mark.parametrize(("start", "step", "count"), [(0, 1, 7), (1, 1, 6), (0, 2, 4), (9, 1, 0)])
def test_the_trip_count_follows_from_start_step_and_limit(start, step, count):
    line, text = loop("7", REDUCE, "loop", start, step)
    assert found(module(line, computations=text)) == {
        ("all-reduce", ("fsdp",), False): (count, 512)
    }


def test_the_trip_count_that_other_backends_state_is_read():
    line, text = loop("dynamic", REDUCE, "loop")
    line += (
        ', backend_config={"known_trip_count":{"n":"11"},"known_init_step":{"init":"0","step":"1"}}'
    )
    assert found(module(line, computations=text)) == {("all-reduce", ("fsdp",), False): (11, 512)}


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    line, text = loop("dynamic", REDUCE, "loop")
    program = read(module(line, computations=text), devices(4))
    assert [one.count for one in program.collectives] == [1]
    assert program.unknown_loops == ["loop_body"]


def test_a_conditional_counts_its_largest_branch():
    def branch(name, line):
        return computation(f"%{name} (x: f32[8,16]) -> f32[8,16]", line)

    two = f"%z = f32[8,16]{{1,0}} all-reduce(%x), {GROUPS}, to_apply=%add"
    text = (
        branch("small", REDUCE)
        + branch("large", f"{REDUCE}\n  {two}")
        + branch("none", "ROOT %n = f32[8,16] copy(%x)")
    )
    branches = "branch_computations={%small, %large, %none}"
    line = f"%c = f32[8,16]{{1,0}} conditional(%i, %x, %x, %x), {branches}"
    assert len(read(module(line, computations=text), devices(4)).collectives) == 2


def chain_piece(name, chain, channel=1):
    """The text of a computation that holds one piece of an asynchronous all-gather."""
    attribute = f', frontend_attributes={{chain_id="{chain}"}}' if chain else ""
    groups = "replica_groups={{0,2},{1,3}}, dimensions={0}"
    return f"""
%{name} (p: f32[8,16]) -> f32[16,16] {{
  %p = f32[8,16]{{1,0}} parameter(0)
  ROOT %g = f32[16,16]{{1,0}} all-gather(%p), channel_id={channel}, {groups}{attribute}
}}
"""


@pytest.mark.parametrize("chained", [True, False])
def test_pieces_of_an_asynchronous_gather_count_once(chained):
    """Also if its steps are in an inner loop. Pieces share a chain, or else a channel."""

    def piece(name, chain):
        return chain_piece(name, chain if chained else "", channel=1 if chained else chain)

    pieces = piece("start.1", 1) + piece("async_collective_fusion.1", 1) + piece("done.1", 1)
    pieces += piece("start.2", 2) + piece("async_collective_fusion.2", 2) + piece("done.2", 2)

    def fusion(name, callee):
        return f"%{name} = f32[16,16]{{1,0}} fusion(%x), kind=kCustom, calls=%{callee}"

    inner, inner_text = loop("9", fusion("fusion.1", "async_collective_fusion.1"), "inner")
    lines = "\n  ".join(
        (
            fusion("async-collective-start.1", "start.1"),
            inner,
            fusion("async-collective-done.1", "done.1"),
            fusion("async-collective-start.2", "start.2"),
            fusion("fusion.2", "async_collective_fusion.2"),
            fusion("async-collective-done.2", "done.2"),
        )
    )
    outer, outer_text = loop("4", lines, "outer")
    program = read(module(outer, computations=pieces + inner_text + outer_text), devices(4))
    assert [(one.kind, one.count, one.bytes, one.asynchronous) for one in program.collectives] == [
        ("all-gather", 4, 1024, True)
    ] * 2


def test_two_collectives_on_one_channel_count_twice():
    two = f"%z = f32[8,16]{{1,0}} all-reduce(%y), {GROUPS}, to_apply=%add"
    assert len(read(module(REDUCE, two), devices(4)).collectives) == 2


@pytest.mark.parametrize("by", ["computation", "fusion"])
def test_an_all_reduce_in_a_fused_reduce_scatter_counts_as_reduce_scatter(by):
    name = "all-reduce-scatter.3" if by == "computation" else "fused_computation.3"
    caller = "fusion.3" if by == "computation" else "all-reduce-scatter.3"
    text = computation(f"%{name} (x: f32[8,16]) -> f32[4,16]", REDUCE)
    line = f"%{caller} = f32[4,16]{{1,0}} fusion(%x), kind=kCustom, calls=%{name}"
    assert found(module(line, computations=text)) == {
        ("reduce-scatter", ("fsdp",), False): (1, 512)
    }


def test_sizes_of_types():
    assert shapes_of(
        "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[5]{0}, s4[8]{0}, f32[]{:T(128)})"
    ) == [
        ("bf16", (2, 3)),
        ("pred", (5,)),
        ("s4", (8,)),
        ("f32", ()),
    ]
    shapes = (("bf16", (2, 3)), ("pred", (5,)), ("s4", (8,)), ("f32", ()), ("f8e4m3fn", (7,)))
    assert [size_of(shape) for shape in shapes] == [12, 5, 4, 4, 7]


@st.composite
def iota(draw):
    """(groups in iota form, the same groups as an array)."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(shape))))
    ids = np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1)
    size = draw(st.sampled_from([n for n in range(1, ids.size + 1) if ids.size % n == 0]))
    transposed = f"T({','.join(map(str, order))})" if len(shape) > 1 else ""
    text = f"[{ids.size // size},{size}]<=[{','.join(map(str, shape))}]{transposed}"
    return text, ids.reshape(-1, size)


@given(iota())
def test_groups_in_iota_form_and_as_lists(case):
    text, expected = case
    lists = ["{" + ",".join(map(str, group)) + "}" for group in expected.tolist()]
    for form in (text, "{" + ",".join(lists) + "}"):
        attributes = f" channel_id=1, replica_groups={form}, dimensions={{0}}, more={{1}}"
        np.testing.assert_array_equal(replica_groups(attributes, expected.size), expected)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    chosen=st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True),
    form=st.sampled_from(["mesh[%s] {%s}", "@mesh<%s> {%s}"]),
    reverse=st.booleans(),
)
def test_mesh_form_groups_the_devices_that_differ_along_the_axes(sizes, chosen, form, reverse):
    chosen = [i for i in chosen if i < len(sizes)] or [0]
    names = "abcd"
    ids = np.arange(math.prod(sizes))[:: -1 if reverse else 1]
    text = form % (
        ",".join(f"'{names[i]}'={n}" for i, n in enumerate(sizes)),
        ",".join(f"'{names[i]}'" for i in chosen),
    )
    if reverse:
        text = text.replace(" {", f", device_ids=({','.join(map(str, ids))}) {{", 1)
    groups = replica_groups(f" replica_groups={text}, use_global_device_ids=true", ids.size)
    rest = [i for i in range(len(sizes)) if i not in chosen]
    expected = ids.reshape(sizes).transpose(rest + chosen)
    np.testing.assert_array_equal(groups, expected.reshape(groups.shape))
    assert groups.shape[1] == math.prod(sizes[i] for i in chosen)
    if not reverse:
        mesh = dict(zip(names, sizes))
        assert axes_of(groups, mesh) == tuple(names[i] for i in sorted(chosen) if sizes[i] > 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=2,'b'=4] {'a','b':(2)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("{}", [list(range(8))]),
    ],
)
def test_groups_on_parts_of_axes_and_in_other_device_orders(text, expected):
    assert replica_groups(f" replica_groups={text}, dimensions={{0}}", 8).tolist() == expected


def test_an_unknown_form_of_groups_is_an_error():
    with pytest.raises(ValueError, match="not known"):
        replica_groups(" replica_groups=new<1,2>", 8)


OUTER, INNER, ROWS, WIDTH = 3, 5, 256, 1024
BLOCK = ROWS * WIDTH * 2  # bytes of the activations on a device, in bfloat16


def compiled(topology, num_slices, sizes, function, slices_along="data"):
    """(text of the compiled program, mesh).

    Each device calls function(activations [ROWS, WIDTH], weights, axis sizes).
    """
    available = topology_devices(topology, num_slices)
    if num_slices > 1:
        across = [num_slices if axis == slices_along else 1 for axis in AXES]
        inside = [size // slices for size, slices in zip(sizes, across)]
        place = mesh_utils.create_hybrid_device_mesh(
            inside, across, devices=available, allow_split_physical_axes=True
        )
    else:
        place = mesh_utils.create_device_mesh(
            sizes, devices=available, allow_split_physical_axes=True
        )
    mesh = Mesh(place, AXES)
    spread, weights = PartitionSpec(("data", "fsdp", "stream")), PartitionSpec(None, "fsdp")

    def abstract(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    run = jax.shard_map(
        lambda x, w: function(x, w, mesh.shape),
        mesh=mesh,
        in_specs=(spread, weights),
        out_specs=spread,
        check_vma=False,
    )
    lowered = jax.jit(run).lower(
        abstract((ROWS * mesh.size, WIDTH), spread), abstract((INNER, WIDTH, WIDTH), weights)
    )
    return lowered.compile().as_text(), mesh


def layers(x, w, mesh):
    """Every kind of collective, in a scan of OUTER steps around a scan of INNER steps.

    The tanh between collectives keeps the compiler from merging them.
    """

    def inner(x, w):
        return jnp.tanh(x @ lax.all_gather(w, "fsdp", axis=0, tiled=True)), None

    def outer(x, _):
        x, _ = lax.scan(inner, x, w)
        x = lax.ppermute(x, "fsdp", [(i, (i + 1) % mesh["fsdp"]) for i in range(mesh["fsdp"])])
        x = jnp.tanh(lax.all_to_all(x, "stream", split_axis=1, concat_axis=0, tiled=True)).reshape(
            x.shape
        )
        y = lax.psum_scatter(jnp.tanh(x), "stream", scatter_dimension=0, tiled=True)
        x = jnp.tanh(x) * jnp.tanh(lax.all_gather(jnp.tanh(y), "stream", axis=0, tiled=True))
        total = lax.psum(x.astype(jnp.float32).sum(0), ("fsdp", "stream"))
        return (x + jnp.tanh(total)).astype(x.dtype), None

    x, _ = lax.scan(outer, x, None, length=OUTER)
    return x * lax.psum(x, "data") if mesh["data"] > 1 else x


def sums(text, mesh):
    """{(kind, axes, over DCN): (executions, bytes of all executions)}."""
    result = {}
    for one in read(text, list(mesh.devices.flat)).collectives:
        key = (one.kind, axes_of(one.groups, dict(mesh.shape)), one.dcn)
        count, size = result.get(key, (0, 0))
        result[key] = (count + one.count, size + one.total_bytes)
    return result


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "num_slices", "sizes"),
    [
        ("v5e:2x2", 1, (1, 2, 2, 1)),
        ("v5e:4x4", 1, (2, 4, 2, 1)),
        ("v5p:2x2x2", 1, (1, 2, 4, 1)),
        ("v6e:2x4", 1, (1, 4, 2, 1)),
        ("tpu7x:2x2x1", 1, (1, 4, 2, 1)),
        ("v5e:2x2", 2, (2, 2, 2, 1)),
    ],
)
def test_collectives_of_a_compiled_program_are_those_in_its_source(topology, num_slices, sizes):
    expected = {
        ("all-gather", ("fsdp",), False): (OUTER * INNER, OUTER * INNER * WIDTH * WIDTH * 2),
        ("collective-permute", ("fsdp",), False): (OUTER, OUTER * BLOCK),
        ("all-to-all", ("stream",), False): (OUTER, OUTER * BLOCK),
        ("reduce-scatter", ("stream",), False): (OUTER, OUTER * BLOCK),
        ("all-gather", ("stream",), False): (OUTER, OUTER * BLOCK),
        ("all-reduce", ("fsdp", "stream"), False): (OUTER, OUTER * WIDTH * 4),
    }
    if sizes[0] > 1:
        expected["all-reduce", ("data",), num_slices > 1] = (1, BLOCK)
    assert sums(*compiled(topology, num_slices, sizes, layers)) == expected


@needs_libtpu
@pytest.mark.parametrize(
    ("function", "kind", "size"),
    [
        (lambda x, n: lax.psum(x, "data"), "all-reduce", BLOCK),
        (lambda x, n: lax.all_gather(x, "data", axis=0, tiled=True), "all-gather", 2 * BLOCK),
        (
            lambda x, n: lax.psum_scatter(x, "data", scatter_dimension=0, tiled=True),
            "reduce-scatter",
            BLOCK,
        ),
        (
            lambda x, n: lax.all_to_all(x, "data", split_axis=1, concat_axis=0, tiled=True),
            "all-to-all",
            BLOCK,
        ),
        (
            lambda x, n: lax.ppermute(x, "data", [(i, (i + 1) % n) for i in range(n)]),
            "collective-permute",
            BLOCK,
        ),
    ],
)
def test_transfers_between_slices_are_collectives_over_dcn(function, kind, size):
    def run(x, w, mesh):
        return jnp.tanh(function(jnp.tanh(x), mesh["data"]))

    assert sums(*compiled("v5e:2x2", 2, (2, 2, 2, 1), run)) == {(kind, ("data",), True): (1, size)}


@needs_libtpu
def test_collectives_within_a_slice_are_not_over_dcn():
    """A mesh may have its slices along any axis, here along `stream`."""

    def run(x, w, mesh):
        return jnp.tanh(lax.psum(jnp.tanh(lax.psum(jnp.tanh(x), "fsdp")), "data"))

    assert sums(*compiled("v5e:2x2", 2, (2, 2, 2, 1), run, slices_along="stream")) == {
        ("all-reduce", ("fsdp",), False): (1, BLOCK),
        ("all-reduce", ("data",), False): (1, BLOCK),
    }


@needs_libtpu
def test_a_sum_over_all_devices_has_a_part_within_and_a_part_between_slices():
    text, mesh = compiled(
        "v5e:2x4",
        2,
        (4, 2, 2, 1),
        lambda x, w, mesh: jnp.tanh(lax.psum(jnp.tanh(x), ("data", "fsdp"))),
    )
    assert sums(text, mesh) == {
        ("reduce-scatter", ("data", "fsdp"), False): (1, BLOCK),
        ("all-reduce", ("data",), True): (1, BLOCK // 4),
        ("all-gather", ("data", "fsdp"), False): (1, BLOCK),
    }


def test_a_computation_that_nothing_known_calls_is_named():
    text = chain_piece("piece", "1")
    line = "%n = f32[16,16]{1,0} novel-call(%x), runs=%piece"
    program = read(module(line, computations=text), devices(4))
    assert program.collectives == [] and program.unreached == ["piece"]
    known = line.replace("novel-call", "call").replace("runs", "to_apply")
    assert read(module(known, computations=text), devices(4)).unreached == []


def test_instructions_belong_to_their_computation():
    computations, entry = parse(module(REDUCE, computations=loop("2", REDUCE, "loop")[1]))
    assert entry == "main" and set(computations) == {"main", "loop_condition", "loop_body"}
    condition = computations["loop_condition"]
    assert condition["limit"].arguments == "2" and condition["lt"].root
    assert computations["main"]["y"].operands == ("x",)
