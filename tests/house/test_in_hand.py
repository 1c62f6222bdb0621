"""Functions take what a person has in hand, and what they return shows what it is."""

import asyncio
import inspect
import pickle
import pydoc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_adapt as oa
from onnx_adapt.errors import AdaptError

BASE = "models/dnsmos-p808.onnx"
PLACE = "mos_estimator_small_1/dense_4/MatMul_add"
X = np.linspace(-1, 1, 900 * 120, dtype=np.float32).reshape(1, 900, 120)


def _adapted() -> oa.Model:
    return oa.insert(BASE, PLACE)


def _adapter(model: oa.Model, name: str = "fr", seed: int = 0) -> oa.Adapter:
    rng = np.random.default_rng(seed)
    (slot,) = oa.list_slots(model)
    down, up = rng.standard_normal((64, 4)), rng.standard_normal((4, 64))
    return oa.make_adapter(model, name, {slot.name: {"down": down, "up": up}})


# Found without a page


def test_the_public_names_are_listed() -> None:
    assert set(dir(oa)) == {*oa.__all__, "__version__"}


def test_help_has_every_function() -> None:
    text = pydoc.plain(pydoc.render_doc(oa)).partition("PACKAGE CONTENTS")[0]
    assert [name for name in oa.__all__ if name[0].islower() and name not in text] == []


def test_every_public_function_shows_its_help() -> None:
    for name in oa.__all__:
        assert inspect.getdoc(getattr(oa, name)), name


# What is given


def test_a_model_is_a_path_a_model_or_a_proto(tmp_path: Path) -> None:
    proto, path = onnx.load(BASE), tmp_path / "adapted.onnx"
    for given in (BASE, Path(BASE), proto, oa.open_model(BASE)):
        adapted = oa.insert(given, PLACE)
        assert oa.verify(given, adapted, weights=False).passed
        assert len(oa.find_sites(given, "dense")) == 3
        oa.save_model(adapted, path)
        assert oa.list_slots(path) == oa.list_slots(onnx.load(path)) == oa.list_slots(adapted)
        oa.save_model(oa.remove(path), tmp_path / "base.onnx")
        assert onnx.load(tmp_path / "base.onnx") == proto
    oa.save_model(proto, tmp_path / "copy.onnx")
    assert onnx.load(tmp_path / "copy.onnx") == proto


def test_an_adapter_is_a_path_or_an_adapter(tmp_path: Path) -> None:
    model = _adapted()
    fr = _adapter(model)
    path = oa.save_adapter(fr, tmp_path / "fr.safetensors")
    for given in (fr, path, str(path)):
        assert oa.list_slots(oa.fill(model, given))
        assert oa.inspect(given, model).misfits == ()
        assert oa.blend([given, given], [0.5, 0.5]).weights.keys() == fr.weights.keys()
        assert oa.merge([given, fr], [0.5, 0.5]).weights.keys() == fr.weights.keys()
        assert oa.quantize(given).adapter.size < 2 * fr.size
        assert oa.verify(BASE, model, weights=False, adapter=given).passed
    rows = oa.insert(BASE, PLACE, batched=True)
    assert oa.pack_rows(rows, [path, None, fr]).name == "fr | - | fr"


def test_places_are_sites_or_names() -> None:
    sites = oa.find_sites(BASE, "dense")
    names = [slot.tensor for slot in oa.list_slots(oa.insert(BASE, sites))]
    assert names == [site.tensor for site in sites]
    assert oa.list_slots(oa.insert(BASE, sites[0])) == oa.list_slots(
        oa.insert(BASE, sites[0].address)
    )
    mixed = oa.insert(BASE, [sites[0], sites[1].node])
    assert len(oa.list_slots(mixed)) == 2


def test_lists_are_arrays() -> None:
    model = _adapted()
    (slot,) = oa.list_slots(model)
    lists = {"down": [[1, 0]] * 64, "up": ([0.5] * 64, [1.5] * 64)}
    made = oa.make_adapter(model, "mine", {slot.name: lists})
    with oa.AdapterSession(model, {"mine": made}) as session:
        (by_list,) = session.run({"input_1": X.tolist()}, "mine").values()
        (by_array,) = session.run({"input_1": X}, "mine").values()
        assert np.array_equal(by_list, by_array)
        with pytest.raises(AdaptError, match="input 'input_1' is no array of float"):
            session.run({"input_1": [[1.0], [1.0, 2.0]]})
    assert oa.verify(BASE, model, inputs={"input_1": X.tolist()}, weights=False).passed


def test_numbers_are_fed_in_the_type_of_the_input() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N] x, int64 k, bool b) => (float[N] y) {
      f = Cast <to = 1> (k)
      c = Cast <to = 1> (b)
      s = Add(f, c)
      y = Mul(x, s)
    }"""
    with oa.AdapterSession(onnx.parser.parse_model(text)) as session:
        (y,) = session.run({"x": (1, 2.5), "k": 3, "b": True}).values()
    assert y.tolist() == [4, 10]


WRONG: list[tuple[str, Callable[[], Any], str]] = [
    ("no place", lambda: oa.insert(BASE), "no place was named"),
    ("a place that is a model", lambda: oa.insert(BASE, oa.open_model(BASE)),
     "Model is no place"),
    ("a number as a place", lambda: oa.insert(BASE, [3]), "int is no place"),
    ("an adapter as a model", lambda: oa.fill(_adapter(_adapted()), _adapted()),
     "Adapter is no model"),
    ("a number as an adapter", lambda: oa.fill(_adapted(), 3), "int is no adapter"),
    ("a model as a checkpoint", lambda: oa.convert(_adapted(), "trained"),
     "Model is no path of a checkpoint"),
    ("a part of a model", lambda: oa.list_slots(_adapted().proto), "is a part of a Model"),
    ("a model to open", lambda: oa.open_model(_adapted()), "Model is no path of a model"),
    ("swapped arguments of save_model", lambda: oa.save_model("a.onnx", _adapted()),
     "str is no model"),
    ("an adapter before its path", lambda: oa.save_adapter("a.npz", _adapter(_adapted())),
     "Adapter is no path of an adapter file"),
    ("an adapter as a checkpoint", lambda: oa.insert_checkpoint(BASE, _adapter(_adapted())),
     "Adapter is no checkpoint"),
    ("adapters without names", lambda: oa.AdapterSession(_adapted(), ["a.safetensors"]),
     "adapters is a list"),
    ("no model at all", lambda: oa.AdapterSession(None), "NoneType is no model"),
    ("ONNX Runtime's order", lambda: oa.AdapterSession(_adapted()).run(None, {"input_1": X}),
     "the feeds are of type NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_what_is_swapped_or_missing_is_told(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(AdaptError) as error:
        call()
    assert message in str(error.value)
    assert "\nhint: " in str(error.value)


# What is shown


def test_everything_shows_itself_in_one_line_without_arrays() -> None:
    model = _adapted()
    fr = _adapter(model)
    report = oa.verify(BASE, model)
    session = oa.AdapterSession(model, {"fr": fr})
    (slot,) = oa.list_slots(model)
    shown: list[tuple[object, str]] = [
        (model, "<Model dnsmos-p808.onnx: "),
        (fr, f"<Adapter 'fr': 1 slot, 2,048 bytes; {PLACE}: down (64, 4), up (4, 64)>"),
        (oa.find_sites(BASE, PLACE)[0], ": 64 wide, float32, MatMul>"),
        (slot, "at main:mos_estimator_small_1/dense_4/BiasAdd:0, 64 wide>"),
        (report, "<Report passed: "),
        (session, "<AdapterSession of dnsmos-p808.onnx, adapters: fr>"),
        (oa.quantize(fr), "<Quantised 8 bits of <Adapter 'fr'"),
        (oa.inspect(fr, model), "<Inspection of 'fr': 1 slot, 2,048 bytes, fits>"),
    ]
    for value, text in shown:
        assert text in repr(value)
        assert "\n" not in repr(value)
        assert "array(" not in repr(value)


def test_a_report_prints_as_its_table() -> None:
    text = str(oa.verify(BASE, _adapted()))
    assert text.splitlines()[0].split() == ["check", "result", "measured"]
    assert "off        ok" in text
    assert text.splitlines()[-1].startswith(PLACE)


def test_sites_and_slots_print_as_their_table() -> None:
    sites, slots = oa.find_sites(BASE, "dense"), oa.list_slots(_adapted())
    assert str(sites).splitlines()[0].split()[:2] == ["address", "node"]
    assert len(str(sites).splitlines()) == 1 + 3
    assert str(slots).splitlines()[0].split()[:2] == ["slot", "tensor"]


def test_a_notebook_shows_tables_in_which_names_are_text() -> None:
    model = _adapted()
    fr = _adapter(model, "<b>fr</b>")
    shown: list[Any] = [model, fr, oa.find_sites(BASE), oa.list_slots(model)]
    for value in [*shown, oa.verify(BASE, model)]:
        page = value._repr_html_()
        assert page.count("<table>") == page.count("</table>") >= 1
        assert "<b>" not in page


# A session


def test_a_session_runs_without_stopping_the_event_loop() -> None:
    model = _adapted()
    feeds = {"input_1": X}

    async def both(session: oa.AdapterSession) -> list[dict[str, Any]]:
        return await asyncio.gather(
            session.async_run(feeds, "fr"), session.async_run(feeds, adapter=None)
        )

    with oa.AdapterSession(model, {"fr": _adapter(model)}) as session:
        moved, plain = asyncio.run(both(session))
        assert np.array_equal(moved["Identity:0"], session.run(feeds, "fr")["Identity:0"])
        assert not np.array_equal(moved["Identity:0"], plain["Identity:0"])


def test_a_session_says_that_it_is_opened_in_each_process() -> None:
    with (
        oa.AdapterSession(BASE) as session,
        pytest.raises(TypeError, match="open it again in the worker"),
    ):
        pickle.dumps(session)
