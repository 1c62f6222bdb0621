"""Where sums of 8-bit products saturate, `verify` says what that does to a base."""

import platform
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from pipeline_runs import Fixture

import onnx_adapt as oa
from onnx_adapt.ort import CPU, Provider
from onnx_adapt.proof.processor import processor_warning, saturates


def has_vnni() -> bool:
    """Whether this processor multiplies bytes into 32 bits, by what Linux says of it."""
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii").split()
    return bool({"avx512_vnni", "avx_vnni"} & set(flags))


def test_products_saturate_on_x86_without_vnni() -> None:
    x86 = platform.machine() in ("x86_64", "AMD64")
    assert saturates() == (x86 and not has_vnni())


@pytest.mark.parametrize("name", ["bert/qoperator", "bert/qdq", "bert/ort_all"])
def test_a_base_is_warned_of_where_a_plain_session_is_far_from_pytorch(name: str) -> None:
    fixture = Fixture(name)
    given, answer = fixture.inputs(), fixture.answer("base")
    session = ort.InferenceSession(fixture.folder / "model.onnx")
    feeds = {item.name: given[item.name] for item in session.get_inputs()}
    (logits,) = session.run(None, feeds)
    far = np.abs(logits - answer).max() > 0.15 * np.abs(answer).max()

    base = oa.open_model(fixture.folder / "model.onnx")
    site = next(s for s in oa.find_sites(base, "*output.dense*") if s.refused is None)
    report = oa.verify(base, oa.insert(base, after=site.address), inputs=feeds)
    assert report.passed
    assert any("8-bit products saturate" in line for line in report.warnings) == far
    assert far == (saturates() and "q" in name)


def test_a_base_that_cannot_be_run_exactly_is_warned_of_without_a_measurement() -> None:
    base = oa.open_model(Fixture("bert/qoperator").folder / "model.onnx")
    (warning,) = processor_warning(base, [], None, CPU) if saturates() else ("may be far off",)
    assert "may be far off" in warning
    assert processor_warning(base, [], None, (Provider("CUDAExecutionProvider"),)) == ()
