"""Rules do not freeze more than they have to: what should stay prunable, in the cases that matter.

The oracle of the other files cannot see this: a rule that freezes everything is always right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphprune.axes.terms import Atom, leaves
from graphprune.axes.typing import Dims
from graphprune.graph import Graph

from .oracle import Program, check, terms

aten = torch.ops.aten


def program() -> Program:
    def draw(strategy: Any) -> Any:
        raise AssertionError("nothing is random here")

    return Program(draw)


def axes(p: Program, *nodes: fx.Node) -> list[list[str]]:
    """For each dimension of the nodes its atoms: size, and ``f`` or ``s`` when frozen or statistical."""
    typing = check(p)
    return [[_text(a) for a in leaves(t)] for n in nodes for t in terms(typing.dims[n])]


def graph_of(p: Program) -> Graph:
    """The graph of a program that was checked."""
    assert p.checked is not None
    return p.checked


def dims(p: Program, node: fx.Node) -> Dims:
    """The type of a node of a program that was checked."""
    return graph_of(p).typing.dims[node]  # type: ignore[return-value]


def _text(atom: Atom) -> str:
    return f"{atom.size}{'f' if atom.frozen else 's' if atom.statistical else ''}"


def test_convolution_channels() -> None:
    p = program()
    x, weight, bias = p.plain(2, 4, 5, 5), p.plain(6, 4, 3, 3), p.plain(6)
    y = p(aten.conv2d.default, x, weight, bias)
    assert axes(p, weight, bias, y) == [["6"], ["4"], ["3f"], ["3f"], ["6"], ["2"], ["6"], ["3f"], ["3f"]]


def test_depthwise_convolution_has_one_axis() -> None:
    p = program()
    x, weight = p.plain(2, 6, 5), p.plain(6, 1, 3)
    y = p(aten.conv1d.default, x, weight, None, [1], [1], [1], 6)
    assert axes(p, x, weight, y)[1] == ["6"]
    assert len({*leaves(dims(p, x)[1]), *leaves(dims(p, weight)[0]), *leaves(dims(p, y)[1])}) == 1


def test_grouped_convolution_has_a_group_axis() -> None:
    p = program()
    x, weight = p.plain(1, 8, 5), p.plain(12, 2, 3)
    y = p(aten.conv1d.default, x, weight, None, [1], [1], [1], 4)
    assert axes(p, x, weight, y) == [
        [],
        ["4", "2"],
        ["5f"],
        ["4", "3"],
        ["2"],
        ["3f"],
        [],
        ["4", "3"],
        ["5f"],
    ]


def test_channel_shuffle_by_reshapes() -> None:
    p = program()
    x = p.plain(1, 12, 5)
    grid = p(aten.view.default, x, [1, 3, 4, 5])
    turned = p(aten.transpose.int, grid, 1, 2)
    y = p(aten.reshape.default, turned, [1, 12, 5])
    assert axes(p, x, y) == [[], ["3", "4"], ["5"], [], ["4", "3"], ["5"]]


def test_attention_heads_and_widths() -> None:
    p = program()
    x, weight = p.plain(1, 5, 8), p.plain(36, 8)
    fused = p(aten.linear.default, x, weight)
    q, k, v = (
        p(aten.transpose.int, p(aten.view.default, part, [1, 5, 3, 4]), 1, 2)
        for part in p.parts(p(aten.chunk.default, fused, 3, -1))
    )
    y = p(aten.scaled_dot_product_attention.default, q, k, v)
    out = p(aten.reshape.default, p(aten.transpose.int, y, 1, 2), [1, 5, 12])
    found = axes(p, weight, out)
    assert found[0] == ["3", "4", "3", "4", "3", "4"]
    assert found[-1] == ["3", "4"]
    # Heads are one axis in all three, the width of queries and keys is another than that of values.
    assert len(set(leaves(dims(p, weight)[0]))) == 3


def test_grouped_queries() -> None:
    p = program()
    q, k, v = p.plain(1, 6, 5, 4), p.plain(1, 2, 5, 4), p.plain(1, 2, 5, 4)
    y = p(aten.scaled_dot_product_attention.default, q, k, v, enable_gqa=True)
    assert axes(p, q, y)[1] == ["2", "3"]


def test_grouped_queries_by_expand() -> None:
    p = program()
    k = p.plain(1, 2, 5, 4)
    spread = p(aten.expand.default, p(aten.unsqueeze.default, k, 2), [1, 2, 3, 5, 4])
    repeated = p(aten.reshape.default, spread, [1, 6, 5, 4])
    q = p.plain(1, 6, 5, 4)
    p(aten.matmul.default, q, p(aten.transpose.int, repeated, -1, -2))
    assert axes(p, q, k) == [[], ["2", "3"], ["5"], ["4"], [], ["2"], ["5"], ["4"]]


def test_rotary_halves_share_an_axis() -> None:
    p = program()
    x, cosine = p.plain(5, 8), p.plain(5, 8)
    front = p(aten.slice.Tensor, x, 1, 0, 4)
    back = p(aten.slice.Tensor, x, 1, 4, 2**63 - 1)
    turned = p(aten.cat.default, [p(aten.neg.default, back), front], 1)
    p(aten.add.Tensor, x, p(aten.mul.Tensor, turned, cosine))
    axes(p, x)
    first, second = leaves(dims(p, x)[1])
    assert first is second
    assert first.frozen is None


def test_squeeze_and_excite() -> None:
    p = program()
    x = p.plain(2, 6, 4, 4)
    pooled = p(aten.mean.dim, x, [2, 3], True)
    gate = p(aten.conv2d.default, pooled, p.plain(3, 6, 1, 1))
    gate = p(aten.conv2d.default, gate, p.plain(6, 3, 1, 1))
    y = p(aten.mul.Tensor, x, p(aten.sigmoid.default, gate))
    assert axes(p, y)[1] == ["6"]


def test_flatten_into_a_linear() -> None:
    p = program()
    x, weight = p.plain(2, 6, 3, 3), p.plain(4, 54)
    pooled = p(aten.max_pool2d.default, x, [1, 1])
    y = p(aten.linear.default, p(aten.flatten.using_ints, pooled, 1), weight)
    assert axes(p, weight, y)[:2] == [["4"], ["6", "3f", "3f"]]


def test_group_norm_keeps_groups_exact() -> None:
    p = program()
    x = p.plain(2, 12)
    p(aten.group_norm.default, x, 3, p.plain(12))
    assert axes(p, x)[1] == ["3", "4s"]


def test_norms_and_means_are_statistical() -> None:
    p = program()
    x = p.plain(2, 6, 4)
    p(aten.layer_norm.default, x, [4])
    p(aten.mean.dim, x, [1])
    assert axes(p, x) == [["2"], ["6s"], ["4s"]]


def test_batch_norm_is_exact() -> None:
    p = program()
    c = [p.plain(6) for _ in range(4)]
    y = p(aten.batch_norm.default, p.plain(2, 6, 4), *c, False, 0.1, 1e-5, False)
    assert axes(p, y) == [["2"], ["6"], ["4"]]


def test_sums_and_contractions_are_exact() -> None:
    p = program()
    x, y = p.plain(3, 6), p.plain(6, 4)
    z = p(aten.einsum.default, "ij,jk->ik", [x, y])
    s = p(aten.sum.dim_IntList, x, [1])
    n = p(aten.linalg_vector_norm.default, x, 2, [1], True)
    p(aten.div.Tensor, x, n)
    assert axes(p, x, z, s) == [["3"], ["6"], ["3"], ["4"], ["3"]]


def test_a_residual_stream_is_one_axis() -> None:
    p = program()
    x = p.plain(2, 6)
    for _ in range(2):
        h = p(aten.linear.default, x, p.plain(4, 6), p.plain(4))
        x = p(aten.add.Tensor, x, p(aten.linear.default, h, p.plain(6, 4), p.plain(6)))
    axes(p, x)
    atoms = {a for d in graph_of(p).typing.tensors.values() for t in d for a in leaves(t)}
    assert sorted(a.size for a in atoms) == [2, 4, 4, 6]


def test_dense_connections() -> None:
    p = program()
    x = p.plain(2, 4)
    features = [x]
    for _ in range(2):
        joined = p(aten.cat.default, features, 1) if len(features) > 1 else x
        features.append(p(aten.linear.default, joined, p.plain(3, 4 + 3 * (len(features) - 1))))
    y = p(aten.cat.default, features, 1)
    assert axes(p, y)[1] == ["4", "3", "3"]


def test_a_permutation_of_channels_by_a_constant() -> None:
    p = program()
    x = p.plain(2, 6)
    y = p(aten.index_select.default, x, 1, torch.tensor([3, 4, 5, 0, 1, 2]))
    assert axes(p, x, y)[1] == ["3", "3"]


def test_an_embedding_keeps_its_rows_and_frees_its_width() -> None:
    p = program()
    table = p.plain(10, 6)
    p(aten.embedding.default, table, torch.tensor([1, 2, 3]))
    assert axes(p, table) == [["10f"], ["6"]]


def test_pixel_shuffle_frees_channels() -> None:
    p = program()
    y = p(aten.pixel_shuffle.default, p.plain(1, 12, 3, 3), 2)
    assert axes(p, y)[1] == ["3"]


def test_recurrent_state_is_an_axis() -> None:
    p = program()
    x, state = p.plain(5, 1, 3), [p.plain(1, 1, 4), p.plain(1, 1, 4)]
    weights = [p.plain(16, 3), p.plain(16, 4), p.plain(16), p.plain(16)]
    node = p(aten.lstm.input, x, state, weights, True, 1, 0.0, False, False, False)
    out, *_ = p.parts(node)
    assert axes(p, weights[0], out) == [["4"] * 4, ["3"], ["5f"], [], ["4"]]


def test_padding_of_channels_as_in_resnet_shortcuts() -> None:
    p = program()
    x, y = p.plain(2, 4), p.plain(2, 8)
    p(aten.add.Tensor, p(aten.constant_pad_nd.default, x, [2, 2]), y)
    assert axes(p, y)[1] == ["2", "4", "2"]


def test_every_second_channel() -> None:
    p = program()
    x = p.plain(2, 12)
    y = p(aten.slice.Tensor, x, 1, 1, 2**63 - 1, 2)
    assert axes(p, x, y) == [["2"], ["6", "2f"], ["2"], ["6"]]


def test_only_the_misfit_freezes() -> None:
    p = program()
    x = p.plain(5, 2, 3)
    y = p(aten.reshape.default, x, [5, 3, 2])
    assert axes(p, x, y) == [["5"], ["2f"], ["3f"], ["5"], ["3f"], ["2f"]]


def test_frozen_reasons_name_the_operator() -> None:
    p = program()
    x = p.plain(4, 6)
    p(aten.cumsum.default, x, 1)
    axes(p, x)
    (atom,) = leaves(dims(p, x)[1])
    assert str(atom.frozen) == "the order of its positions matters (at cumsum_default)"
