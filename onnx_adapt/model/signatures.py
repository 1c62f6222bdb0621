"""Files that are taken for a model or an adapter and are something else, known by content."""

from __future__ import annotations

import re
from dataclasses import dataclass

from onnx_adapt.formats import EXPORT, FORMATS

HEAD = 4096
"""Bytes of a file by which it is known."""


@dataclass(frozen=True, slots=True)
class Signature:
    """One kind of file.

    Attributes:
        what: What such a file is.
        pattern: What its first bytes match.
        as_model: What to do where a model is wanted.
        as_adapter: What to do where an adapter file is wanted; as for a model if ''.
    """

    what: str
    pattern: re.Pattern[bytes]
    as_model: str
    as_adapter: str = ""


_CONVERT = (
    "give the folder that the training library saved, with its adapter_config.json: "
    "`onnx-adapt convert FOLDER --for MODEL.onnx -o NAME.safetensors`"
)
_TRAINED = (
    "give it with its model: `onnx-adapt insert MODEL.onnx --adapter FOLDER`, where FOLDER "
    "holds it beside its adapter_config.json"
)
_CONVERT_FILE = (
    "make an adapter file of it: `onnx-adapt convert {name} --for MODEL.onnx -o "
    "OUT.safetensors`"
)
_TRAINED_FILE = "give it with its model: `onnx-adapt insert MODEL.onnx --adapter {name}`"
_TF = "make an ONNX model of it with tf2onnx: `python -m tf2onnx.convert"
_AGAIN = "download the file itself again"


def _signatures(
    *rows: tuple[str, bytes, str] | tuple[str, bytes, str, str],
) -> list[Signature]:
    return [
        Signature(what, re.compile(pattern, re.DOTALL), *hints)
        for what, pattern, *hints in rows
    ]


_WEIGHTS_OF_TRAINING = _signatures(
    (
        "a PyTorch file",
        rb"PK\x03\x04.{0,200}?(/data\.pkl|/byteorder|/\.format_version|/version)"
        rb"|\x80[\x02-\x05]\x8a\x0al\xfc\x9cF\xf9 j",
        EXPORT,
        _CONVERT,
    ),
    (
        "an adapter for image generation",
        rb'.{7}\x00\{(?!"__metadata__":\{"onnx_adapt")'
        rb'.*?"(ss_network_module|ss_base_model_version|lora_adapter_metadata'
        rb'|(lora_(unet|te\d?)_|lycoris_)[^"]*'
        rb'|(unet|text_encoder|transformer)\.[^"]*lora[_.][^"]*'
        rb'|(?!base_model)[^"]*(\.lora_down|_lora\.down|\.hada_w1_a|\.lokr_w[12])[^"]*)"\s*:',
        _TRAINED_FILE,
        _CONVERT_FILE,
    ),
    (
        "the weights of a PEFT or AdapterHub adapter",
        rb'.{7}\x00\{(?!"__metadata__":\{"onnx_adapt")'
        rb'.*?"[^"]*\.(lora_[ABE]|ia3_l|adapters)(\.[^"]*)?(?<!\.down|..\.up)"\s*:',
        _TRAINED,
        _CONVERT,
    ),
)
"""Files of training libraries: some of them look like adapter files as well."""

_OTHERS = _signatures(
    (
        "an .ort file, ONNX Runtime's own format",
        rb".{2}\x00\x00ORTM",
        "give the .onnx file that it was made from; the adapted one becomes .ort with "
        "`python -m onnxruntime.tools.convert_onnx_models_to_ort`",
        _CONVERT,
    ),
    (
        "a TensorFlow Lite model",
        rb".{2}\x00\x00TFL3",
        f"{_TF} --tflite {{name}} --output model.onnx`",
    ),
    ("packed with gzip", rb"\x1f\x8b", "unpack it: `gunzip < {name} > unpacked`"),
    ("packed with xz", rb"\xfd7zXZ\x00", "unpack it: `xz -d < {name} > unpacked`"),
    ("packed with bzip2", rb"BZh[1-9]1AY", "unpack it: `bunzip2 < {name} > unpacked`"),
    ("packed with zstd", rb"\x28\xb5\x2f\xfd", "unpack it: `zstd -d < {name} > unpacked`"),
    ("a 7z archive", rb"7z\xbc\xaf\x27\x1c", "unpack it: `7z x {name}`"),
    ("a tar archive", rb".{257}ustar", "unpack it: `tar -xf {name}`"),
    ("a zip archive", rb"PK\x03\x04", "unpack it: `unzip {name}`"),
    ("a pickle of Python", rb"\x80[\x02-\x05][\x95c}}\]\(q]", EXPORT, _CONVERT),
    (
        "a GGUF file of llama.cpp",
        rb"GGUF",
        "it has weights and no graph: export the original model to ONNX, for example "
        "with `optimum-cli export onnx`",
        _CONVERT,
    ),
    (
        "an HDF5 file of Keras",
        rb"\x89HDF\r\n\x1a\n",
        f"{_TF} --keras {{name}} --output model.onnx`",
        _CONVERT,
    ),
    (
        "an array of numpy",
        rb"\x93NUMPY",
        "an array has no graph; MODEL is an .onnx file",
        "numpy.savez writes several arrays by name, which an adapter needs",
    ),
    (
        "a Git LFS pointer, not the file itself",
        rb"version https://git-lfs",
        "run `git lfs pull`",
    ),
    (
        "a web page",
        rb"\s*(<!--.*?-->\s*)?<(!doctype html|!DOCTYPE html|!DOCTYPE HTML|html|HTML)",
        f"{_AGAIN}: on Hugging Face with /resolve/ in its address, not /blob/",
    ),
    (
        "an OpenVINO model",
        rb"\s*<\?xml[^>]*\?>\s*<net ",
        "give the .onnx file that it was made from; OpenVINO reads the adapted one",
    ),
    (
        "ONNX text",
        rb"\s*(//[^\n]*\n\s*)*<\s*ir_version",
        "make a model of it: onnx.save(onnx.parser.parse_model(text), 'model.onnx')",
    ),
    (
        "a JSON file",
        rb"\s*[{\[]\s*[\"{\[\]}]",
        "MODEL is an .onnx file, and a trained adapter is given as its folder",
        _CONVERT,
    ),
    (
        "an ONNX model",
        rb"\x08[\x01-\x20][\x12:]",
        "",
        "adapters are files of weights: give the model first, its adapter after it",
    ),
)
"""All other kinds, the more special of two first."""


def signatures() -> list[Signature]:
    """Every kind of file, the more special of two first: what it is, and what to do with it.

    `{name}` in a hint is the file's name.
    """
    adapters = _signatures(
        *(
            (row.what, row.head, row.as_model, f"let its name end in {row.suffix}")
            for row in FORMATS.values()
        )
    )
    return [*_WEIGHTS_OF_TRAINING, *adapters, *_OTHERS]


def recognised(head: bytes, name: str, *, adapter: bool = False) -> tuple[str, str] | None:
    """What a file is that is not what it should be, and what to do about it.

    Args:
        head: Its first bytes, `HEAD` of them if it has as many.
        name: What it is called.
        adapter: Whether an adapter is wanted, and not a model.

    Example:
        >>> recognised(b"GGUF" + bytes(60), "llama.gguf")[0]
        'a GGUF file of llama.cpp'
    """
    for item in signatures():
        if item.pattern.match(head):
            hint = (item.as_adapter if adapter else "") or item.as_model
            return (item.what, hint.replace("{name}", name)) if hint else None
    return None


def is_text(head: bytes) -> bool:
    """Whether these bytes are text."""
    return all(byte in b"\t\n\r" or byte >= 32 for byte in head)
