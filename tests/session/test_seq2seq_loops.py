"""Greedy decoding with a cache through AdapterSession: the tokens and logits are PyTorch's.

PyTorch's answers are of loops without a cache (`tests/pipelines/*/decoded.npz`).
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from pipeline_runs import Fixture, arrays_of

import onnx_adapt as oa

Arrays = dict[str, np.ndarray]
Step = Callable[[Arrays, bool], Arrays]

NAMES = ("t5", "bart", "whisper")


@pytest.fixture(scope="module", params=NAMES)
def adapted(request: pytest.FixtureRequest) -> tuple[Fixture, oa.AdaptedFolder]:
    fixture = Fixture(f"{request.param}/optimum")
    return fixture, oa.insert_folder(fixture.folder, fixture.adapter("lora"), name="fr")


@pytest.fixture(scope="module")
def sessions(
    adapted: tuple[Fixture, oa.AdaptedFolder],
) -> Iterator[dict[str, oa.AdapterSession]]:
    made = adapted[1]
    opened = {
        file.path.stem: oa.AdapterSession(file.adapted, {"fr": made.adapter})
        for file in made.files
        if file.adapted
    }
    yield opened
    for session in opened.values():
        session.close()


def _empty_cache(session: oa.AdapterSession, rows: int) -> Arrays:
    found = {}
    for name, item in session.inputs.items():
        if name.startswith("past_key_values"):
            heads, width = item.shape[1], item.shape[3]
            found[name] = np.zeros((rows, heads, 1, width), np.float32)
    return found


def _merged(sessions: dict[str, oa.AdapterSession], adapter: str | None, rows: int) -> Step:
    """One file with both branches of an If."""
    decoder = sessions["decoder_model_merged"]
    empty = _empty_cache(decoder, rows)

    def step(feeds: Arrays, first: bool) -> Arrays:
        branch = {"use_cache_branch": np.array([not first])}
        return decoder.run({**(empty if first else {}), **feeds, **branch}, adapter=adapter)

    return step


def _apart(sessions: dict[str, oa.AdapterSession], adapter: str | None, rows: int) -> Step:
    """One file for the first token, and one with a cache for those after it."""

    def step(feeds: Arrays, first: bool) -> Arrays:
        decoder = sessions["decoder_model" if first else "decoder_with_past_model"]
        return decoder.run(feeds, adapter=adapter)

    return step


@pytest.mark.parametrize("decoder", [_merged, _apart])
@pytest.mark.parametrize(("adapter", "answer"), [(None, "base"), ("fr", "lora")])
def test_greedy_decoding_with_a_cache_is_pytorchs(
    adapted: tuple[Fixture, oa.AdaptedFolder],
    sessions: dict[str, oa.AdapterSession],
    decoder: Callable[..., Step],
    adapter: str | None,
    answer: str,
) -> None:
    fixture = adapted[0]
    expected = arrays_of(fixture.home / "decoded.npz")
    tokens, logits = expected[f"{answer}.tokens"], expected[f"{answer}.logits"]
    given = fixture.inputs()
    del given["decoder_input_ids"]
    states = sessions["encoder_model"].run(given, adapter=adapter)["last_hidden_state"]
    step = decoder(sessions, adapter, len(tokens))
    fixed = {"encoder_hidden_states": states}
    if "attention_mask" in given:
        fixed["encoder_attention_mask"] = given["attention_mask"]
    words, cache = tokens[:, :1], {}
    for at in range(logits.shape[1]):
        session = sessions["decoder_with_past_model" if cache else "decoder_model"]
        known = (
            session.inputs if decoder is _apart else sessions["decoder_model_merged"].inputs
        )
        feeds = {"input_ids": words[:, -1:], **fixed, **cache}
        found = step({k: v for k, v in feeds.items() if k in known}, not cache)
        fresh = {
            key.replace("present", "past_key_values"): value
            for key, value in found.items()
            if key.startswith("present")
        }
        cache |= {key: value for key, value in fresh.items() if value.size}
        np.testing.assert_allclose(found["logits"][:, -1], logits[:, at], rtol=1e-4, atol=1e-4)
        words = np.concatenate([words, found["logits"][:, -1:].argmax(-1)], axis=1)
    np.testing.assert_array_equal(words, tokens)


def test_an_adapter_of_the_folder_does_not_fit_a_file_of_another(
    adapted: tuple[Fixture, oa.AdaptedFolder], sessions: dict[str, oa.AdapterSession]
) -> None:
    others = [name for name in NAMES if name not in adapted[0].name]
    other = Fixture(f"{others[0]}/optimum")
    trained = oa.insert_folder(other.folder, other.adapter("lora")).adapter
    for session in sessions.values():
        with pytest.raises(oa.AdaptError, match="another base model"):
            session.load("other", trained)
