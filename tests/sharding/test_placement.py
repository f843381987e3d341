"""`shard` and `local` with and without a mesh: same values and gradients, placed by the tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import local, make_mesh, shard
from sharding.placement import current_mesh, store_shardings, under_mesh

MESHES = {
    "data8": {"data": 8},
    "fsdp8": {"fsdp": 8},
    "data2-fsdp2-tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor8": {"tensor": 8},
}
B, T, D, F = 8, 3, 5, 16


def normal(seed, *shape):
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), jnp.float32)


def on_mesh(fn, mesh, *args):
    """`fn` of arguments that every device of the mesh holds whole."""
    return jax.jit(under_mesh(fn, mesh))(*jax.device_put(args, NamedSharding(mesh, P())))


@pytest.fixture(params=MESHES, ids=list(MESHES))
def mesh(request):
    return make_mesh(**MESHES[request.param])


def test_without_a_mesh_both_do_nothing():
    x_BTD = normal(0, B, T, D)
    double = lambda x: 2 * x
    assert current_mesh() is None
    assert shard(x_BTD, "BTD") is x_BTD
    assert local(double, "BTD->BTD") is double


def test_under_mesh_sets_the_mesh_for_tracing_alone():
    mesh = make_mesh()
    assert under_mesh(current_mesh, mesh)() == mesh.abstract_mesh
    assert current_mesh() is None
    assert under_mesh(current_mesh, None) is current_mesh


def test_shard_puts_an_activation_where_its_letters_say():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = on_mesh(lambda x: shard(x, "BTF"), mesh, normal(0, B, T, F))
    expected = NamedSharding(mesh, P(("data", "fsdp", "expert"), None, "tensor"))
    assert placed.sharding.is_equivalent_to(expected, placed.ndim)


def network(x_BTD, w_FD, w_down_DF):
    """Two products, a sum over the split F, and a nonlinear function between."""
    product = lambda x, w: jnp.einsum("BTD,FD->BTF", x, w)
    hidden_BTF = jnp.sin(shard(local(product, "BTD,FD->BTF")(x_BTD, w_FD), "BTF"))
    down = lambda h, w: jnp.einsum("BTF,DF->BTD", h, w)
    return local(down, "BTF,DF->BTD")(hidden_BTF, w_down_DF)


def test_products_on_shards_give_the_values_and_gradients_of_one_device(
    mesh, relative_error, limits
):
    args = normal(0, B, T, D), normal(1, F, D), normal(2, D, F)
    loss = lambda *args: jnp.sum(network(*args) ** 3)
    expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args)
    actual = on_mesh(jax.value_and_grad(loss, argnums=(0, 1, 2)), mesh, *args)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < limits["fp32"].value


def test_functions_see_shards_of_the_tables_sizes():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    seen = []

    def fn(x_BTD, w_FD):
        seen.append((x_BTD.shape, w_FD.shape))
        return jnp.einsum("BTD,FD->BTF", x_BTD, w_FD)

    call = lambda x, w: local(fn, "BTD,FD->BTF")(x, w)
    for where in (None, mesh):
        jax.eval_shape(under_mesh(call, where), normal(0, B, T, D), normal(1, F, D))
    # B over data and fsdp, F over tensor, D gathered.
    assert seen == [((B, T, D), (F, D)), ((B // 4, T, D), (F // 2, D))]


def test_whole_letters_are_not_split(mesh, relative_error, limits):
    rows = lambda tokens, table: table[tokens]
    tokens_BT = jnp.asarray(np.random.RandomState(0).randint(0, 16, (B, T)), jnp.int32)
    table_VD = normal(1, 16, D)

    def loss(table_VD):
        return jnp.sum(local(rows, "BT,VD->BTD", whole="V")(tokens_BT, table_VD) ** 2)

    expected = jax.value_and_grad(loss)(table_VD)
    actual = on_mesh(jax.value_and_grad(loss), mesh, table_VD)
    assert relative_error(actual[0], expected[0]) < limits["fp32"].value
    assert relative_error(actual[1], expected[1]) < limits["fp32"].value


def test_letters_summed_away_are_added_up_over_devices(mesh):
    x_BT = jnp.asarray(np.random.RandomState(0).randint(0, 9, (B, T)), jnp.int32)
    total = on_mesh(lambda x: local(jnp.sum, "BT->")(x), mesh, x_BT)
    assert int(total) == int(x_BT.sum())


def test_several_results():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    both = lambda x, w: (jnp.einsum("BTD,FD->BTF", x, w), jnp.einsum("BTD,FD->F", x, w))
    args = normal(0, B, T, D), normal(1, F, D)
    split = on_mesh(lambda x, w: local(both, "BTD,FD->BTF,F")(x, w), mesh, *args)
    for a, b in zip(split, both(*args), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_replicated_weights_get_one_gradient_on_all_devices(mesh):
    grad = jax.grad(lambda w, x: jnp.sum(network(x, w, normal(2, D, F)) ** 2))
    dw_FD = on_mesh(grad, mesh, normal(1, F, D), normal(0, B, T, D))
    copies = {}
    for piece in dw_FD.addressable_shards:
        copies.setdefault(str(piece.index), []).append(np.asarray(piece.data).tobytes())
    assert all(len(set(copy)) == 1 for copy in copies.values())


def test_a_tree_of_weights_is_stored_by_its_names():
    mesh = make_mesh(fsdp=4, tensor=2)
    tree = {"ffn": {"w_gate_FD": jnp.zeros((2, F, 8))}, "final_norm_D": jnp.zeros((8,))}
    shardings = store_shardings(tree, mesh)
    assert shardings["ffn"]["w_gate_FD"].spec == P(None, "tensor", ("fsdp", "expert"))
    assert shardings["final_norm_D"].spec == P(None)
    placed = jax.device_put(tree, shardings)
    assert placed["ffn"]["w_gate_FD"].addressable_shards[0].data.shape == (2, F // 2, 2)
