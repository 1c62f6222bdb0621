"""Compare what `train.c` printed and wrote with what Python learned.

`python compare.py LOSSES ADAPTER`, with the lines that the program printed in the file LOSSES.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import onnx_adapt as oa

MADE = Path(__file__).resolve().parent / "made"
TOLERANCE = 1e-5


def main(printed: str, adapter_file: str) -> None:
    """Compare the losses, the weights, and the loss of the adapted model with the adapter."""
    wanted = json.loads((MADE / "expected.json").read_text(encoding="utf-8"))["losses"]
    lines = Path(printed).read_text(encoding="utf-8").splitlines()
    losses = [float(line.split()[-1]) for line in lines]
    compare("losses", losses, wanted)
    adapter = oa.load_adapter(adapter_file)
    weights = dict(np.load(MADE / "weights.npz"))
    tensors = adapter.tensors()
    if tensors.keys() != weights.keys():
        sys.exit(f"the weights are {sorted(tensors)}, not {sorted(weights)}")
    for name, value in weights.items():
        compare(name, tensors[name], value)
    runs_with(weights_of=adapter, below=wanted[0])


def compare(name: str, found: object, wanted: object) -> None:
    """Say how far two arrays are apart; exit if that is too far."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    if found.shape != wanted.shape:
        sys.exit(f"{name}: the shape is {found.shape}, not {wanted.shape}")
    apart = np.abs(found - wanted).max()
    print(f"{name} {found.shape}: within {apart:.1e} of Python's")
    if not apart <= TOLERANCE:
        sys.exit(f"{name}: more than {TOLERANCE} apart")


def runs_with(weights_of: oa.Adapter, below: float) -> None:
    """Run the adapted model with the adapter; exit if it learned nothing."""
    feeds = dict(np.load(MADE / "samples.npz"))
    labels = feeds.pop("labels")
    model = oa.open_model(MADE / "adapted.onnx")
    adapter = oa.make_adapter(model, "trained", weights_of.weights)  # for this base alone
    with oa.AdapterSession(model, {"trained": adapter}) as session:
        logits = session.run(feeds, "trained")["logits"].astype(np.float64)
    chosen = logits[np.arange(len(labels)), labels]
    loss = (np.log(np.exp(logits).sum(axis=1)) - chosen).mean()
    print(f"loss of the adapted model with the adapter: {loss:.3f}")
    if not loss < below / 2:
        sys.exit("nothing was learned")


if __name__ == "__main__":
    main(*sys.argv[1:])
