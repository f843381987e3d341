"""Compiled programs read back: hand-written ones, and one that this machine's compiler made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments.planning.hlo import axes_of, first_group, read
from sharding.mesh import make_mesh
from tests.configs import compiled

MESH = {"data": 2, "fsdp": 3, "expert": 4, "tensor": 1}

PROGRAM = """
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[6])) -> (s32[], f32[6]) {
  %p = (s32[], f32[6]{0:T(128)}) parameter(0)
  %x = f32[6]{0} get-tuple-element(%p), index=1
  %g = (bf16[2,5]{1,0}, bf16[6,5]{1,0:T(8,128)(2,1)}) all-gather-start(%x), replica_groups=mesh['data'=2,'fsdp'=3,'expert'=4] {'fsdp'}, dimensions={0}, metadata={op_name="step/while/body/gather"}
  ROOT %r = (s32[], /*index=1*/f32[6]{0}) tuple(%i, %y)
}

%inner_condition (p.1: (s32[], f32[6])) -> pred[] {
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%outer_body (p.2: (s32[], f32[6])) -> (s32[], f32[6]) {
  %loop.1 = (s32[], /*index=1*/f32[6]{0}) while(%p.2), condition=%inner_condition, body=%inner_body
  %s = f32[4,9]{1,0} reduce-scatter(%z), replica_groups=[6,4]<=[2,3,4]T(0,1,2), dimensions={0}, to_apply=%add, metadata={op_name="step/transpose(jvp(moe))/x"}
  ROOT %r.2 = (s32[], f32[6]{0}) tuple(%i, %y)
}

%outer_condition (p.3: (s32[], f32[6])) -> pred[] {
  ROOT %less.2 = pred[] compare(%i, %j), direction=LT
}

ENTRY %main (q: f32[6]) -> f32[6] {
  %loop.2 = (s32[], f32[6]{0}) while(%q), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %r.3 = f32[8]{0} all-reduce(%q), replica_groups={{0,12},{1,13}}, to_apply=%add
  %alone = f32[8]{0} all-reduce(%q), replica_groups={{0},{1}}, to_apply=%add
  %k = f32[8]{0} custom-call(%q), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(step)/experts/grouped/call"}
  ROOT %out = f32[6]{0} get-tuple-element(%loop.2), index=1
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_run():
    found = {c.kind: c for c in read(PROGRAM, MESH).collectives}
    assert {kind: c.times for kind, c in found.items()} == {
        "all-gather": 35, "reduce-scatter": 5, "all-reduce": 1,
    }  # fmt: skip
    assert found["all-gather"].bytes == 35 * 6 * 5 * 2
    # The array before the sum, of which each of 4 devices keeps a part.
    assert found["reduce-scatter"].bytes == 5 * 4 * (4 * 9 * 4)


@pytest.mark.parametrize(
    "started, elements",
    [
        ("(f32[100]{0}, f32[200]{0}, f32[300]{0}) all-reduce-start(%a, %b, %c)", 600),
        ("f32[100]{0} all-reduce-start(%a)", 100),
        ("((f32[100]{0}), f32[100]{0}) all-reduce-start(%a)", 100),
        ("((f32[10], f32[20]), (f32[10], f32[20])) all-reduce-start(%a, %b)", 30),
        ("(f32[10]{0}, f32[30]{0}) all-gather-start(%a)", 30),
        ("((f32[10]{0}, f32[20]{0}), (f32[30]{0}, f32[60]{0})) all-gather-start(%a, %b)", 90),
        ("(f32[10]{0}, f32[10]{0}, u32[], u32[]) collective-permute-start(%a)", 10),
    ],
)
def test_of_what_is_started_the_results_count(started, elements):
    program = f"ENTRY %main (q: f32[6]) -> f32[6] {{\n  %s = {started}, replica_groups={{}}\n}}\n"
    (found,) = read(program, {"data": 3}).collectives
    assert found.bytes == 4 * elements


def test_groups_become_mesh_axes():
    found = {c.kind: (c.axes, c.group) for c in read(PROGRAM, MESH).collectives}
    assert found == {
        "all-gather": (("fsdp",), 3),
        "reduce-scatter": (("expert",), 4),
        "all-reduce": (("data",), 2),
    }


def test_kernels_are_listed_under_their_names():
    assert read(PROGRAM, MESH).kernels == {"grouped": 1}


@pytest.mark.parametrize(
    "groups, members",
    [
        ("replica_groups={{0,4,8},{1,5,9}}", [0, 4, 8]),
        ("replica_groups=[8,3]<=[24]", [0, 1, 2]),
        ("replica_groups=[8,3]<=[2,3,4]T(0,2,1)", [0, 4, 8]),
        ("replica_groups=mesh['a'=2,'b'=12] {'a'}", [0, 12]),
        ("replica_groups=mesh['a'=2,'b'=12] {'b':(1)3}", [0, 4, 8]),
        ("replica_groups=mesh['a'=2,'b'=12] {'b':(3)4}", [0, 1, 2, 3]),
        ("replica_groups={}, channel_id=1", list(range(24))),
    ],
)
def test_every_notation_for_groups_is_read(groups, members):
    assert first_group(f"x = f32[8] all-reduce(y), {groups}, to_apply=z", 24) == members


def test_axes_are_those_along_which_devices_differ():
    assert axes_of([0, 5, 10], {"data": 3, "tensor": 5}) == ("data",)
    assert axes_of(range(15), {"data": 3, "tensor": 5}) == ("data", "tensor")


def test_a_real_program_sends_what_it_was_written_to_send():
    mesh = make_mesh(jax.devices()[:8], fsdp=4, expert=2)
    spec = PartitionSpec(("fsdp", "expert"))

    def body(x):
        def turn(x, _):
            x = jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)
            total = jax.lax.psum(x, "fsdp")
            return x + 0.5 * total, None

        return jax.lax.scan(turn, x, length=6)[0]

    step = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    program = compiled(jax.jit(step), jnp.asarray(np.zeros((80, 3), np.float32)))
    found = {c.kind: c for c in read(program.as_text(), dict(mesh.shape)).collectives}
    exchanged, summed = found["all-to-all"], found["all-reduce"]
    assert (exchanged.axes, exchanged.group, exchanged.times) == (("expert",), 2, 6)
    assert (summed.axes, summed.group, summed.times) == (("fsdp",), 4, 6)
    assert exchanged.bytes == summed.bytes == 6 * 10 * 3 * 4
