"""Records: those of 0.1.0 stay readable, and what a record does not know is kept."""

import json
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slot_formula import PLAIN

import onnx_adapt as oa
from onnx_adapt.adapter.record import write_record
from onnx_adapt.errors import ManifestError
from onnx_adapt.slot.base_changes import Head, ReplaceableWeight, Widened
from onnx_adapt.slot.manifest import (
    KEY,
    Manifest,
    Slot,
    manifest_from_text,
    read_manifest,
    write_manifest,
)
from onnx_adapt.slot.parts import PARTS
from onnx_adapt.slot.record import SameAs

OLD = Path(__file__).parent / "records"
FILES = ("fr.npz", "fr.onnx_adapter", "fr.safetensors")


def _record(model: oa.Model) -> dict[str, Any]:
    (text,) = [entry.value for entry in model.proto.metadata_props if entry.key == KEY]
    return json.loads(text)


def _with_record(model: oa.Model, record: dict[str, Any]) -> oa.Model:
    changed = model.copy()
    (entry,) = [entry for entry in changed.proto.metadata_props if entry.key == KEY]
    entry.value = json.dumps(record)
    return changed


def _old() -> oa.Model:
    return oa.open_model(OLD / "adapted.onnx")


# An .onnx_adapter file of 0.1.0 has no record, so it does not tell its activations.
@pytest.mark.filterwarnings(
    "ignore:.*activation not checked:onnx_adapt.errors.UncheckedWarning"
)
@pytest.mark.parametrize("file", FILES)
def test_a_model_and_adapters_of_0_1_0_give_what_they_gave(file: str) -> None:
    with (
        np.load(OLD / "truth.npz") as truth,
        oa.AdapterSession(OLD / "adapted.onnx", {"fr": OLD / file}) as session,
    ):
        feeds = {"x": truth["x"]}
        for adapter, wanted in ((None, truth["off"]), ("fr", truth["on"])):
            got = session.run(feeds, adapter=adapter)["y"]
            np.testing.assert_allclose(got, wanted, 1e-5, 1e-6)


def test_a_model_of_0_1_0_is_proven_and_removed_byte_for_byte() -> None:
    slots = {slot.name: slot for slot in oa.list_slots(_old())}
    assert [slot.batched for slot in slots.values()] == [False, False, True]
    assert oa.verify(OLD / "base.onnx", OLD / "adapted.onnx").passed
    assert (OLD / "base.onnx").read_bytes() == oa.remove(_old()).proto.SerializeToString()


@pytest.mark.parametrize("file", ["fr.npz", "fr.safetensors"])
def test_an_adapter_file_of_0_1_0_is_written_again_as_it_was(
    file: str, tmp_path: Path
) -> None:
    oa.save_adapter(oa.load_adapter(OLD / file), tmp_path / file)
    assert (tmp_path / file).read_bytes() == (OLD / file).read_bytes()


def test_a_record_of_0_1_0_means_the_same_when_it_is_written_again() -> None:
    old = read_manifest(_old().proto)
    again = _old()
    write_manifest(again.proto, old)
    assert read_manifest(again.proto) == old
    assert len(json.dumps(_record(again))) < 0.7 * len(json.dumps(_record(_old())))


def test_a_record_has_only_what_differs_from_the_default() -> None:
    model = oa.open_model(OLD / "base.onnx")
    slot = replace(PLAIN, source=PLAIN.inner, output=PLAIN.tensor, source_width=PLAIN.width)
    head = ReplaceableWeight("w3", "w3", copied=False, swappable=True, trained=False)
    manifest = Manifest("sha256:0", 8, canonical=True, inlined=False, slots=(slot,))
    write_manifest(model.proto, manifest)
    assert _record(model) == {
        "format": 2,
        "base": {"fingerprint": "sha256:0", "ir_version": 8},
        "slots": [
            {
                "name": "s",
                "node": "layer",
                "tensor": "y",
                "inner": "t",
                "width": PLAIN.width,
                "dtype": "float32",
                "activation": "relu",
                "parts": ["down", "up"],
            }
        ],
    }
    write_manifest(model.proto, replace(manifest, weights=(head,)))
    assert _record(model)["weights"] == [{"name": "w3"}]
    assert manifest_from_text(json.dumps(_record(model))) == replace(manifest, weights=(head,))


def test_keys_that_are_unknown_are_kept_through_edits() -> None:
    record = _record(_old())
    news = {"news": {"what": ["ü", 1, None]}}
    for place in (record, record["base"], *record["slots"], *record["weights"]):
        place |= news
    model = _with_record(_old(), record)
    edited = oa.insert(model, after="act")
    written = _record(edited)
    assert written["news"] == written["base"]["news"] == news["news"]
    assert [slot.get("news") for slot in written["slots"]] == [*[news["news"]] * 3, None]
    assert [weight["news"] for weight in written["weights"]] == [news["news"]]
    removed = oa.remove(edited)
    assert removed.proto.SerializeToString() == (OLD / "base.onnx").read_bytes()


@pytest.mark.parametrize("place", ["top", "base", "slot", "weight"])
@pytest.mark.parametrize("odd", [{"\ud800": 1}, {"news": "\ud800"}])
def test_an_unknown_key_that_no_model_can_hold_is_damage(
    place: str, odd: dict[str, Any]
) -> None:
    record = _record(_old())
    places = {
        "top": record,
        "base": record["base"],
        "slot": record["slots"][0],
        "weight": record["weights"][0],
    }
    places[place].update(odd)
    with pytest.raises(ManifestError, match="damaged"):
        manifest_from_text(json.dumps(record))


def test_a_record_of_a_newer_format_is_refused() -> None:
    record = {**_record(_old()), "format": 3}
    with pytest.raises(ManifestError, match="written in format 3") as caught:
        oa.list_slots(_with_record(_old(), record))
    assert "pip install -U" in caught.value.hint


@pytest.mark.parametrize("suffix", ["npz", "onnx_adapter", "safetensors"])
def test_keys_that_an_adapter_file_has_and_we_do_not_know_are_kept(
    suffix: str, tmp_path: Path
) -> None:
    adapter = oa.load_adapter(OLD / "fr.npz")
    news = (("news", '{"what":["ü",1,null]}'),)
    adapter = replace(adapter, extra={"": news, "first": news})
    for name in ("once", "twice"):
        path = oa.save_adapter(adapter, tmp_path / f"{name}.{suffix}")
        adapter = oa.load_adapter(path)
        assert adapter.extra == {"": news, "first": news}


FORMATS = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")


def test_the_page_of_formats_names_every_part_and_what_rows_have_of_it() -> None:
    rows = {part.row.name for part in PARTS.values() if part.row}
    assert [name for name in (*PARTS, *rows) if f"`{name}`" not in FORMATS] == []


@pytest.mark.parametrize("kind", [Slot, ReplaceableWeight, Widened, Head, Manifest])
def test_the_page_of_formats_names_every_key_of_a_record(kind: type) -> None:
    held = {field.name for field in fields(kind)} - {"extra", "base_extra"}
    assert [name for name in held if f"`{name}`" not in FORMATS] == []


def test_the_page_of_formats_tells_the_default_of_every_key() -> None:
    table = FORMATS[FORMATS.index("| key of a slot |") :].split("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()]
    for field in fields(Slot):
        default = field.metadata.get("absent", field.default)
        if default is MISSING or field.name == "extra":
            continue
        shown = default.field if isinstance(default, SameAs) else json.dumps(default)
        (told,) = [told for keys, told in rows if f"`{field.name}`" in keys]
        assert shown.replace("()", "[]") in told, field.name


@pytest.mark.parametrize("file", ["fr.npz", "fr.safetensors"])
def test_the_page_of_formats_names_every_key_of_an_adapter_file(file: str) -> None:
    record = json.loads(write_record(oa.load_adapter(OLD / file)))
    keys = {*record, *(key for slot in record["slots"].values() for key in slot)}
    assert [key for key in keys if f"`{key}`" not in FORMATS] == []
