"""Export tiny PyTorch models to ONNX, with what PyTorch computes inside them.

The files in ``tests/exports/`` are made by this script and committed, so that the
tests need neither torch nor transformers. For every architecture and exporter it
writes two files:

``<architecture>_<exporter>.onnx``
    The model, with random weights, as ``torch.onnx.export`` writes it. The only change
    is that stack traces, which hold paths of this machine, are taken out.
``<architecture>_<exporter>.npz``
    ``input.<name>`` and ``output.<name>`` for the inputs and outputs of the graph, and
    ``module.<path>`` for the output of PyTorch modules (its first tensor, if there are
    several). A module called more than once has ``module.<path>#0``, ``#1``, and so on.

A path is relative to the exported module. GPT-2 and Llama need a wrapper for the
TorchScript exporter, so their paths begin with ``inner.`` there. The arrays have other
batch and sequence sizes than the inputs the exporters saw.

To make the environment and run the script, from the root of the repository::

    python -m venv /tmp/export
    /tmp/export/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/export/bin/pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
    /tmp/export/bin/python tools/export_fixtures.py
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from google.protobuf.message import Message
from torch import nn
from transformers.pytorch_utils import Conv1D

Tensors = dict[str, torch.Tensor]
Axes = dict[int, str]

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "tests" / "exports"
EXPORTERS = ("dynamo", "torchscript")
OUTPUT = "logits"
STACK_TRACE = "pkg.torch.onnx.stack_trace"
TOLERANCE = 1e-4
VOCABULARY = 60
LEAVES = (nn.Linear, Conv1D, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.Embedding, nn.LSTM)
TEXT_AXES = {0: "batch", 1: "sequence"}
BATCH_AXES = {0: "batch"}


class Positional(nn.Module):
    """A language model that takes exactly two positional inputs and returns a tensor.

    Attributes:
        inner: The model of transformers.
    """

    def __init__(self, inner: nn.Module) -> None:
        """Wrap ``inner``."""
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[batch, sequence, vocabulary]``."""
        outputs = self.inner(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=False
        )
        return outputs[0]


class Repeated(nn.Module):
    """Modules that transformers do not have, and one Linear that is called twice.

    Attributes:
        features: Two convolutions, each followed by a BatchNorm.
        recurrent: An LSTM over the pixels.
        project: A Linear without bias on a 3-D tensor.
        shared: A Linear that is called twice.
        blocks: A ModuleList of Sequentials, each with a residual connection around it.
        pooled: A Linear without bias on a 2-D tensor.
        head: A Linear on a 2-D tensor.
    """

    def __init__(self) -> None:
        """Make the modules."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.recurrent = nn.LSTM(8, 16, batch_first=True)
        self.project = nn.Linear(16, 32, bias=False)
        self.shared = nn.Linear(32, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU()) for _ in range(2)
        )
        self.pooled = nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[batch, 3]`` of an image ``[batch, 3, height, width]``."""
        pixels = self.features(image).flatten(2).transpose(1, 2)
        states, _ = self.recurrent(pixels)
        states = self.shared(torch.relu(self.shared(self.project(states))))
        for block in self.blocks:
            states = states + block(states)
        return self.head(torch.tanh(self.pooled(states.mean(dim=1))))


@dataclasses.dataclass(frozen=True)
class Fixture:
    """One architecture to export.

    Attributes:
        build: Makes the model.
        inputs: Makes the inputs, in the order of the model's parameters, from a batch
            size and a sequence length.
        axes: Names of the dynamic axes, the same for every input.
        output_axes: Names of the dynamic axes of the output.
        wrapped: Whether the TorchScript exporter needs ``Positional``.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Tensors]
    axes: Axes
    output_axes: Axes
    wrapped: bool = False


def build_bert() -> nn.Module:
    """Return a BERT classifier."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def build_gpt2() -> nn.Module:
    """Return a GPT-2 language model, whose head is tied to the embedding."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=64,
        n_positions=16,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config)


def build_llama() -> nn.Module:
    """Return a Llama language model with grouped key and value heads."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def build_vit() -> nn.Module:
    """Return a ViT classifier of images of four patches."""
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def text_inputs(batch: int, length: int) -> Tensors:
    """Return token ids and a mask whose last row ends with one padded position."""
    generator = torch.Generator().manual_seed(batch * length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -1] = 0
    ids = torch.randint(VOCABULARY, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


def bert_inputs(batch: int, length: int) -> Tensors:
    """Return text inputs whose second half is of the second token type."""
    types = (torch.arange(length) >= length // 2).long().expand(batch, length).contiguous()
    return text_inputs(batch, length) | {"token_type_ids": types}


def image_inputs(name: str, size: int) -> Callable[[int, int], Tensors]:
    """Return a maker of square images of three channels for the input ``name``."""

    def make(batch: int, _length: int) -> Tensors:
        generator = torch.Generator().manual_seed(batch)
        return {name: torch.randn(batch, 3, size, size, generator=generator)}

    return make


FIXTURES = {
    "bert": Fixture(build_bert, bert_inputs, TEXT_AXES, BATCH_AXES),
    "gpt2": Fixture(build_gpt2, text_inputs, TEXT_AXES, TEXT_AXES, wrapped=True),
    "llama": Fixture(build_llama, text_inputs, TEXT_AXES, TEXT_AXES, wrapped=True),
    "vit": Fixture(build_vit, image_inputs("pixel_values", 16), BATCH_AXES, BATCH_AXES),
    "repeated": Fixture(Repeated, image_inputs("image", 4), BATCH_AXES, BATCH_AXES),
}


def randomise(model: nn.Module) -> None:
    """Fill all weights and BatchNorm statistics, so that none is zero or one.

    Scales (1-D weights and variances) are drawn around one, so that the signal lives.
    """
    torch.manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        leaf = name.rpartition(".")[2]
        if leaf == "running_var" or (leaf == "weight" and tensor.ndim == 1):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif leaf == "running_mean" or isinstance(tensor, nn.Parameter):
            nn.init.normal_(tensor, std=0.2)


def observed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules to record, with their paths.

    These are the leaves with weights and, as composites, the items of a ModuleList,
    their direct children and every Sequential.
    """
    modules = dict(model.named_modules())
    for path, module in modules.items():
        parent = path.rpartition(".")[0]
        above = (parent, parent.rpartition(".")[0])
        in_block = any(isinstance(modules[outer], nn.ModuleList) for outer in above)
        is_leaf = isinstance(module, LEAVES) or type(module).__name__.endswith("RMSNorm")
        is_composite = in_block and next(module.children(), None) is not None
        if is_leaf or is_composite or isinstance(module, nn.Sequential):
            yield path, module


def record(model: nn.Module, inputs: Tensors) -> dict[str, np.ndarray]:
    """Run the model and return the arrays of the ``.npz`` file."""
    calls: dict[str, list[np.ndarray]] = collections.defaultdict(list)

    def observe(path: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            calls[path].append(first.numpy().copy())

        return module.register_forward_hook(hook)

    handles = [observe(path, module) for path, module in observed_modules(model)]
    with torch.no_grad():
        result = model(**inputs)
    for handle in handles:
        handle.remove()
    logits = result if isinstance(result, torch.Tensor) else result.logits
    arrays = {f"input.{name}": tensor.numpy() for name, tensor in inputs.items()}
    arrays[f"output.{OUTPUT}"] = logits.numpy()
    for path, outputs in calls.items():
        for index, output in enumerate(outputs):
            suffix = f"#{index}" if len(outputs) > 1 else ""
            arrays[f"module.{path}{suffix}"] = output
    return arrays


def export_dynamo(model: nn.Module, inputs: Tensors, fixture: Fixture, path: Path) -> None:
    """Export with ``torch.export``, as one file."""
    axes = {axis: torch.export.Dim(name) for axis, name in fixture.axes.items()}
    torch.onnx.export(
        model,
        kwargs=inputs,
        f=path,
        dynamo=True,
        external_data=False,
        dynamic_shapes=dict.fromkeys(inputs, axes),
        output_names=[OUTPUT],
        verbose=False,
    )


def export_torchscript(
    model: nn.Module, inputs: Tensors, fixture: Fixture, path: Path
) -> None:
    """Export with the tracer of TorchScript."""
    torch.onnx.export(
        model,
        tuple(inputs.values()),
        path,
        dynamo=False,
        input_names=list(inputs),
        output_names=[OUTPUT],
        dynamic_axes=dict.fromkeys(inputs, fixture.axes) | {OUTPUT: fixture.output_axes},
    )


def strip_stack_traces(message: Message) -> None:
    """Remove the stack traces from all metadata of an ONNX message, at any depth."""
    for field, value in message.ListFields():
        if field.name == "metadata_props":
            kept = [entry for entry in value if entry.key != STACK_TRACE]
            del value[:]
            value.extend(kept)
        elif field.message_type is not None:
            for child in value if field.is_repeated else [value]:
                strip_stack_traces(child)


def check(path: Path, arrays: dict[str, np.ndarray]) -> float:
    """Run the exported model and return its largest difference from PyTorch.

    Raises:
        RuntimeError: If the difference is above ``TOLERANCE``.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {node.name: arrays[f"input.{node.name}"] for node in session.get_inputs()}
    (logits,) = session.run([OUTPUT], feeds)
    difference = float(np.abs(logits - arrays[f"output.{OUTPUT}"]).max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{path.name} differs from PyTorch by {difference:.2g}")
    return difference


def write_fixture(name: str, exporter: str, folder: Path) -> None:
    """Export one architecture with one exporter and write both files."""
    fixture = FIXTURES[name]
    model = fixture.build().eval()
    randomise(model)
    seen = fixture.inputs(2, 6)
    path = folder / f"{name}_{exporter}.onnx"
    if exporter == "dynamo":
        export_dynamo(model, seen, fixture, path)
    else:
        model = Positional(model).eval() if fixture.wrapped else model
        export_torchscript(model, seen, fixture, path)
    exported = onnx.load(path)
    strip_stack_traces(exported)
    onnx.save(exported, path)
    arrays = record(model, fixture.inputs(3, 5))
    np.savez_compressed(path.with_suffix(".npz"), **arrays)
    print(f"{path.name}: {len(arrays)} arrays, off by {check(path, arrays):.1e}")


def main() -> None:
    """Write all fixtures."""
    parser = argparse.ArgumentParser(description="Export tiny PyTorch models to ONNX.")
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in FIXTURES:
        for exporter in EXPORTERS:
            write_fixture(name, exporter, folder)


if __name__ == "__main__":
    main()
