"""The table of checkpoint writers: what each library loads, and how it is written.

Like the table of file formats it imports none of the modules that write; a row names its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Writer:
    """How an adapter is written for one library.

    Attributes:
        label: What the library is called in messages.
        module: The module with `write(wanted) -> files`.
        one_file: Whether it loads one file; else it loads a folder.
        loads: How the library loads it, with `{path}` for the folder or file.
        activates: Whether it has adapters that are on from invocation tokens on.
    """

    label: str
    module: str
    one_file: bool
    loads: str
    activates: bool


_ROOM = "onnx_adapt.checkpoints.writers"

WRITERS: dict[str, Writer] = {
    "peft": Writer(
        label="PEFT",
        module=f"{_ROOM}.peft",
        one_file=False,
        loads="PeftModel.from_pretrained(model, {path!r})",
        activates=True,
    ),
    "adapterhub": Writer(
        label="AdapterHub",
        module=f"{_ROOM}.adapterhub",
        one_file=False,
        loads="model.load_adapter({path!r}, use_safetensors=True)",
        activates=False,
    ),
    "mlx": Writer(
        label="MLX-LM",
        module=f"{_ROOM}.mlx",
        one_file=False,
        loads="mlx_lm.load(model, adapter_path={path!r})",
        activates=False,
    ),
    "kohya": Writer(
        label="kohya",
        module=f"{_ROOM}.kohya",
        one_file=True,
        loads="pipeline.load_lora_weights({path!r})",
        activates=False,
    ),
}
"""Every library that adapters can be written for."""
