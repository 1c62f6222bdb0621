"""The layered drawing: boxes apart, edges down and around boxes, few crossings."""

from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_adapt.report.layout import (
    GAP,
    ROW_GAP,
    Layout,
    crossings,
    lay_out,
    with_bends,
    with_few_crossings,
)

Graph = tuple[list[tuple[int, int]], list[tuple[int, int]]]

LAW = settings(max_examples=60, deadline=None, database=None)

DIAMOND = [(0, 1), (1, 2), (2, 3), (0, 3)]
"""`x` leads to `f`, `y` and `Add`; and past them to `Add`."""


@st.composite
def graphs(draw: st.DrawFn, *, cyclic: bool = False) -> Graph:
    """Sizes of up to 14 boxes and up to 20 edges; the numbers are in no useful order."""
    count = draw(st.integers(1, 14))
    size = st.tuples(st.integers(10, 300), st.integers(10, 90))
    sizes = draw(st.lists(size, min_size=count, max_size=count))
    order = draw(st.permutations(range(count)))
    pairs = list(combinations(range(count), 2))
    if cyclic:
        pairs += [(b, a) for a, b in pairs]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=20)) if pairs else []
    return sizes, [(order[a], order[b]) for a, b in chosen]


def _boxes(layout: Layout, sizes: list[tuple[int, int]]) -> list[tuple[float, ...]]:
    """Left, top, right and bottom of each box."""
    return [
        (x, y, x + width, y + height)
        for (x, y), (width, height) in zip(layout.corners, sizes, strict=True)
    ]


@LAW
@given(graphs(cyclic=True))
def test_boxes_lie_apart_and_inside_the_drawing(graph: Graph) -> None:
    sizes, edges = graph
    layout = lay_out(sizes, edges)
    boxes = _boxes(layout, sizes)
    for a, b in combinations(boxes, 2):
        beside = max(a[0], b[0]) - min(a[2], b[2])
        below = max(a[1], b[1]) - min(a[3], b[3])
        assert beside >= GAP - 1e-6 or below >= ROW_GAP - 1e-6
    for left, top, right, bottom in boxes:
        assert min(left, top) >= -1e-6
        assert right <= layout.size[0] + 1e-6
        assert bottom <= layout.size[1] + 1e-6


@LAW
@given(graphs())
def test_every_edge_leads_down_from_box_to_box(graph: Graph) -> None:
    sizes, edges = graph
    layout = lay_out(sizes, edges)
    boxes = _boxes(layout, sizes)
    for (start, end), route in zip(edges, layout.routes, strict=True):
        upper, lower = boxes[start], boxes[end]
        assert upper[3] + ROW_GAP <= lower[1] + 1e-6
        assert route[0] == ((upper[0] + upper[2]) / 2, upper[3])
        assert route[-1] == ((lower[0] + lower[2]) / 2, lower[1])
        assert all(y <= next_y for (_, y), (_, next_y) in pairwise(route))


@LAW
@given(graphs(cyclic=True))
def test_no_edge_runs_through_a_box(graph: Graph) -> None:
    sizes, edges = graph
    layout = lay_out(sizes, edges)
    for route in layout.routes:
        for (x, y), (to_x, to_y) in pairwise(route):
            # An edge stays in the rectangle of the two points, however it is curved.
            x, to_x, y, to_y = *sorted((x, to_x)), *sorted((y, to_y))
            for left, top, right, bottom in _boxes(layout, sizes):
                apart = to_x <= left or x >= right or to_y <= top or y >= bottom
                assert apart or y == to_y


@LAW
@given(graphs(cyclic=True))
def test_an_edge_that_closes_a_cycle_still_joins_its_boxes(graph: Graph) -> None:
    sizes, edges = graph
    layout = lay_out(sizes, edges)
    boxes = _boxes(layout, sizes)
    for ends, route in zip(edges, layout.routes, strict=True):
        for box, (x, y) in zip(ends, (route[0], route[-1]), strict=True):
            left, top, right, bottom = boxes[box]
            assert x == (left + right) / 2
            assert y in (top, bottom)


@LAW
@given(graphs(cyclic=True))
def test_the_same_graph_always_looks_the_same(graph: Graph) -> None:
    assert lay_out(*graph) == lay_out(*graph)


@LAW
@given(graphs())
def test_ordering_the_rows_adds_no_crossings(graph: Graph) -> None:
    sizes, edges = graph
    tops = [y for _, y in lay_out([(size[0], 10) for size in sizes], edges).corners]
    rows, chains = with_bends([round(y / (10 + ROW_GAP)) for y in tops], edges)
    ordered = with_few_crossings(rows, chains)
    assert crossings(ordered, chains) <= crossings(rows, chains)
    assert [sorted(row) for row in ordered] == [sorted(row) for row in rows]


@LAW
@given(graphs())
def test_crossings_are_counted_as_pair_by_pair(graph: Graph) -> None:
    sizes, edges = graph
    tops = [y for _, y in lay_out([(size[0], 10) for size in sizes], edges).corners]
    rows, chains = with_bends([round(y / (10 + ROW_GAP)) for y in tops], edges)
    row_of = {item: number for number, row in enumerate(rows) for item in row}
    place = {item: number for row in rows for number, item in enumerate(row)}
    links = [link for chain in chains for link in pairwise(chain)]
    crossed = [
        (place[a] - place[c]) * (place[b] - place[d]) < 0
        for (a, b), (c, d) in combinations(links, 2)
        if row_of[a] == row_of[c]
    ]
    assert crossings(rows, chains) == sum(crossed)


def test_two_edges_that_cross_are_uncrossed() -> None:
    rows, chains = with_bends([0, 0, 1, 1], [(0, 3), (1, 2)])
    assert crossings(rows, chains) == 1
    assert crossings(with_few_crossings(rows, chains), chains) == 0


def test_a_long_edge_is_straight_and_what_it_passes_moves_aside() -> None:
    layout = lay_out([(40, 20), (60, 20), (90, 20), (40, 20)], DIAMOND)
    assert {x for x, _ in layout.routes[3]} == {20.0}
    (x, _), (f, _), (y, _), (total, _) = layout.corners
    assert x == total == 0
    assert min(f, y) == 20 + GAP
    assert f + 30 == y + 45, "the boxes beside it are in one line"


def test_the_rows_and_bends_of_the_worked_example() -> None:
    rows, chains = with_bends([0, 1, 2, 3], DIAMOND)
    assert rows == [[0], [4, 1], [5, 2], [3]]
    assert chains == [[0, 1], [1, 2], [2, 3], [0, 4, 5, 3]]


def test_a_box_that_nothing_leads_to_stands_right_above_its_reader() -> None:
    layout = lay_out([(10, 10)] * 4, [(0, 1), (1, 2), (3, 2)])
    assert layout.corners[3][1] == layout.corners[1][1]


def test_no_boxes_are_no_drawing() -> None:
    assert lay_out([], []) == Layout((), (), (0.0, 0.0))
