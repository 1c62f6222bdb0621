"""Write cases of trained adapters: an ONNX base, an adapter, and what PyTorch computes.

This module is shared by ``make_peft_cases.py`` and ``make_adapterhub_cases.py``, which
need different environments. What they write is committed in ``tests/cases/``, so that
the tests need neither torch nor a training library::

    bases/<base>/base.onnx           a model with random weights, exported without adapters
    bases/<base>/base.json           how it was exported
    bases/<base>/inputs.npz          inputs, of other sizes than the exporter saw
    bases/<base>/base_expected.npz   what PyTorch computes from them without an adapter
    <case>/adapter/                  the adapter, as the training library saved it
    <case>/expected.npz              what PyTorch computes with the adapter on
    <case>/case.json                 versions, the name of the base, what the case exercises

A case is right when the first array of ``expected.npz`` is reached up to ``tolerance``
of ``case.json``; its name is that of the output. ``adapter`` in ``case.json`` names the
folder to read. A case that is not ``supported`` says why in ``reason``. Stack traces and
the bulk of the metadata, which name no module, are taken out of the bases.

Weights are seeded by the name of the parameter, so a model has the same weights in every
environment, also where a release of transformers renamed its modules.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from export_fixtures import BATCH_AXES, TEXT_AXES, Axes, Tensors, strip_stack_traces
from torch import nn

Arrays = dict[str, np.ndarray]

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "tests" / "cases"
BULKY = ("pkg.torch.onnx.class_hierarchy", "pkg.torch.onnx.fx_node")
TOLERANCE = 1e-4
SMALLEST_EFFECT = 0.05
LOGITS = {"logits": BATCH_AXES}
TOKEN_LOGITS = {"logits": TEXT_AXES}
SEQUENCE = {"last_hidden_state": TEXT_AXES, "pooler_output": BATCH_AXES}
MACHINE_PATH = re.compile(rb"/(?:tmp|home|root|usr|opt|work)/|site-packages")

# Names of transformers 5 and what they were in transformers 4.
RENAMED = (
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


@dataclasses.dataclass(frozen=True)
class Base:
    """A model to export without adapters.

    Attributes:
        build: Makes the model.
        inputs: Makes the inputs, in the order of the model's parameters, from a batch
            size and a sequence length.
        axes: Names of the dynamic axes, the same for every input.
        outputs: Outputs of the exported model, with the names of their dynamic axes.
        exporter: A name in ``EXPORTERS``.
        wrap: Makes the module to export from the model.
        dtype: Type of the weights.
        tolerance: Largest difference allowed between PyTorch and ONNX Runtime.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Tensors]
    axes: Axes
    outputs: Mapping[str, Axes]
    exporter: str = "dynamo"
    wrap: Callable[[nn.Module], nn.Module] | None = None
    dtype: torch.dtype = torch.float32
    tolerance: float = TOLERANCE


@dataclasses.dataclass(frozen=True)
class CaseFacts:
    """What the file ``case.json`` says about a case, besides what is measured.

    Attributes:
        name: Name of the case and of its folder.
        base: Name of the base.
        library: Training library and its version.
        exercises: What this case has that others have not.
        adapter_name: Name of the adapter in the library.
        reason: Why the adapter must be refused, or nothing if it is supported.
        adapter: Folder of the adapter.
    """

    name: str
    base: str
    library: str
    exercises: str
    adapter_name: str
    reason: str = ""
    adapter: str = "adapter"


def generator(name: str) -> torch.Generator:
    """Return a random generator that depends on ``name`` only."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def name_in_transformers_4(name: str) -> str:
    """Return the name that a parameter had before transformers 5."""
    if name.startswith("vit."):
        for pattern, former in RENAMED:
            name = re.sub(pattern, former, name)
    return name


def randomise(model: nn.Module) -> None:
    """Fill all weights and BatchNorm statistics, so that none is zero or one."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        random = generator(name_in_transformers_4(name))
        leaf = name.rpartition(".")[2]
        if leaf == "running_var" or (leaf == "weight" and tensor.ndim == 1):
            nn.init.uniform_(tensor, 0.5, 1.5, generator=random)
        elif leaf == "running_mean" or isinstance(tensor, nn.Parameter):
            nn.init.normal_(tensor, std=0.2, generator=random)


def train(parameter: torch.Tensor, name: str, std: float) -> None:
    """Give an adapter's parameter a value that a long training could have given it.

    What starts as ones is a scale and stays around one; a magnitude of DoRA stays around
    the norm it starts as; all else becomes normal noise.
    """
    random = generator(name)
    is_scale = bool((parameter == 1).all()) or bool(re.search(r"magnitude|\.m\.weight", name))
    with torch.no_grad():
        if is_scale:
            factors = torch.empty(parameter.shape).uniform_(0.4, 1.8, generator=random)
            parameter.mul_(factors.to(parameter.dtype))
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=random) * std)


def make(base: Base) -> nn.Module:
    """Return the model of a base with its random weights."""
    torch.manual_seed(0)
    model = base.build().eval()
    randomise(model)
    return model.to(base.dtype)


def compute(model: nn.Module, base: Base) -> Arrays:
    """Return what PyTorch computes from the inputs of a base."""
    with torch.no_grad():
        result = model(**base.inputs(3, 5))
    if isinstance(result, torch.Tensor):
        (name,) = base.outputs
        return {name: result.float().numpy()}
    return {name: result[name].float().numpy() for name in base.outputs}


def export_dynamo(model: nn.Module, base: Base, path: Path, *, optimize: bool = True) -> None:
    """Export with ``torch.export``, as one file."""
    axes = {axis: torch.export.Dim(name) for axis, name in base.axes.items()}
    inputs = base.inputs(2, 6)
    torch.onnx.export(
        model,
        kwargs=inputs,
        f=path,
        dynamo=True,
        external_data=False,
        dynamic_shapes=dict.fromkeys(inputs, axes),
        output_names=list(base.outputs),
        optimize=optimize,
        verbose=False,
    )


def export_unoptimized(model: nn.Module, base: Base, path: Path) -> None:
    """Export with ``torch.export`` and keep the graph as it was captured."""
    export_dynamo(model, base, path, optimize=False)


def export_torchscript(
    model: nn.Module, base: Base, path: Path, opset: int | None = None
) -> None:
    """Export with the tracer of TorchScript, at its own opset if none is given."""
    inputs = base.inputs(2, 6)
    torch.onnx.export(
        model,
        tuple(inputs.values()),
        path,
        dynamo=False,
        opset_version=opset,
        input_names=list(inputs),
        output_names=list(base.outputs),
        dynamic_axes=dict.fromkeys(inputs, base.axes) | dict(base.outputs),
    )


def export_opset_14(model: nn.Module, base: Base, path: Path) -> None:
    """Export with TorchScript at an opset that has no LayerNormalization."""
    export_torchscript(model, base, path, 14)


def export_optimum(model: nn.Module, base: Base, path: Path) -> None:
    """Export a language model or classifier with optimum-onnx."""
    from optimum.exporters.onnx import onnx_export_from_model

    tokens = base.outputs == TOKEN_LOGITS
    task = "text-generation" if tokens else "text-classification"
    scratch = path.parent / "optimum"
    onnx_export_from_model(
        model, scratch, task=task, do_validation=False, no_dynamic_axes=False
    )
    (scratch / "model.onnx").replace(path)
    shutil.rmtree(scratch)


EXPORTERS = {
    "dynamo": export_dynamo,
    "dynamo-unoptimized": export_unoptimized,
    "torchscript": export_torchscript,
    "torchscript-14": export_opset_14,
    "optimum": export_optimum,
}


def run(path: Path, arrays: Arrays) -> Arrays:
    """Run an ONNX model with those of ``arrays`` that it takes."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {node.name: arrays[node.name] for node in session.get_inputs()}
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def difference(ours: Arrays, theirs: Arrays) -> float:
    """Return the largest difference over the arrays of ``theirs``."""
    return max(
        float(np.abs(ours[name].astype(np.float32) - array).max())
        for name, array in theirs.items()
    )


def strip_metadata(path: Path) -> None:
    """Take the stack traces and the bulk of the metadata out of an exported model.

    Raises:
        RuntimeError: If the file still holds a path of this machine.
    """
    exported = onnx.load(path)
    strip_stack_traces(exported)
    for node in exported.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key not in BULKY]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.save(exported, path)
    if found := MACHINE_PATH.search(path.read_bytes()):
        raise RuntimeError(f"{path} holds {found.group()!r}")


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write facts as JSON."""
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def clean_folder(folder: Path) -> Path:
    """Return ``folder`` as an empty one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write_base(name: str, base: Base, cases: Path) -> None:
    """Export a base and write what PyTorch computes with it."""
    folder = clean_folder(cases / "bases" / name)
    model = make(base)
    exported = base.wrap(model).eval() if base.wrap else model
    path = folder / "base.onnx"
    EXPORTERS[base.exporter](exported, base, path)
    strip_metadata(path)
    inputs = {name: tensor.numpy() for name, tensor in base.inputs(3, 5).items()}
    if base.exporter == "optimum" and base.outputs == TOKEN_LOGITS:
        rows, length = inputs["input_ids"].shape
        inputs["position_ids"] = np.tile(np.arange(length), (rows, 1))
    np.savez_compressed(folder / "inputs.npz", **inputs)
    np.savez_compressed(folder / "base_expected.npz", **compute(model, base))
    facts = {
        "model": type(model).__name__,
        "exporter": base.exporter,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    write_json(folder / "base.json", facts)
    print(f"bases/{name}: off by {check_base(folder, base):.1e}", flush=True)


def check_base(folder: Path, base: Base) -> float:
    """Return how far ONNX Runtime is from PyTorch without an adapter.

    Raises:
        RuntimeError: If that is further than the base tolerates.
    """
    arrays = run(folder / "base.onnx", dict(np.load(folder / "inputs.npz")))
    off = difference(arrays, dict(np.load(folder / "base_expected.npz")))
    if not off <= base.tolerance:
        raise RuntimeError(f"{folder.name} differs from PyTorch by {off:.2g}")
    return off


def write_case(facts: CaseFacts, base: Base, expected: Arrays, cases: Path) -> None:
    """Write ``expected.npz`` and ``case.json`` beside an adapter, and check the case.

    What a prompt makes longer has no effect that could be measured here.

    Raises:
        RuntimeError: If the adapter of a supported case does too little, or anything is
            not a number.
    """
    folder = cases / facts.name
    base_folder = cases / "bases" / facts.base
    unadapted = dict(np.load(base_folder / "base_expected.npz"))
    comparable = all(expected[name].shape == unadapted[name].shape for name in unadapted)
    effect = difference(expected, unadapted) if comparable else None
    if not facts.reason and not (effect and SMALLEST_EFFECT < effect < np.inf):
        raise RuntimeError(f"{facts.name}: the adapter's effect is {effect}")
    np.savez_compressed(folder / "expected.npz", **expected)
    described = json.loads((base_folder / "base.json").read_text(encoding="utf-8"))
    record = {
        "case": facts.name,
        "library": facts.library,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "exporter": described["exporter"],
        "model": described["model"],
        "base": f"bases/{facts.base}",
        "adapter": facts.adapter,
        "adapter_name": facts.adapter_name,
        "exercises": facts.exercises,
        "supported": not facts.reason,
        "reason": facts.reason or None,
        "tolerance": base.tolerance,
        "base_onnx_vs_torch": check_base(base_folder, base),
        "adapter_effect": effect,
    }
    write_json(
        folder / "case.json",
        {key: value for key, value in record.items() if value is not None},
    )
    print(f"{facts.name}: effect {effect}", flush=True)


def arguments(description: str) -> argparse.Namespace:
    """Return the command line of a script that writes cases."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER)
    parser.add_argument("--only", default="", help="part of the names to write")
    parser.add_argument("--keep-bases", action="store_true", help="use the bases there are")
    return parser.parse_args()
