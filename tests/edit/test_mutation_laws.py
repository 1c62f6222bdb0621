"""Laws of insertion on models that others made: right, or refused.

Random networks know where the features of their tensors are and what they compute
(`layout_models`); mutations then do to them what converters and editors do
(`model_mutations`). Whatever is inserted computes the network with the slot on the features,
in plain numpy, or it is refused with an error that says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layout_models import Features, Network, Weights
from layout_pieces import (
    FUSED,
    PICTURE,
    PICTURE_ENDS,
    TOKENS,
    picture_network,
    token_network,
)
from model_mutations import MUTATIONS, OTHERS, RECORDS, mutated
from slot_models import run, session

import onnx_adapt as oa
from onnx_adapt.errors import AdaptError
from onnx_adapt.model.fingerprint import fingerprint
from onnx_adapt.ort import failures

LAW = settings(max_examples=40, deadline=None, database=None, derandomize=True)
Array = np.ndarray

PIECES = [*PICTURE, *PICTURE_ENDS, *TOKENS]


def network_of(piece: str, *, free: bool = False) -> Network:
    """A small network with one piece in it."""
    if piece in TOKENS:
        return token_network([piece, "dense"], free=free)
    end = piece if piece in PICTURE_ENDS else ""
    return picture_network([piece] if not end else [], end, free=free)


@dataclass(frozen=True)
class Plan:
    """What a random network is made of; `free` makes its sizes symbols."""

    pieces: tuple[str, ...]
    end: str | None
    free: bool

    def build(self) -> Network:
        if self.end is None:
            return token_network(list(self.pieces), free=self.free)
        return picture_network(list(self.pieces), self.end, free=self.free)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Several pieces in a row; half of them with sizes that are symbols."""
    free, tokens = draw(st.booleans()), draw(st.booleans())
    known = [name for name in (TOKENS if tokens else PICTURE) if not free or name in ANY_SIZE]
    ends = [name for name in ("", *PICTURE_ENDS) if not free or name in ANY_SIZE]
    pieces = draw(st.lists(st.sampled_from(known), min_size=1, max_size=4))
    return Plan(tuple(pieces), None if tokens else draw(st.sampled_from(ends)), free)


ANY_SIZE = {"", *PIECES} - {"shuffle", "flat_image"}
"""Pieces without the sizes of the picture in a constant or a weight."""

NEEDS_ROWS = {"group_norm", "patches"}
"""Pieces with a Reshape by `[0, ..., -1]`, which takes no empty batch in the base either."""


@st.composite
def mutations(draw: st.DrawFn) -> list[str]:
    records = draw(st.sampled_from(["", *RECORDS]))
    others = draw(st.lists(st.sampled_from(sorted(OTHERS)), max_size=2, unique=True))
    return [*filter(None, [records]), *others]


def shown(net: Network, site: oa.Site) -> Features:
    """Where a site says that the features are, as the network would say it."""
    if site.refused is not None or site.axis is None:
        return Features(None)
    rank = net.values[site.tensor].ndim
    return Features(site.axis % rank, site.width or 0)


def check_sites(net: Network, names: Sequence[str], *, unsure: bool = False) -> None:
    """Each site has the axis and width that the network knows.

    Where no axis holds the features it is refused. So it may be where `unsure`: between two
    shuffles no operator says what the axes are.
    """
    model = oa.Model(mutated(net, names))
    sites = {site.tensor: site for site in oa.find_sites(model, all_tensors=True)}
    for tensor, known in net.features.items():
        expected = Features(known.axis, known.width)
        site = sites.get(tensor)
        found = shown(net, site) if site else Features(None)
        if unsure and site and site.refused and "nothing tells" in site.refused:
            continue
        assert found == expected, f"{tensor} of {names}: {site}"


@pytest.mark.parametrize("free", [False, True], ids=["fixed", "free"])
@pytest.mark.parametrize("piece", PIECES)
def test_a_site_is_on_the_features_or_refused(piece: str, free: bool) -> None:
    check_sites(network_of(piece, free=free and piece in ANY_SIZE), [])


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_no_mutation_moves_a_site(mutation: str) -> None:
    wrong = []
    for piece in PIECES:
        try:
            check_sites(network_of(piece), [mutation])
        except AssertionError as error:
            wrong.append(f"{piece}: {error}".splitlines()[0])
    assert wrong == []


@settings(LAW, max_examples=40)
@given(plans(), mutations())
@example(Plan(("shuffle", "group_norm"), "", False), [])  # groups of groups took a slot
def test_sites_of_mutated_networks_are_on_the_features(plan: Plan, names: list[str]) -> None:
    check_sites(plan.build(), names, unsure=True)


# What is inserted -------------------------------------------------------------------------


def weights_of(tensors: Sequence[str], net: Network) -> dict[str, Weights]:
    """Weights for a slot on each tensor, large enough to show on which axis they act."""
    found = {}
    for tensor in tensors:
        width = net.features[tensor].width
        rng = np.random.default_rng([int(tensor[1:]), width])
        down, up = (rng.standard_normal(s) / 2 for s in ((width, 3), (3, width)))
        found[tensor] = (down.astype("f4"), up.astype("f4"))
    return found


def adapter_of(base: oa.Model, model: oa.Model, weights: dict[str, Weights]) -> oa.Adapter:
    """The weights as an adapter: 1x1 convolutions on axis 1, matrices on the last."""
    slots = oa.list_slots(model)
    laid = {}
    for slot in slots:
        down, up = weights[slot.tensor]
        if slot.axis == 1:
            ones = (1,) * (slot.rank - 2)
            down, up = (w.T.reshape(*w.T.shape, *ones) for w in (down, up))
        laid[slot.name] = {"down": down, "up": up}
    return oa.Adapter(
        "made", laid, {}, {slot.name: slot.activation for slot in slots}, fingerprint(base)
    )


def assert_near(got: Sequence[Array], want: Sequence[Array]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        if b.size:
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * max(1, np.abs(b).max()))


def runs(model: oa.Model, feeds: dict[str, Array]) -> bool:
    """Whether ONNX Runtime takes a model and inputs, optimised or not."""
    try:
        for level in (False, True):
            session(model.proto, optimised=level).run(None, feeds)
    except failures():
        return False
    return True


def check_inserted(
    net: Network,
    base: oa.Model,
    tensors: Sequence[str],
    *,
    batched: bool = False,
    rows: int = 3,
    any_rows: bool = True,
) -> None:
    """Slots on some tensors, off and on, at some number of rows.

    Where records are wrong (not `any_rows`), ONNX Runtime may believe one beside a slot, and
    not run the model. Then verify must say so.
    """
    before = base.proto.SerializeToString()
    adapted = oa.insert(base, after=[f"main:{t}" for t in tensors], batched=batched)
    assert [slot.tensor for slot in oa.list_slots(adapted)] == list(tensors)
    x = net.x[:rows].astype(np.float32)
    plain = run(base, {"x": x})
    if not any_rows and not runs(adapted, {"x": x}):
        with pytest.raises(AdaptError) as refused:
            oa.verify(base, adapted, inputs={"x": x}).raise_for_mismatch()
        assert refused.value.hint
        return
    off = run(adapted, {"x": x})
    assert all(np.array_equal(a, b) for a, b in zip(off, plain, strict=True))
    weights = weights_of(tensors, net)
    adapter = adapter_of(base, adapted, weights)
    on = run(adapted, {"x": x, **adapter.feeds()})
    assert_near(on, net.compute(x, weights))
    if not batched:
        baked = oa.bake(oa.fill(adapted, adapter))
        assert_near(run(baked, {"x": x}), net.compute(x, weights))
    inputs = {"x": x if rows else net.x.astype(np.float32)}
    oa.verify(base, adapted, inputs=inputs).raise_for_mismatch()
    if any_rows:  # a wrong record may fix their number
        feeds = {"x": net.x.astype(np.float32)}
        oa.verify(base, adapted, inputs=feeds).raise_for_mismatch()
    assert oa.remove(adapted).proto.SerializeToString() == before


@pytest.mark.parametrize("piece", PIECES)
def test_a_slot_on_each_tensor_of_a_piece_computes_its_formula(piece: str) -> None:
    net = network_of(piece)
    known = [t for t, features in net.features.items() if features.axis is not None]
    check_inserted(net, oa.Model(net.proto()), known)


@settings(LAW, max_examples=20)
@given(
    plans(),
    mutations(),
    st.lists(st.integers(0, 99), min_size=1, max_size=2),
    st.booleans(),
    st.sampled_from([3, 3, 1, 0]),
)
@example(Plan((), "patches", True), ["one_row_recorded"], [3], True, 3)  # "no several rows"
@example(Plan(("token_conv",), None, False), ["stale_sizes", "shapeless"], [4], False, 3)
@example(
    Plan(("conv", "pool", "group_norm", "batch_norm"), "patches", True),
    ["stale_sizes", "weights_as_nodes"],
    [0, 74],
    True,
    3,
)
def test_what_is_inserted_into_a_mutated_network_computes_its_formula(
    plan: Plan, names: list[str], places: list[int], batched: bool, rows: int
) -> None:
    net = plan.build()
    known = [t for t, features in net.features.items() if features.axis is not None]
    tensors = [known[i] for i in sorted({place % len(known) for place in places})]
    base = oa.Model(mutated(net, names))
    any_rows = not {*names} & {*RECORDS}
    if {*plan.pieces, plan.end} & NEEDS_ROWS:
        rows = max(rows, 1)
    rows = rows if any_rows else len(net.x)
    check_inserted(net, base, tensors, batched=batched, rows=rows, any_rows=any_rows)


@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
@pytest.mark.parametrize("piece", FUSED)
def test_a_module_whose_bias_is_inside_the_next_operator_takes_the_slot_behind_the_bias(
    piece: str, mutation: str | None
) -> None:
    """The bias is no part of the tensor: a slot there would read and move another value."""
    net = network_of(piece)
    if mutation == "no_names":
        return  # then there is no module to name
    base = oa.Model(mutated(net, [mutation] if mutation else []))
    (raw,) = (t for t, features in net.features.items() if features.biased == "inside")
    node = next(node for node in net.nodes if raw in node.output)
    for name in (node.name, node.name.strip("/").rpartition("/")[0].replace("/", ".")):
        adapted = oa.insert(base, after=name)
        (slot,) = oa.list_slots(adapted)
        (add,) = (n for n in adapted.proto.graph.node if slot.inner in n.output)
        assert (add.op_type, raw in add.input) == ("Add", True)
        assert oa.remove(adapted).proto == base.proto
        feeds = {"x": net.x.astype(np.float32)}
        oa.verify(base, adapted, inputs=feeds).raise_for_mismatch()


@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_a_module_with_its_bias_beside_it_takes_the_slot_behind_the_bias(
    mutation: str | None,
) -> None:
    net = network_of("dense")
    if mutation == "no_names":
        return
    base = oa.Model(mutated(net, [mutation] if mutation else []))
    pairs = {t: f.biased for t, f in net.features.items() if f.biased}
    for raw, biased in pairs.items():
        name = next(node.name for node in net.nodes if raw in node.output)
        (slot,) = oa.list_slots(oa.insert(base, after=name))
        assert slot.tensor == biased


def test_these_laws_see_a_slot_on_the_wrong_axis() -> None:
    """As many pixels in a row as channels: only the numbers tell the axes apart."""
    net = network_of("group_norm")
    tensor = next(t for t, f in net.features.items() if f.axis == 1 and f.width == 8)
    net.features[tensor] = replace(net.features[tensor], axis=3)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_inserted(net, oa.Model(net.proto()), [tensor])


def test_these_laws_see_a_slot_before_the_bias() -> None:
    net = network_of("dense")
    raw, known = next((t, f) for t, f in net.features.items() if f.biased)
    base = oa.Model(net.proto())
    adapted = oa.insert(base, after=f"main:{known.biased}")
    weights = weights_of([known.biased], net)
    feeds = adapter_of(base, adapted, weights).feeds()
    got = run(adapted, {"x": net.x.astype(np.float32), **feeds})
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_near(got, net.compute(net.x, {raw: weights[known.biased]}))
