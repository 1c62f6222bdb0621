"""Write what PEFT makes of small weights to ``tests/cases/peft_deltas.npz``.

For each variant of a method: the weight and bias of one layer, the adapter's tensors in PEFT's
own names, its configuration, and the weight and bias that PEFT computes with. These are read
off the adapter's forward pass, at the rows of the identity; of convolutions they are what PEFT
merges. From the root of the repository, in the environment of ``make_peft_cases.py``::

    /tmp/peft/bin/python tools/make_peft_deltas.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from case_making import train
from peft.tuners.boft import layer as boft
from torch import nn
from transformers.pytorch_utils import Conv1D

FILE = Path(__file__).resolve().parent.parent / "tests" / "cases" / "peft_deltas.npz"

TALL, WIDE, SQUARE = (nn.Linear, 8, 12), (nn.Linear, 12, 8), (nn.Linear, 16, 16)
ODD, BARE = (nn.Linear, 9, 7), (nn.Linear, 8, 12, False)
TABLE, TURNED = (nn.Embedding, 10, 8), (Conv1D, 12, 8)
CONV, CONV_1X1, CONV_1D = (nn.Conv2d, 4, 6, 2), (nn.Conv2d, 8, 6, 1), (nn.Conv1d, 4, 6, 3)

VARIANTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "oft": (TALL, peft.OFTConfig, {"r": 0, "oft_block_size": 4}),
    **{
        f"oft_{n}_terms": (
            WIDE,
            peft.OFTConfig,
            {"r": 4, "oft_block_size": 0, "num_cayley_neumann_terms": n},
        )
        for n in (1, 2, 3, 4, 7)
    },
    "oft_cayley": (
        TALL,
        peft.OFTConfig,
        {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False},
    ),
    "oft_shared": (TALL, peft.OFTConfig, {"r": 0, "oft_block_size": 2, "block_share": True}),
    "oft_coft": (
        TALL,
        peft.OFTConfig,
        {"r": 0, "oft_block_size": 4, "coft": True, "eps": 0.3},
    ),
    "oft_table": (TABLE, peft.OFTConfig, {"r": 0, "oft_block_size": 4}),
    "oft_conv": (CONV_1X1, peft.OFTConfig, {"r": 0, "oft_block_size": 4}),
    "boft": (TALL, peft.BOFTConfig, {"boft_block_size": 4}),
    "boft_2": (SQUARE, peft.BOFTConfig, {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    "boft_3": (SQUARE, peft.BOFTConfig, {"boft_block_size": 2, "boft_n_butterfly_factor": 3}),
    "boft_blocks": (SQUARE, peft.BOFTConfig, {"boft_block_size": 0, "boft_block_num": 4}),
    "boft_conv": (CONV, peft.BOFTConfig, {"boft_block_size": 4}),
    "hra": (TALL, peft.HRAConfig, {"r": 4}),
    "hra_orthogonal": (WIDE, peft.HRAConfig, {"r": 4, "apply_GS": True}),
    "hra_conv": (CONV, peft.HRAConfig, {"r": 2}),
    **{
        f"road_{n}": (TALL, peft.RoadConfig, {"variant": f"road_{n}", "group_size": 4})
        for n in (1, 2, 4)
    },
    "road_bare": (BARE, peft.RoadConfig, {"group_size": 6}),
    "lokr": (TALL, peft.LoKrConfig, {"r": 8, "alpha": 3}),
    "lokr_low": (
        SQUARE,
        peft.LoKrConfig,
        {"r": 1, "decompose_factor": 4, "decompose_both": True},
    ),
    "lokr_half": (WIDE, peft.LoKrConfig, {"r": 1, "rank_pattern": {"lay.*": 2}}),
    "lokr_conv": (CONV, peft.LoKrConfig, {"r": 1, "alpha_pattern": {"layer": 5}}),
    "lokr_core": (CONV, peft.LoKrConfig, {"r": 1, "use_effective_conv2d": True}),
    "lokr_conv_1x1": (CONV_1X1, peft.LoKrConfig, {"r": 1, "use_effective_conv2d": True}),
    "lokr_conv_1d": (CONV_1D, peft.LoKrConfig, {"r": 1}),
    "lokr_full_1d": (CONV_1D, peft.LoKrConfig, {"r": 8}),
    "hira": (TALL, peft.HiraConfig, {"r": 2}),
    "hira_table": (TABLE, peft.HiraConfig, {"r": 2}),
    "hira_conv": (CONV, peft.HiraConfig, {"r": 2}),
    "hira_conv_1d": (CONV_1D, peft.HiraConfig, {"r": 2}),
    "hira_conv1d": (TURNED, peft.HiraConfig, {"r": 2, "fan_in_fan_out": True}),
    "randlora_tall": (TALL, peft.RandLoraConfig, {"r": 3, "randlora_alpha": 6}),
    "randlora_wide": (
        WIDE,
        peft.RandLoraConfig,
        {"r": 4, "randlora_alpha": 6, "sparse": True},
    ),
    "randlora_conv1d": (TURNED, peft.RandLoraConfig, {"r": 4, "fan_in_fan_out": True}),
    "shira": (TALL, peft.ShiraConfig, {"r": 2}),
    "c3a_tall": (TALL, peft.C3AConfig, {"block_size": 4}),
    "c3a_wide": (WIDE, peft.C3AConfig, {"block_size": 2}),
    "miss_bat": (TALL, peft.MissConfig, {"r": 4, "init_weights": "bat"}),
    **{
        f"glora_{a}": (
            TALL,
            peft.GloraConfig,
            {"r": 2, "config_A_B": a, "config_C": c, "config_D_E": d},
        )
        for a, c, d in (
            ("lora", "lora", "constant"),
            ("vector", "vector", "vector"),
            ("constant", "none", "none"),
            ("none", "lora", "vector"),
        )
    },
    "glora_bare": (BARE, peft.GloraConfig, {"r": 2}),
    **{
        f"peanut_{n}": (
            TALL,
            peft.PeanutConfig,
            {"r": 2, "depth": n, "act_fn": act, "scaling": 3},
        )
        for n, act in enumerate(("relu", "gelu", "tanh"))
    },
    "osf_tall": (TALL, peft.OSFConfig, {"effective_rank": 3}),
    "osf_wide": (WIDE, peft.OSFConfig, {"effective_rank": 5}),
    "fourierft": (ODD, peft.FourierFTConfig, {"n_frequency": 9, "random_loc_seed": 4}),
    "fourierft_conv1d": (
        TURNED,
        peft.FourierFTConfig,
        {"n_frequency": 5, "fan_in_fan_out": True},
    ),
    "waveft": (ODD, peft.WaveFTConfig, {"n_frequency": 12}),
    "waveft_even": (TALL, peft.WaveFTConfig, {"n_frequency": 90, "random_loc_seed": 3}),
    "waveft_plain": (ODD, peft.WaveFTConfig, {"n_frequency": 12, "use_idwt": False}),
    **{
        f"{start}_{name}": (
            shape,
            peft.LoraConfig,
            {"r": 2, "lora_alpha": 6, "init_lora_weights": start, **more},
        )
        for start in ("pissa", "olora")
        for name, shape, more in (
            ("tall", TALL, {}),
            ("wide", WIDE, {"use_rslora": True}),
        )
    },
    "pissa_conv1d": (
        TURNED,
        peft.LoraConfig,
        {"r": 2, "init_lora_weights": "pissa", "fan_in_fan_out": True},
    ),
}


class Model(nn.Module):
    """One layer under the name ``layer``.

    Attributes:
        layer: The layer.
    """

    def __init__(self, kind: Any, *sizes: Any) -> None:
        """Make the layer."""
        super().__init__()
        self.layer = kind(*sizes)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Return what the layer returns."""
        return self.layer(given)


class BlockDiagonal:
    """What PEFT's CUDA kernel for BOFT computes; it is compiled on machines with a GPU."""

    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        """Return the block-diagonal matrices of ``(n, blocks, size, size)``."""
        return torch.stack([torch.block_diag(*each) for each in blocks])


def effective(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight and bias that a model with an adapter computes with.

    The bias is empty if there is none.
    """
    base = model.base_model.model.layer.get_base_layer()
    if isinstance(base, nn.Conv1d | nn.Conv2d):
        merged = model.merge_and_unload().layer
        bias = merged.bias.detach().numpy()
        return merged.weight.detach().numpy(), bias
    with torch.no_grad():
        if isinstance(base, nn.Embedding):
            return model(torch.arange(base.num_embeddings)).numpy(), np.empty(0)
        reads = base.weight.shape[0] if isinstance(base, Conv1D) else base.in_features
        bias = model(torch.zeros(1, reads, dtype=torch.float64))
        weight = model(torch.eye(reads, dtype=torch.float64)) - bias
    return weight.numpy().T, bias.numpy()[0] if base.bias is not None else np.empty(0)


def plain(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight of a model as ``(out, in)``, and its bias or nothing."""
    weight = model.layer.weight.detach().numpy().copy()
    bias = getattr(model.layer, "bias", None)
    turned = weight.T if isinstance(model.layer, Conv1D) else weight
    return turned, np.empty(0) if bias is None else bias.detach().numpy().copy()


def main() -> None:
    """Write the file."""
    boft.get_fbd_cuda = lambda: True
    boft.FastBlockDiag = BlockDiagonal
    arrays: dict[str, np.ndarray] = {}
    for name, (shape, config, settings) in VARIANTS.items():
        torch.manual_seed(len(name))
        model = Model(*shape)
        if isinstance(model.layer, Conv1D):
            nn.init.normal_(model.layer.weight, std=0.5)
            nn.init.normal_(model.layer.bias)
        weight, bias = plain(model)
        adapted = peft.get_peft_model(model, config(target_modules=["layer"], **settings))
        for path, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                train(parameter, f"{name}:{path}", 0.4)
        saved = peft.get_peft_model_state_dict(adapted)
        arrays |= {f"{name}/tensors/{key}": value.numpy() for key, value in saved.items()}
        facts = adapted.peft_config["default"].to_dict()
        known = {key: value for key, value in facts.items() if _is_plain(value)}
        arrays[f"{name}/config"] = np.array(json.dumps(known))
        trained, trained_bias = effective(adapted.double())
        arrays |= {f"{name}/weight": weight, f"{name}/bias": bias}
        arrays |= {
            f"{name}/trained": trained.astype("f4"),
            f"{name}/trained_bias": trained_bias,
        }
        print(name, float(np.abs(trained - weight).max()))
    np.savez_compressed(FILE, **arrays)


def _is_plain(value: Any) -> bool:
    return value is not None and isinstance(value, str | int | float | bool | dict)


if __name__ == "__main__":
    main()
