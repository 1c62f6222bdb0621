"""Write what PEFT's ``add_weighted_adapter`` gives to ``tests/adapter/peft_merges.npz``.

The environment is that of ``make_peft_cases.py``; from the root of the repository::

    /tmp/peft/bin/python tools/make_merges.py

For each module ``M`` and adapter ``N`` the file has ``N/M/A``, ``N/M/B`` as PEFT saves them
and ``N/M/scale``. For each method it has ``METHOD/M``, the update that PEFT's merged adapter
adds to the weight. DARE's random numbers are numpy's, drawn as ``onnx_adapt`` draws them; what
is done with them is PEFT's code. IA3's vectors are ``ia3/N/M`` and ``ia3/linear/M``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import torch
from torch import nn

FILE = Path(__file__).resolve().parent.parent / "tests" / "adapter" / "peft_merges.npz"
MODULES = ("conv", "embed", "linear")
WEIGHTS = [0.7, -0.4]
DENSITY, SEED, RANK = 0.5, 3, 2
EMBEDDED = (9, 5)
METHODS = {
    "cat": {},
    "linear": {},
    "svd": {},
    "ties": {"density": DENSITY},
    "ties_frequency": {"density": DENSITY, "majority_sign_method": "frequency"},
    "ties_svd": {"density": DENSITY},
    "dare_linear": {"density": DENSITY},
    "dare_ties": {"density": DENSITY},
    "dare_linear_svd": {"density": DENSITY},
    "dare_ties_svd": {"density": DENSITY},
    "magnitude_prune": {"density": DENSITY},
    "magnitude_prune_svd": {"density": DENSITY},
}


class Small(nn.Module):
    """One module of each kind that LoRA takes."""

    def __init__(self) -> None:
        """Make the modules, in the order in which they are merged."""
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (2, 3))
        self.embed = nn.Embedding(*EMBEDDED)
        self.linear = nn.Linear(6, 5)


def build(**fields: float) -> peft.PeftModel:
    """Return a model with the adapters ``fr`` and ``de``, with random weights."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(MODULES), **fields)
    model = peft.get_peft_model(Small(), config, adapter_name="fr")
    model.add_adapter("de", config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_()
    return model


def factors(layer: nn.Module, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of an adapter in a layer."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    return layer.lora_embedding_A[adapter].detach(), layer.lora_embedding_B[adapter].detach()


def draw_from_numpy() -> None:
    """Let ``torch.bernoulli`` draw as onnx_adapt does: in the layout of a slot's weights.

    A slot has the transpose of A and B, and of an update but that of an embedding.
    """
    random = np.random.default_rng(SEED)

    def bernoulli(density: torch.Tensor) -> torch.Tensor:
        if density.shape == EMBEDDED:
            return torch.from_numpy(random.random(EMBEDDED) < DENSITY).float()
        flat = density.reshape(density.shape[0], -1)
        drawn = random.random(flat.T.shape) < DENSITY
        return torch.from_numpy(drawn.T.copy()).float().reshape(density.shape)

    torch.bernoulli = bernoulli


def main() -> None:
    """Write the file."""
    numbers: dict[str, np.ndarray] = {}
    model = build()
    layers = {name: getattr(model.base_model.model, name) for name in MODULES}
    for adapter in ("fr", "de"):
        for name, layer in layers.items():
            a, b = factors(layer, adapter)
            numbers[f"{adapter}/{name}/A"], numbers[f"{adapter}/{name}/B"] = a, b
            numbers[f"{adapter}/{name}/scale"] = torch.tensor(layer.scaling[adapter])
    for label, options in METHODS.items():
        draw_from_numpy()
        method = label.removesuffix("_frequency")
        rank = {"svd_rank": RANK} if method.endswith("svd") else {}
        model.base_model.add_weighted_adapter(
            ["fr", "de"], WEIGHTS, label, combination_type=method, **options, **rank
        )
        for name, layer in layers.items():
            update = layer.get_delta_weight(label).detach()
            numbers[f"{label}/{name}"] = update
    numbers |= vectors()
    FILE.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(FILE, **{key: value.numpy() for key, value in numbers.items()})


def vectors() -> dict[str, torch.Tensor]:
    """Return IA3's vectors of two adapters and of their merge."""
    config = peft.IA3Config(target_modules=["linear"], feedforward_modules=[])
    model = peft.get_peft_model(Small(), config, adapter_name="fr")
    model.add_adapter("de", config)
    layer = model.base_model.model.linear
    with torch.no_grad():
        for value in layer.ia3_l.values():
            value.normal_()
    model.base_model.add_weighted_adapter(["fr", "de"], WEIGHTS, "linear")
    return {
        f"ia3/{name}/linear": value.detach().reshape(-1) for name, value in layer.ia3_l.items()
    }


if __name__ == "__main__":
    main()
