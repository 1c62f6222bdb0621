"""onnxruntime-genai runs a batch with another adapter in each row, from one adapter file."""

from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
from genai_models import FOLDER, PLACES, PROMPT, STEPS, bottlenecks, by_pytorch, put

import onnx_adapt as oa
from onnx_adapt.errors import AdapterError

ROWS = ("narrow", None, "mixed", "narrow", "mixed", None)


def _batched(precision: str) -> oa.Model:
    base = oa.open_model(FOLDER / precision / "model.onnx")
    return oa.insert(base, after=PLACES, batched=True)


def _tokens(folder: Path, file: Path | None, rows: int) -> list[list[int]]:
    """What each row of a batch of the same prompt says next."""
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    length = len(PROMPT) + STEPS
    params.set_search_options(max_length=length, do_sample=False, batch_size=rows)
    generator = og.Generator(model, params)
    adapters = og.Adapters(model)
    if file:
        adapters.load(str(file), "rows")
        generator.set_active_adapter(adapters, "rows")
    generator.append_tokens(np.stack([PROMPT] * rows))
    for _ in range(STEPS):
        generator.generate_next_token()
    return [
        [int(t) for t in generator.get_sequence(row)[len(PROMPT) :]] for row in range(rows)
    ]


def _packed(model: oa.Model, rows: tuple[str | None, ...], path: Path) -> Path:
    loaded = {name: bottlenecks(name, model) for name in rows if name}
    return oa.save_adapter(
        oa.pack_rows(model, [loaded.get(name or "") for name in rows]), path
    )


def test_each_row_of_a_genai_batch_writes_what_pytorch_writes_with_its_adapter(
    tmp_path: Path,
) -> None:
    model = _batched("tinyllama")
    folder = put(model, tmp_path / "model")
    file = _packed(model, ROWS, tmp_path / "rows.onnx_adapter")
    found = _tokens(folder, file, len(ROWS))
    assert found == [by_pytorch(name or "base").tokens for name in ROWS]


def test_in_int4_the_rows_of_a_batch_write_what_they_write_one_by_one(tmp_path: Path) -> None:
    model = _batched("tinyllama_int4")
    folder = put(model, tmp_path / "model")
    found = _tokens(folder, _packed(model, ROWS, tmp_path / "all.onnx_adapter"), len(ROWS))
    for row, name in enumerate(ROWS):
        alone = _packed(model, (name,), tmp_path / f"{row}.onnx_adapter")
        assert _tokens(folder, alone, 1) == [found[row]], name


def test_rows_of_the_base_alone_write_what_the_base_writes(tmp_path: Path) -> None:
    model = _batched("tinyllama")
    folder = put(model, tmp_path / "model")
    file = _packed(model, (None, None), tmp_path / "rows.onnx_adapter")
    assert _tokens(folder, file, 2) == _tokens(folder, None, 2)


def test_a_mask_given_as_a_model_input_is_silently_ignored_by_genai(tmp_path: Path) -> None:
    """The trap that `docs/genai.md` names; when this fails, the page must change."""
    model = _batched("tinyllama")
    folder = put(model, tmp_path / "model")
    file = _packed(model, ("narrow", "narrow"), tmp_path / "rows.onnx_adapter")
    opened = og.Model(str(folder))
    params = og.GeneratorParams(opened)
    params.set_search_options(max_length=len(PROMPT) + STEPS, do_sample=False, batch_size=2)
    generator = og.Generator(opened, params)
    for name, value in oa.load_adapter(file).feeds().items():
        generator.set_model_input(name, value.copy())  # as it must be writeable
    generator.append_tokens(np.stack([PROMPT] * 2))
    for _ in range(STEPS):
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)[len(PROMPT) :]]
    assert found == by_pytorch("base").tokens


def test_rows_that_cannot_be_packed_are_refused() -> None:
    model = _batched("tinyllama")
    narrow = bottlenecks("narrow", model)
    packed = oa.pack_rows(model, [narrow, None])
    plain = oa.insert(oa.open_model(FOLDER / "tinyllama" / "model.onnx"), after=PLACES)
    half = oa.Adapter("half", dict(list(narrow.weights.items())[:1]))
    for given, adapters, why in (
        (model, [], "there are no rows to pack"),
        (plain, [bottlenecks("narrow", plain)], "is not batched"),
        (model, [packed], "is packed for rows already"),
        (model, [half], "it has no weights for slot"),
    ):
        with pytest.raises(AdapterError, match=why) as caught:
            oa.pack_rows(given, adapters)
        assert caught.value.hint


def test_a_pack_fits_its_model_and_a_session_says_to_give_a_list(tmp_path: Path) -> None:
    from onnx_adapt.adapter.fitting import misfits

    model = _batched("tinyllama")
    packed = oa.pack_rows(model, [bottlenecks("narrow", model), None])
    assert misfits(model, packed) == []
    path = oa.save_adapter(packed, tmp_path / "rows.onnx_adapter")
    folder = put(model, tmp_path / "model")
    with (
        oa.AdapterSession(folder / "model.onnx") as session,
        pytest.raises(AdapterError, match="packed for the rows of one batch"),
    ):
        session.load("rows", path)


def test_a_pack_with_other_rows_in_one_slot_does_not_fit() -> None:
    from onnx_adapt.adapter.fitting import misfits

    model = _batched("tinyllama")
    narrow = bottlenecks("narrow", model)
    two, three = oa.pack_rows(model, [narrow] * 2), oa.pack_rows(model, [narrow] * 3)
    slot = next(iter(two.weights))
    odd = oa.Adapter("odd", {**two.weights, slot: three.weights[slot]})
    assert any("different numbers of rows: [2, 3]" in text for text in misfits(model, odd))
