"""Inputs that make sense for the six trained models of `tools/fetch_models`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Feeds = dict[str, np.ndarray[Any, np.dtype[Any]]]
MakeFeeds = Callable[[np.random.Generator, int], Feeds]

_FOX = [101, 1996, 4248, 2829, 4419, 14523, 2058, 1996, 13971, 3899, 1012, 102]
"""Token ids of a sentence of twelve."""


def _sentences(_: np.random.Generator, variant: int) -> Feeds:
    pair = [[*_FOX[:7], 102], [*_FOX[4:11], 102]]
    ids = np.array(pair if variant else [_FOX], np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _dnsmos(rng: np.random.Generator, variant: int) -> Feeds:
    noise = rng.standard_normal((1 + variant, 900, 120)) * 0.2
    return {"input_1": noise.astype(np.float32)}


def _plcmos(rng: np.random.Generator, variant: int) -> Feeds:
    frames = 75 if variant else 120
    audio = np.abs(rng.standard_normal((1, 1, frames, 257)))
    rater = rng.standard_normal((1, 64))
    return {
        "degraded_audio": audio.astype(np.float32),
        "rater_embed": rater.astype(np.float32),
    }


def _silero(rng: np.random.Generator, variant: int) -> Feeds:
    """Both branches of the model's If: it takes one at 16 kHz and the other at 8 kHz.

    The state is one from the middle of a stream: at its start it is zero, and then the
    adapters on what is made of it have nothing to read.
    """
    rate, length = (8000, 288) if variant else (16000, 576)
    speech = np.repeat(_voice(length, rate, rng)[None], 1 + variant, 0)
    state = rng.standard_normal((2, 1 + variant, 128)).astype(np.float32)
    return {"input": speech, "state": state, "sr": np.array(rate, np.int64)}


def _voice(
    length: int, rate: int, rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Something like speech: harmonics under an envelope, plus noise. `(length,)`."""
    time_axis = np.arange(length) / rate
    pitch = 130 + 20 * np.sin(2 * np.pi * 1.5 * time_axis)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    tone = sum(np.sin(k * phase) / k for k in range(1, 12))
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * 3 * time_axis)
    return (0.1 * tone * envelope + 0.005 * rng.standard_normal(length)).astype(np.float32)


def _smart_turn(rng: np.random.Generator, variant: int) -> Feeds:
    features = (0.5 * rng.standard_normal((1 + variant, 80, 800))).clip(-1, 1.5)
    return {"input_features": features.astype(np.float32)}


MAKERS: dict[str, MakeFeeds] = {
    "dnsmos-p808": _dnsmos,
    "plcmos": _plcmos,
    "silero-vad-ifless": _silero,
    "minilm-l3": _sentences,
    "minilm-l3-fp16": _sentences,
    "smart-turn": _smart_turn,
}
"""The inputs of each model; variant 0 and 1 have different shapes."""


def feeds(model: str) -> list[Feeds]:
    """Two sets of inputs, of different shapes."""
    return [MAKERS[model](np.random.default_rng(0), variant) for variant in (0, 1)]
