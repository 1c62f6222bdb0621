"""Make what the page and its test read: adapted models, adapters, inputs, expected outputs.

`python make.py`, where onnx-adapt is installed, writes everything into `made/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import onnx_adapt as oa

ROOT = Path(__file__).resolve().parents[2]
MADE = Path(__file__).resolve().parent / "made"
BASE = ROOT / "models/dnsmos-p808.onnx"
TRAINED = ROOT / "tests/cases/peft_bert_lora_default_ts"
RATE, WINDOW, HOP, BANDS, FRAMES = 16_000, 321, 160, 120, 900

# Two panels of listeners, as curves over the base's rating: a unit with weights (bend, slope)
# adds slope * relu(rating - bend). The bottleneck is the number of bends.
CURVES = {
    "strict.safetensors": [(1.5, -0.5), (2.2, -0.3)],
    "generous.onnx_adapter": [(1.0, 0.8), (2.2, -0.4), (3.5, -0.9)],
}

Floats = np.ndarray[Any, np.dtype[np.float32]]
Feeds = Mapping[str, np.ndarray[Any, Any]]


def main() -> None:
    """Write all files."""
    MADE.mkdir(exist_ok=True)
    expected = {"rating": rating(), "trained": trained()}
    (MADE / "expected.json").write_text(json.dumps(expected, indent=1), encoding="utf-8")


def rating() -> dict[str, Any]:
    """The page's model rates sounds; its one slot is on the rating, `(rows, 1)`."""
    place = "mos_estimator_small_1/dense_5/MatMul_add"
    model = oa.insert(oa.open_model(BASE), after=place, bias=True)
    oa.save_model(model, MADE / "rating.onnx")
    for file, curve in CURVES.items():
        bends, slopes = np.array(curve, np.float32).T
        weights = {
            "down": np.ones((1, len(curve)), np.float32),
            "down_bias": -bends,
            "up": slopes[:, None],
            "up_bias": np.zeros(1, np.float32),
        }
        (slot,) = oa.list_slots(model)
        made = oa.make_adapter(model, Path(file).stem, {slot.name: weights})
        oa.save_adapter(made, MADE / file)
    sounds = {"clean": voice(noise=0.0), "noisy": voice(noise=0.05)}
    features = {name: log_mel(sound) for name, sound in sounds.items()}
    for name, values in features.items():
        values.tofile(MADE / f"{name}.f32")
    return {
        name: outputs("rating.onnx", list(CURVES), {"input_1": values})
        for name, values in features.items()
    }


def trained() -> dict[str, Any]:
    """A tiny BERT with a LoRA and a classifier that PEFT trained, in both file formats."""
    base = oa.open_model(TRAINED / "base.onnx")
    checkpoint = oa.load_checkpoint(TRAINED / "adapter", base, name="trained")
    oa.save_model(oa.insert_checkpoint(base, checkpoint), MADE / "bert.onnx")
    files = ["bert.safetensors", "bert.onnx_adapter"]
    for file in files:
        oa.save_adapter(checkpoint.adapter, MADE / file)
    feeds = dict(np.load(TRAINED / "inputs.npz"))
    inputs = {
        name: {"type": str(value.dtype), "dims": value.shape, "data": value.ravel().tolist()}
        for name, value in feeds.items()
    }
    return {"inputs": inputs, **outputs("bert.onnx", files, feeds)}


def outputs(model: str, files: list[str], feeds: Feeds) -> dict[str, list[float]]:
    """The first output by the base, and by each adapter."""
    with oa.AdapterSession(MADE / model, {file: MADE / file for file in files}) as session:
        found = {file: session.run(feeds, file) for file in files}
        found["base"] = session.run(feeds)
    return {name: next(iter(out.values())).ravel().tolist() for name, out in found.items()}


def voice(noise: float) -> Floats:
    """Nine seconds of a voice-like sound, `(samples,)`: harmonics, formants, syllables."""
    time = np.arange(FRAMES * HOP) / RATE
    pitch = 120 + 20 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    sound = np.zeros_like(time)
    for harmonic in range(1, 40):
        gains = [1 / (1 + ((harmonic * pitch - f) / 90) ** 2) for f in (500, 1500, 2500)]
        sound += sum(gains) * np.sin(harmonic * phase)
    sound *= 0.3 / np.abs(sound).max() * np.sin(2 * np.pi * 3 * time).clip(0)
    hiss = np.random.default_rng(0).standard_normal(len(time))
    return (sound + noise * hiss).astype(np.float32)


def log_mel(sound: Floats) -> Floats:
    """What the network takes, `(1, frames, bands)`: decibels below the loudest band."""
    padded = np.pad(sound, WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:FRAMES]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW + 1)[:-1])) ** 2
    # Slaney's scale: linear to 1 kHz, which is 15 mel, and logarithmic above.
    step = np.log(6.4) / 27
    mel = np.linspace(0, 15 + np.log(RATE / 2000) / step, BANDS + 2)
    hertz = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(step * (mel - 15)))
    low, middle, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    bins = np.fft.rfftfreq(WINDOW, 1 / RATE)
    triangles = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle))
    bands = power @ (triangles.clip(0) * 2 / (high - low)).T
    decibels = 10 * np.log10((bands / bands.max()).clip(1e-8))
    return np.asarray((decibels[None] + 40) / 40, np.float32)


if __name__ == "__main__":
    main()
