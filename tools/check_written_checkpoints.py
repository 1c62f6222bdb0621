"""Load checkpoints that onnx-adapt wrote in their own library, and compare the outputs.

``save_checkpoint`` writes each case of ``tests/cases/`` to a folder ``WRITTEN/<case>``. This
script loads it there and prints the largest difference from the outputs that the library gave
with the adapter it had trained. It runs in the environment of ``make_peft_cases.py`` or of
``make_adapterhub_cases.py``::

    python tools/check_written_checkpoints.py peft WRITTEN
    python tools/check_written_checkpoints.py adapterhub WRITTEN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from case_making import DEFAULT_FOLDER, Base, compute, difference, make
from torch import nn


def bases_of(library: str) -> dict[str, Base]:
    """Return the bases of a library's cases by name."""
    if library == "peft":
        import make_peft_cases

        return dict(make_peft_cases.BASES)
    import make_adapterhub_cases

    return make_adapterhub_cases.BASES | make_adapterhub_cases.BASES_OF_PEFT


def loaded(library: str, model: nn.Module, folder: Path) -> nn.Module:
    """Load what was written into a model."""
    if library == "peft":
        import peft

        return peft.PeftModel.from_pretrained(model, str(folder)).eval()
    import adapters

    adapters.init(model)
    model.load_adapter(str(folder), use_safetensors=True, set_active=True)
    return model.eval()


def main() -> None:
    """Compare every folder that is of a case whose base the library's script makes."""
    library, written = sys.argv[1], Path(sys.argv[2])
    bases = bases_of(library)
    prefix = "peft_" if library == "peft" else "ah_"
    for folder in sorted(written.glob(f"{prefix}*")):
        case = DEFAULT_FOLDER / folder.name
        facts = json.loads((case / "case.json").read_text(encoding="utf-8"))
        name = facts.get("base", "").removeprefix("bases/")
        if name not in bases:
            print(f"{folder.name}: its base is made by another script")
            continue
        with np.load(case / "expected.npz") as stored:
            expected = dict(stored)
        model = loaded(library, make(bases[name]), folder)
        print(f"{folder.name}: {difference(compute(model, bases[name]), expected):.1e}")


if __name__ == "__main__":
    main()
