"""Collectives are read as the programs make them; the costs follow from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from experiments.hlo import Branch, Collective, Cost, collectives, cost, split, total_cost

DEVICES = 8
RING = [(i, (i + 1) % DEVICES) for i in range(DEVICES)]


def compiled(f, *shapes):
    """The program of ``f`` on one device's rows of arrays that are sharded over 8 devices."""
    mesh = jax.make_mesh((DEVICES,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=jax.P("i"), out_specs=jax.P("i"), check_vma=False)
    # A leaf of shape (5, 3) on each device is one of (40, 3).
    arguments = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct((DEVICES * shape[0], *shape[1:]), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x),
    )
    return jax.jit(mapped).lower(*arguments).compile()


# Each with what one device holds: 5 x 3 numbers, 60 bytes.
PROGRAMS = {
    "psum": (lambda x: lax.psum(x, "i"), "all-reduce", 60, 8),
    "all_gather": (lambda x: lax.all_gather(x, "i"), "all-gather", 8 * 60, 8),
    "ppermute": (lambda x: lax.ppermute(x, "i", RING), "collective-permute", 60, 8),
    "two devices exchange": (
        lambda x: lax.ppermute(x, "i", [(0, 1), (1, 0)]),
        "collective-permute",
        60,
        2,
    ),
    "psum_scatter": (
        lambda x: lax.psum_scatter(jnp.tile(x, (8, 1)), "i", tiled=True),
        "reduce-scatter",
        8 * 60,
        8,
    ),
    "all_to_all": (
        lambda x: lax.all_to_all(jnp.tile(x, (8, 1)), "i", 0, 0, tiled=True),
        "all-to-all",
        8 * 60,
        8,
    ),
    "groups": (
        lambda x: lax.psum(x, "i", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]]),
        "all-reduce",
        60,
        4,
    ),
    "bfloat16": (lambda x: lax.psum(x.astype(jnp.bfloat16), "i"), "all-reduce", 30, 8),
    "boolean": (
        lambda x: lax.ppermute(x > 0, "i", RING),
        "collective-permute",
        15,
        8,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_collective(name):
    f, kind, size, group = PROGRAMS[name]
    found = collectives(compiled(f, (5, 3)))
    if name in ("bfloat16", "boolean"):  # a CPU may widen them
        (one,) = found
        assert (one.kind, one.group) == (kind, group)
        assert one.bytes in (size, 2 * size, 4 * size)
    else:
        assert found == [Collective(kind, size, group)]


def test_no_collective():
    assert collectives(compiled(lambda x: x + 1, (5, 3))) == []
    # Nothing goes to another device.
    alone = [[i] for i in range(DEVICES)]
    f = lambda x: lax.psum(x, "i", axis_index_groups=alone)  # noqa: E731
    assert collectives(compiled(f, (5, 3))) == []


def test_a_tree_in_one_collective():
    f = lambda x, y: lax.psum({"x": x, "y": [y, x[0]]}, "i")  # noqa: E731
    (one,) = collectives(compiled(f, (5, 3), (7,)))
    assert one == Collective("all-reduce", 4 * (15 + 7 + 3), 8)


def test_loop_and_branches():
    def f(x):
        def body(i, x):
            return lax.ppermute(x, "i", RING) + 1

        x = lax.fori_loop(0, 3, body, x)
        x = lax.while_loop(lambda x: jnp.sum(lax.psum(x, "i")) < 9, lambda x: x + 1, x)
        return lax.switch(
            lax.psum(jnp.sum(x), "i").astype(int) % 3,
            [lambda x: x, lambda x: lax.psum(x, "i"), lambda x: lax.fori_loop(0, 2, body, x)],
            x,
        )

    loop, condition, index, second, third = collectives(compiled(f, (5, 3)))
    assert loop == Collective("collective-permute", 60, 8, 3)
    assert condition == Collective("all-reduce", 60, 8, None)
    assert index == Collective("all-reduce", 4, 8)
    ((name, *_),) = second.branches
    assert second == Collective("all-reduce", 60, 8, 1, (Branch(name, 1, 3),))
    assert third == Collective("collective-permute", 60, 8, 2, (Branch(name, 2, 3),))


GPU = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}

%wrapped (p: f32[8]) -> f32[2] {
  %p = f32[8]{0:T(256)} parameter(0)
  ROOT %scatter = f32[2]{0} reduce-scatter(%p), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
}

ENTRY main (x: f32[8], y: c64[3,2]) -> f32[8] {
  x = f32[8]{0:T(256)} parameter(0)
  %y = c64[3,2]{1,0} parameter(1)
  %start = (f32[8]{0}, c64[3,2]{1,0}) all-reduce-start(f32[8]{0:T(256)} x, c64[3,2]{1,0} %y), replica_groups={}, to_apply=%add
  %done = (f32[8]{0}, c64[3,2]{1,0}) all-reduce-done(%start)
  %gather = (f32[8]{0}, f32[16]{0}) all-gather-start(x), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  %gathered = f32[16]{0} all-gather-done(%gather)
  %async = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(x), calls=%wrapped
  %scattered = f32[2]{0} async-done(%async), calls=%wrapped
  %pass = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(x), source_target_pairs={{0,1},{1,0},{2,2}}
  ROOT %passed = f32[8]{0} collective-permute-done(%pass)
}
"""  # noqa: E501


def test_asynchronous_pairs_count_once():
    assert collectives(GPU) == [
        Collective("all-reduce", 4 * 8 + 8 * 6, 4),
        Collective("all-gather", 64, 2),
        Collective("reduce-scatter", 32, 4),
        Collective("collective-permute", 32, 2),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ENTRY ", "", "ENTRY"),
        ("replica_groups={}", "replica_groups=@mesh", "replica groups"),
        ("all-gather-start", "collective-broadcast", "collective-broadcast"),
    ],
)
def test_text_that_is_not_understood(old, new, message):
    with pytest.raises(ValueError, match=message):
        collectives(GPU.replace(old, new))


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3}}", 4),
        ("[2,2]<=[4]", 2),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", 2),
    ],
)
def test_replica_groups(groups, size):
    found = collectives(GPU.replace("replica_groups={}", f"replica_groups={groups}"))
    assert found[0].group == size


# Costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sent", "hops"),
    [
        ("all-reduce", 2 * 3 / 4 * 100, 6),
        ("all-gather", 75, 3),
        ("reduce-scatter", 75, 3),
        ("all-to-all", 75, 3),
        ("collective-permute", 100, 1),
    ],
)
def test_cost(kind, sent, hops):
    collective = Collective(kind, bytes=100, group=4)
    assert cost(collective) == cost(collective, 4) == Cost(sent, hops)
    assert cost(collective, 1) == Cost(0, 0)
    assert total_cost([collective, collective], 4) == Cost(2 * sent, 2 * hops)
    repeated = Collective(kind, bytes=100, group=4, times=5)
    assert total_cost([repeated]) == Cost(5 * sent, 5 * hops)


def test_what_conditionals_add():
    def make(size, *branches):
        return Collective("collective-permute", size, 8, 1, branches)

    one_of_two = make(10, Branch("a", 1, 2))
    each_of_two = [make(20, Branch("b", 0, 2)), make(20, Branch("b", 1, 2))]
    cheap, dear = make(1, Branch("c", 0, 2)), make(30, Branch("c", 1, 2))
    nested = make(7, Branch("c", 0, 2), Branch("d", 0, 2))
    always, sometimes = split([make(5), one_of_two, *each_of_two, cheap, dear, nested])
    assert always == [make(5), make(20), make(1)]
    assert sometimes == [[make(10)], [make(7)], [make(30)]]
