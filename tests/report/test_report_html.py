"""`onnx-adapt report`: one page that shows what verify found and what the slots cost."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from slot_models import BRANCHES, MLP, MODELS, cli, dense, model_of, node_of, run, saved

import onnx_adapt as oa
from onnx_adapt.report.overview import Overview, overview
from onnx_adapt.report.page import render
from onnx_adapt.report.plots import effect_plot, error_plot, map_plot

Capture = pytest.CaptureFixture[str]

CASE = Path(__file__).parent.parent / "cases" / "peft_bert_lora_default_ts"
STYLE = Path(oa.__file__).parent / "report" / "style.css"
_VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page, its text, and what does not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.elements if attribute in attrs]


def _mlp(**options: object) -> tuple[oa.Model, oa.Model]:
    base = model_of(MLP)
    return base, oa.insert(base, after=["first", "act"], **options)


@pytest.fixture(scope="module")
def mlp() -> Overview:
    return overview(*_mlp())


@pytest.fixture(scope="module")
def trained() -> tuple[oa.Model, oa.Model, oa.Adapter]:
    base = oa.open_model(CASE / "base.onnx")
    checkpoint = oa.load_checkpoint(CASE / "adapter", base, name="fr")
    return base, oa.insert_checkpoint(base, checkpoint), checkpoint.adapter


@pytest.fixture(scope="module")
def bert(trained: tuple[oa.Model, oa.Model, oa.Adapter]) -> Overview:
    base, adapted, adapter = trained
    return overview(base, adapted, adapter=adapter, inputs=CASE / "inputs.npz")


def test_the_report_is_that_of_verify(mlp: Overview) -> None:
    assert mlp.report == oa.verify(*_mlp())
    assert [view.result for view in mlp.slots] == list(mlp.report.slots)


def test_with_an_adapter_the_report_is_verifys_of_the_filled_model(
    trained: tuple[oa.Model, oa.Model, oa.Adapter], bert: Overview
) -> None:
    base, adapted, adapter = trained
    filled, given = oa.fill(adapted, adapter), CASE / "inputs.npz"
    assert bert.report == oa.verify(base, filled, adapter=adapter, inputs=given)


def test_the_page_shows_every_check_and_every_slot_of_the_report(bert: Overview) -> None:
    text = Page(render(bert)).text
    for check in bert.report.checks:
        assert f"{check.name} ✓ ok {check.detail}" in text
    for result in bert.report.slots:
        assert f"{result.name} error {result.error:.1e} · effect {result.effect:.1e}" in text
    for view in bert.slots:
        assert f"{view.result.effect:.1e} with random weights, {view.moved:.1e} with" in text


def test_parameters_are_the_numbers_in_the_adapter(
    trained: tuple[oa.Model, oa.Model, oa.Adapter], bert: Overview
) -> None:
    adapter = trained[2]
    for cost in bert.costs.slots:
        held = [np.asarray(a).size for a in adapter.weights[cost.name].values()]
        assert cost.parameters == sum(held)
    assert bert.costs.replaced == sum(a.size for a in adapter.replaced.values())
    total = sum(cost.parameters for cost in bert.costs.slots)
    assert f"parameters {bert.costs.base_parameters:,} {total:,}" in Page(render(bert)).text


def test_base_parameters_are_all_weights_and_constants_of_the_base() -> None:
    base = oa.open_model(MODELS / "plcmos.onnx")
    found = overview(base, oa.insert(base, after="Conv_0"))
    graph = onnx.load(MODELS / "plcmos.onnx").graph
    in_nodes = [item.t for node in graph.node for item in node.attribute if item.HasField("t")]
    weights = [onnx.numpy_helper.to_array(t) for t in (*graph.initializer, *in_nodes)]
    floats = sum(w.size for w in weights if w.dtype.kind == "f")
    assert found.costs.base_parameters == floats


@pytest.mark.parametrize("bottleneck", [1, 8, 37])
def test_operations_of_a_slot_are_counted_as_by_hand(bottleneck: int) -> None:
    base, adapted = _mlp()
    rows, width, r = 5, 4, bottleneck
    found = overview(
        base, adapted, inputs={"x": np.ones((rows, width), "f4")}, bottleneck=bottleneck
    )
    product = 2 * rows * width * r  # down, and up the same
    for cost in found.costs.slots:
        assert cost.bottleneck == bottleneck
        assert cost.flops == product + rows * r + product + rows * width
    layer = 2 * rows * width * width
    assert found.costs.base_flops == layer + rows * width + layer


def test_operations_of_convolutions_are_counted_as_by_hand() -> None:
    base = oa.open_model(MODELS / "plcmos.onnx")
    adapted = oa.insert(base, after="Conv_0")
    feeds = {
        "degraded_audio": np.ones((1, 1, 90, 257), "f4"),
        "rater_embed": np.ones((1, 64), "f4"),
    }
    found = overview(base, adapted, inputs=feeds)
    (slot,) = oa.list_slots(adapted)
    proto = onnx.load(MODELS / "plcmos.onnx")
    proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(slot.tensor))
    _, channels, *sizes = run(proto, feeds)[-1].shape
    places, r = int(np.prod(sizes)), found.costs.slots[0].bottleneck
    one_by_one = 2 * places * channels * r
    assert found.costs.slots[0].flops == one_by_one * 2 + places * r + places * channels


def test_operations_in_a_branch_that_does_not_run_are_not_counted() -> None:
    base = model_of(BRANCHES)
    adapted = oa.insert(base, after="before")
    flops = {
        c: overview(base, adapted, inputs={"x": np.ones((3, 4), "f4"), "c": np.array(c)})
        for c in (True, False)
    }
    product = 2 * 3 * 4 * 4
    assert flops[True].costs.base_flops == 2 * product + 12
    assert flops[False].costs.base_flops == 2 * product + 12
    assert flops[True].costs.slots == flops[False].costs.slots


def test_an_adapter_moves_as_far_as_a_run_with_one_slot_says(
    trained: tuple[oa.Model, oa.Model, oa.Adapter], bert: Overview, tmp_path: Path
) -> None:
    _, adapted, adapter = trained
    feeds = dict(np.load(CASE / "inputs.npz"))
    proto = onnx.load(saved(adapted, tmp_path / "adapted.onnx"))
    (still,) = run(proto, feeds)
    for view in bert.slots:
        name = view.slot.name
        own = {view.slot.weight(p): v for p, v in adapter.weights[name].items()}
        (got,) = run(proto, {**feeds, **own})
        moved = np.abs(got - still).max() / np.abs(still).max()
        assert view.moved == pytest.approx(moved, rel=1e-3)


def test_times_are_of_real_runs(bert: Overview) -> None:
    for time in (bert.costs.base, bert.costs.off, bert.costs.on):
        assert 0 < time.best <= time.median <= time.worst
    assert bert.costs.runs >= 5


def test_after_has_exactly_the_slots_nodes_as_new_and_before_none(bert: Overview) -> None:
    for view in bert.slots:
        assert {box.origin for box in view.before.boxes} == {"base"}
        new = [b.label for b in view.after.boxes if b.origin == "new" and b.kind == "node"]
        assert new == ["MatMul", "MatMul", "Add"]
        weights = {w.name for b in view.after.boxes if b.origin == "new" for w in b.weights}
        assert weights == {view.slot.weight("down"), view.slot.weight("up")}
        kept = {box.name for box in view.before.boxes if box.kind == "node"}
        assert kept <= {box.name for box in view.after.boxes}


def test_weights_and_constants_of_a_slot_are_shown_in_the_nodes_that_read_them() -> None:
    base = model_of(MLP)
    (view,) = overview(base, oa.insert(base, after="first", activation="gelu")).slots
    assert "Constant" not in [box.label for box in view.after.boxes]
    shapes = {w.name: w.type for box in view.after.boxes for w in box.weights}
    assert shapes[view.slot.weight("down")] == "float32[4, r]"
    assert shapes[view.slot.weight("up")] == "float32[r, 4]"
    ends = {end for edge in view.after.edges for end in edge}
    assert ends == set(range(len(view.after.boxes)))


def test_slots_come_in_order_of_depth() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after="act")
    both = oa.insert(adapted, after="first")
    found = overview(base, both)
    assert [view.slot.name for view in found.slots] == ["first", "act"]
    assert [view.depth for view in found.slots] == [1, 2]


def test_the_page_needs_nothing_else(bert: Overview) -> None:
    text = render(bert)
    page = Page(text)
    tags = Counter(tag for tag, _ in page.elements)
    for tag in ("script", "link", "img", "iframe", "object", "embed", "base", "form"):
        assert tags[tag] == 0
    assert all(link.startswith("#") for link in page.values("href"))
    assert page.values("src") == []
    assert "url(" not in text
    assert "@import" not in text
    assert not [a for _, attrs in page.elements for a in attrs if a.startswith("on")]
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'")


def test_every_link_has_a_target_and_every_id_is_one(bert: Overview) -> None:
    page = Page(render(bert))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.values("href")} <= set(ids)
    assert set(page.values("aria-labelledby")) <= set(ids)
    assert {f"slot-{n}" for n in range(1, 5)} <= set(ids)


def test_the_page_can_be_used_by_keyboard_and_screen_reader(bert: Overview) -> None:
    page = Page(render(bert))
    tags = Counter(tag for tag, _ in page.elements)
    assert (tags["h1"], tags["main"], tags["nav"]) == (1, 1, 1)
    assert tags["details"] == tags["summary"] == len(bert.slots) + 1  # and what it is of
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("a")[0] == {"class": "skip", "href": "#slots"}
    assert "width=device-width" in page.all("meta")[1]["content"]
    for attrs in page.all("svg"):
        named = attrs.get("role") in ("img", "group") and attrs.get("aria-label")
        assert named or attrs["aria-hidden"] == "true"
    # The dots of the map are stops; those of the other plots would lead to the same places.
    dots = [a for a in page.all("a") if a["href"].startswith("#slot-")]
    stops = [a for a in dots if a.get("tabindex") != "-1"]
    assert [a["href"] for a in stops] == [f"#slot-{n}" for n in range(1, 5)]
    assert all(a["aria-label"] for a in stops)
    assert len(dots) > len(stops)
    labels = {label["for"] for label in page.all("label")}
    assert {item["id"] for item in page.all("input")} == labels
    assert ":focus-visible" in STYLE.read_text(encoding="utf-8")


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></svg><b>",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31mred\x1b[0m",
    "evil\u202egnp.exe",
    "javascript:alert(1)",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_and_do_nothing(name: str) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(model_of(MLP).proto)
    proto.graph.input[0].name = name
    first, second, third = proto.graph.node
    first.name, first.input[0] = f"{name}/node", name
    first.output[0] = second.input[0] = f"{name}/tensor"
    third.name = f"{name}/reader"
    second.output[0] = third.input[0] = "b"
    base = oa.Model(proto)
    adapted = oa.insert(base, after=f"main:{name}/tensor")
    text = render(overview(base, adapted))
    page, quiet = Page(text), Page(render(overview(*_mlp())))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in quiet.elements}
    assert not [a for _, attrs in page.elements for a in attrs if a.startswith("on")]
    assert all(link.startswith("#") for link in page.values("href"))
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    assert " ".join(f"{shown}/tensor".split()) in page.text
    assert not [c for c in text if not c.isprintable() and c != "\n"]


def _palettes() -> list[dict[str, str]]:
    text = STYLE.read_text(encoding="utf-8")
    found = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in found]


def _contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


TEXT = [
    *itertools.product(["text", "quiet", "link", "good", "bad", "other"], ["page"]),
    *itertools.product(["text", "quiet"], ["card", "good-fill", "bad-fill"]),
    *itertools.product(["text"], ["new-fill", "other-fill"]),
    *[("good", "good-fill"), ("bad", "bad-fill")],
]
SHAPES = [("new", "page"), ("line", "page"), ("other", "page"), ("new", "new-fill")]


@pytest.mark.parametrize("palette", _palettes(), ids=["light", "dark"])
def test_text_and_shapes_stand_out_from_what_is_behind_them(palette: dict[str, str]) -> None:
    assert len(_palettes()) == 2
    for front, back in TEXT:
        assert _contrast(palette[front], palette[back]) >= 4.5, (front, back)
    for front, back in SHAPES:
        assert _contrast(palette[front], palette[back]) >= 3, (front, back)


def test_a_failed_verification_has_a_page_that_says_so(
    tmp_path: Path, capsys: Capture
) -> None:
    base, adapted = _mlp()
    node_of(adapted, "a").op_type = "Sub"  # the slot's own Add
    files = saved(base, tmp_path / "base.onnx"), saved(adapted, tmp_path / "adapted.onnx")
    code, out, err = cli(capsys, "report", *map(str, files))
    assert (code, out) == (1, "")
    assert "adapted.onnx is NOT base.onnx plus its slots" in err
    assert "on FAILED: slot 'first' is" in err
    text = Page((tmp_path / "adapted.report.html").read_text(encoding="utf-8")).text
    assert "✗ Failed" in text
    assert "on ✗ failed slot 'first' is" in text


def test_where_nothing_was_run_no_inputs_are_named(tmp_path: Path, capsys: Capture) -> None:
    adapted, page = saved(_mlp()[1], tmp_path / "adapted.onnx"), tmp_path / "page.html"
    files = str(MODELS / "dnsmos-p808.onnx"), str(adapted)
    code, _, err = cli(capsys, "verify", *files, "--html", str(page))
    assert code == 1
    ran = [line for line in err.splitlines() if line.startswith("ONNX Runtime")]
    assert ran == [f"ONNX Runtime {onnxruntime.__version__}"]
    assert "inputs" not in Page(page.read_text(encoding="utf-8")).text.split("Checks")[0]


def test_slots_that_cannot_be_run_still_have_a_page() -> None:
    base, adapted = _mlp()
    adapted.proto.graph.output[0].name = "a"
    found = overview(base, adapted)
    assert not found.report.passed
    assert found.costs is None
    assert "Not measured: see the checks above." in Page(render(found)).text


def _files(folder: Path) -> list[str]:
    base, adapted = _mlp()
    return [
        str(saved(base, folder / "base.onnx")),
        str(saved(adapted, folder / "adapted.onnx")),
    ]


def test_the_json_has_stable_keys(tmp_path: Path, capsys: Capture) -> None:
    files = _files(tmp_path)
    code, out, _ = cli(capsys, "report", *files, "--json")
    data = json.loads(out)
    assert code == 0
    assert set(data) == {
        *("report", "adapter", "nodes", "layers", "slots", "costs", "compared", "about"),
    }
    assert set(data["about"]) == {"date", "command", "files", "fingerprint", "inputs"}
    code, out, _ = cli(capsys, "verify", *files, "--json")
    assert data["report"] == json.loads(out)
    keys = {"slot", "depth", "result", "moved", "cost", "before", "after"}
    assert [set(slot) for slot in data["slots"]] == [keys] * 2
    assert set(data["slots"][0]["cost"]) == {"name", "bottleneck", "parameters", "flops"}
    assert set(data["slots"][0]["after"]) == {"boxes", "edges", "hidden"}
    assert set(data["costs"]) == {
        *("slots", "replaced", "base_parameters", "base_flops", "uncounted", "runs"),
        *("base", "off", "on", "noise"),
    }
    assert [layer["width"] for layer in data["layers"]] == [4, 4]
    assert not list(tmp_path.glob("*.html"))


def test_verify_writes_the_page_beside_its_own_output(tmp_path: Path, capsys: Capture) -> None:
    files, page = _files(tmp_path), tmp_path / "page.html"
    plain = cli(capsys, "verify", *files)
    code, out, err = cli(capsys, "verify", *files, "--html", str(page))
    assert (code, out) == plain[:2]
    assert "wrote" in err
    assert "✓ Verified" in Page(page.read_text(encoding="utf-8")).text


def test_without_its_libraries_there_is_a_hint_and_the_data(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pygal", None)
    files = _files(tmp_path)
    code, out, err = cli(capsys, "report", *files)
    assert (code, out) == (2, "")
    assert "error: the report page needs pygal" in err
    assert "hint: pip install 'onnx-adapt[report]'" in err
    assert cli(capsys, "report", *files, "--json")[0] == 0


def test_verify_alone_imports_none_of_the_pages_libraries(tmp_path: Path) -> None:
    code = (
        "import sys; from onnx_adapt.cli import main\n"
        f"sys.argv = ['onnx-adapt', 'verify', *{_files(tmp_path)!r}]\n"
        "try: main()\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "assert not {'jinja2', 'pygal'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_page_replaces_no_model_no_folder_and_no_pipe(
    tmp_path: Path, capsys: Capture
) -> None:
    files = _files(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (Path(files[0]), "would replace"),
        (Path(files[1]), "would replace"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "no" / "page.html", "no folder"),
    ):
        before = path.stat().st_mode if path.exists() else None
        for args in (["report", *files, "-o"], ["verify", *files, "--html"]):
            code, out, err = cli(capsys, *args, str(path))
            assert (code, out) == (2, "")
            assert message in err
            assert "hint: " in err
        assert (path.stat().st_mode if path.exists() else None) == before


def test_nothing_written_whole_replaces_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "fr.safetensors"
    os.mkfifo(pipe)
    weights = {"fc": {"down": np.zeros((4, 1), "f4"), "up": np.zeros((1, 4), "f4")}}
    with pytest.raises(oa.errors.SaveError, match="not a regular file"):
        oa.save_adapter(oa.Adapter("fr", weights), pipe)
    assert pipe.is_fifo()


def _dots_lie_inside(svg: str) -> bool:
    page = Page(svg)
    inner = [float(r["height"]) for r in page.all("rect") if r.get("class") == "background"]
    return all(0 <= float(dot["cy"]) <= inner[1] for dot in page.all("circle"))


def test_the_map_holds_every_width() -> None:
    base = oa.open_model(MODELS / "silero-vad-ifless.onnx")  # 1 to 512 units
    svg = map_plot(overview(base, oa.insert(base, after="*")))
    assert svg.count("#slot-") == 16
    assert _dots_lie_inside(svg)


@pytest.mark.parametrize("exponent", range(-12, 3))
def test_the_plots_hold_every_value_however_far_apart(exponent: int, mlp: Overview) -> None:
    views = [
        replace(view, result=replace(view.result, error=value, effect=value))
        for view, value in zip(mlp.slots, (3e-13, 9 * 10.0**exponent), strict=True)
    ]
    spread = replace(mlp, slots=tuple(views))
    assert _dots_lie_inside(error_plot(spread))
    assert _dots_lie_inside(effect_plot(spread))


def test_two_hundred_slots_are_shown() -> None:
    layers = "".join(f"[n{i}] t{i + 1} = MatMul(t{i}, w) " for i in range(200))
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n,4] t0) => (float[n,4] t200) '
        f"<{dense('w')}> {{ {layers} }}"
    )
    base = model_of(text)
    for tensor in base.proto.graph.initializer:
        value = np.eye(4, dtype="f4")
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    found = overview(base, oa.insert(base, after="n*"))
    text = render(found)
    assert len(Page(text).all("details")) == 200 + 1  # and what the page is of
    assert len(text) < 200 * 12_000
