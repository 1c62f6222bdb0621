"""Make tests/qdq: static QDQ models, adapters that leave their ranges, PyTorch's answers.

It needs PyTorch, PEFT, onnx and onnxruntime, which the tests do not. Run it from the root
of the repository, only to add or change a fixture, and commit the result.

For each case there are `base.onnx` (quantised by ONNX Runtime with values of the base),
`adapter/` (a LoRA by PEFT), `bottleneck.npz` (weights for slots after `first` and `second`,
`down` and `up` as matrices) and `truth.npz` (inputs, and the answers of PyTorch in float32
without an adapter, with the LoRA and with the bottlenecks).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from peft import LoraConfig, get_peft_model
from torch import nn

HOME = Path("tests/qdq")
CASES = {
    "dense_uint8": ("dense", QuantType.QUInt8, False),
    "dense_int8": ("dense", QuantType.QInt8, True),
    "dense_uint16": ("dense", QuantType.QUInt16, False),
    "conv_uint8": ("conv", QuantType.QUInt8, True),
    "conv_int8": ("conv", QuantType.QInt8, False),
}
"""Kind of model, type of its activations, whether weights have a scale for each channel."""


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Linear(8, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        return self.head(hidden + torch.tanh(self.second(hidden)))


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(hidden.mean((2, 3)))


class Calibration(CalibrationDataReader):
    def __init__(self, inputs: list[np.ndarray]) -> None:
        self._rest = iter([{"x": item} for item in inputs])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._rest, None)


def inputs_of(kind: str, count: int) -> torch.Tensor:
    return torch.randn(count, 8) if kind == "dense" else torch.randn(count, 3, 6, 6)


def lora(model: nn.Module, folder: Path) -> nn.Module:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["first", "second"])
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.4 if weight.ndim == 2 else 0.1)
        elif "lora_A" in name:
            nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return adapted.eval()


def bottlenecks(model: nn.Module) -> dict[str, np.ndarray]:
    """Hook `y + up(relu(down(y)))` behind both layers; gives the weights."""
    weights = {}
    for name in ("first", "second"):
        layer = getattr(model, name)
        width = layer.bias.numel()
        strength = 0.8 if isinstance(layer, nn.Linear) else 3.0
        down, up = torch.randn(width, 3) * 0.5, torch.randn(3, width) * strength
        weights |= {f"{name}.down": down.numpy(), f"{name}.up": up.numpy()}

        def adapt(_, __, y, down=down, up=up):
            last = y.movedim(1, -1)
            return y + (torch.relu(last @ down) @ up).movedim(-1, 1)

        layer.register_forward_hook(adapt)
    return weights


def make(name: str, kind: str, activations: QuantType, per_channel: bool) -> None:
    torch.manual_seed(7)
    build = Dense if kind == "dense" else Convolved
    model = build().eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    calibration = [inputs_of(kind, 8).numpy() for _ in range(16)]
    x = inputs_of(kind, 32)
    folder = HOME / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        plain = str(Path(scratch) / "plain.onnx")
        axes = {"x": {0: "batch"}, "y": {0: "batch"}}
        torch.onnx.export(
            model,
            (x,),
            plain,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes=axes,
            opset_version=21,
            dynamo=False,
        )
        quantize_static(
            plain,
            folder / "base.onnx",
            Calibration(calibration),
            quant_format=QuantFormat.QDQ,
            activation_type=activations,
            weight_type=QuantType.QInt8,
            per_channel=per_channel,
        )
    base = onnx.load(folder / "base.onnx")
    onnx.save(base, folder / "base.onnx")
    with torch.no_grad():
        truth = {"x": x.numpy(), "base": model(x).numpy()}
        truth["lora"] = lora(model, folder / "adapter")(x).numpy()
        fresh = build().eval()
        fresh.load_state_dict(state)
        np.savez(folder / "bottleneck.npz", **bottlenecks(fresh))
        truth["bottleneck"] = fresh(x).numpy()
    np.savez(folder / "truth.npz", **truth)


if __name__ == "__main__":
    for case, settings in CASES.items():
        make(case, *settings)
