"""Adapters as people have them, each against PyTorch's numbers or with the reason against it.

A case in `tests/cases/handed/` has the adapter as its library saved it, what PyTorch computes
with it, and in `case.json` the base that it is for. What it must do is one line of `RIGHT` or
of `REFUSED` here.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slot_models import cli
from trained_cases import ROOT

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError

HANDED = ROOT / "handed"
RIGHT: dict[str, dict[str, Any]] = {
    "adalora": {},
    "checkpoint_wrapped": {},
    "extra_optimizer_keys": {"warns": "left out v_head.summary: a value head"},
    "ia3_attention_qkv_input": {},
    "phi3_unfused_keys": {},
    "siglip_all_linear": {"warns": "left out head.attention.out_proj: torch.nn.Multihead"},
    "split_whisper_root_both": {"part": "model.encoder"},
    "trainable_token_indices": {},
    "vlm_lora_before_4_52": {},
}
"""What is to be right, with the warning, and the arguments that `load_checkpoint` needs."""

REFUSED = {
    "resized_on_unresized_base": (
        "the vocabulary was enlarged by 3 rows for this adapter: 'lm_head' has 100 rows in "
        "the checkpoint and 97 in the graph",
        "resize the base by 3 rows and export again: model.resize_token_embeddings(100)",
    ),
    "split_whisper_root_both": ("8 of 12 modules", "--part model.encoder"),
    "split_whisper_root_decoder_adapter": (
        "the checkpoint is of 'decoder', a part of a model; the graph shows by its class or "
        "inputs that it is of audio and encoder",
        "export the part that the adapter is for",
    ),
}
"""What is to be refused, with words of the message and of the hint."""


def _base(name: str) -> Path:
    facts = json.loads((HANDED / name / "case.json").read_text(encoding="utf-8"))
    return HANDED / "bases" / str(facts["base"])


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


@pytest.mark.parametrize("baked", [False, True], ids=["swappable", "baked"])
@pytest.mark.parametrize("name", RIGHT)
def test_a_handed_adapter_gives_what_pytorch_gives(
    name: str, baked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = {key: value for key, value in RIGHT[name].items() if key != "warns"}
    home = _base(name)
    base = oa.open_model(home / "base.onnx")
    with caplog.at_level(logging.WARNING):
        trained = oa.load_checkpoint(HANDED / name / "adapter", base, **chosen)
    assert RIGHT[name].get("warns", "") in caplog.text
    assert bool(caplog.text) == ("warns" in RIGHT[name])
    (output, expected), *_ = _arrays(HANDED / name / "expected.npz").items()
    before = _arrays(home / "base_expected.npz")[output]
    adapted = oa.insert_checkpoint(base, trained, baked=baked)
    with oa.AdapterSession(adapted) as session:
        found = session.run(_arrays(home / "inputs.npz"), None if baked else trained.adapter)
    first = next(iter(found.values()))
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - before).max() > 0.1, "the case does not tell on from off"


@pytest.mark.parametrize("name", REFUSED)
def test_a_handed_adapter_that_cannot_be_right_is_refused_with_the_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message, hint = REFUSED[name]
    base, adapter = _base(name) / "base.onnx", HANDED / name / "adapter"
    with pytest.raises(CheckpointError) as caught:
        oa.load_checkpoint(adapter, oa.open_model(base))
    assert message in caught.value.message
    assert hint in caught.value.hint
    given = ("insert", str(base), "--adapter", str(adapter), "-o", str(tmp_path / "a.onnx"))
    assert cli(capsys, *given)[0] == 2
    assert not list(tmp_path.iterdir())
