"""The trained cases of tests/cases: what each is, and how to run a model on its inputs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

ROOT = Path(__file__).parent / "cases"


@dataclass(frozen=True)
class Case:
    """A checkpoint as its library saved it, its base, and what PyTorch computes."""

    name: str
    folder: Path
    facts: dict[str, Any]

    @property
    def home(self) -> Path:
        return ROOT / self.facts["base"] if "base" in self.facts else self.folder

    @property
    def base(self) -> Path:
        return self.home / "base.onnx"

    @property
    def adapter(self) -> Path:
        return self.folder / self.facts.get("adapter", "adapter")

    @property
    def tolerance(self) -> float:
        return float(self.facts.get("tolerance", 1e-4))

    def inputs(self) -> dict[str, np.ndarray]:
        own = self.folder / "inputs.npz"
        return _arrays(own if own.exists() else self.home / "inputs.npz")

    def expected(self) -> tuple[str, np.ndarray]:
        """The first output's name, and what PyTorch gives for it with the adapter on."""
        return next(iter(_arrays(self.folder / "expected.npz").items()))

    def distance(self, outputs: dict[str, np.ndarray]) -> float:
        name, value = self.expected()
        found = outputs.get(name, next(iter(outputs.values())))
        return float(np.abs(found.astype(np.float64) - value).max())


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def _cases() -> dict[str, Case]:
    found = {}
    for path in sorted(ROOT.glob("*/case.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        found[path.parent.name] = Case(path.parent.name, path.parent, facts)
    return found


CASES = _cases()
SUPPORTED = [name for name, case in CASES.items() if case.facts.get("supported", True)]
REFUSED = [name for name, case in CASES.items() if not case.facts.get("supported", True)]


def session_of(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, feeds: dict[str, Any], adapter: Path | None = None) -> dict[str, Any]:
    """Run a model file, with an adapter file through ONNX Runtime's LoraAdapter if given."""
    session = session_of(path)
    names = [item.name for item in session.get_outputs()]
    options = ort.RunOptions()
    loaded = ort.LoraAdapter()  # must outlive the run: the options do not hold it
    if adapter is not None:
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
    return dict(zip(names, session.run(None, feeds, options), strict=True))
