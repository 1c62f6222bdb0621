"""Write cases of PEFT's methods that compute a weight from the base's own.

The files are as in ``case_making.py``, the bases and the environment as in
``make_peft_cases.py``. From the root of the repository, in that environment::

    PYTHONHASHSEED=0 /tmp/peft/bin/python tools/make_reweight_cases.py

``--only NAME`` writes the cases with ``NAME`` in their names.
"""

from __future__ import annotations

import peft
from case_making import arguments
from make_peft_cases import Case, lora, make_case, selected

QV = ["query", "value"]
TWO = ["query", "output.dense"]

SUPPORTED = {
    "bert_oft": Case(
        "bert_dynamo",
        peft.OFTConfig(r=0, oft_block_size=4, target_modules=TWO),
        "OFT with the Neumann series, which is the default",
    ),
    "bert_oft_cayley": Case(
        "bert_torchscript",
        peft.OFTConfig(
            r=0,
            oft_block_size=8,
            target_modules=TWO,
            use_cayley_neumann=False,
            block_share=True,
        ),
        "OFT with the Cayley transform, one block for all",
    ),
    "convnet_oft": Case(
        "convnet_dynamo",
        peft.OFTConfig(r=3, oft_block_size=0, target_modules=["6", "head"]),
        "OFT of a convolution of single places",
    ),
    "bert_boft": Case(
        "bert_dynamo",
        peft.BOFTConfig(boft_block_size=4, target_modules=TWO),
        "BOFT with one factor",
    ),
    "bert_lokr": Case(
        "bert_dynamo",
        peft.LoKrConfig(
            r=2, alpha=4, target_modules=TWO, decompose_both=True, decompose_factor=4
        ),
        "LoKr of low rank: both factors of the Kronecker product are products",
    ),
    "bert_lokr_full": Case(
        "bert_torchscript",
        peft.LoKrConfig(r=8, alpha=8, target_modules=TWO),
        "LoKr of full rank",
    ),
    "convnet_lokr": Case(
        "convnet_dynamo",
        peft.LoKrConfig(
            r=1, alpha=2, target_modules=["0", "2", "4"], use_effective_conv2d=True
        ),
        "LoKr of convolutions, with a core; one is dilated and one in groups",
        std=1.0,
    ),
    "bert_hira": Case(
        "bert_dynamo",
        peft.HiraConfig(r=4, target_modules=[*TWO, "word_embeddings"]),
        "HiRA, also of an embedding",
    ),
    "gpt2_hira": Case(
        "gpt2_dynamo",
        peft.HiraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        "HiRA of Conv1D",
    ),
    "convnet_hira": Case(
        "convnet_dynamo",
        peft.HiraConfig(r=2, target_modules=["0", "2", "6"]),
        "HiRA of convolutions",
        std=1.0,
    ),
    "bert_randlora": Case(
        "bert_dynamo",
        peft.RandLoraConfig(
            r=4, randlora_alpha=8, target_modules=["query", "intermediate.dense"]
        ),
        "RandLoRA, whose bases are saved once for all modules",
    ),
    "bert_shira": Case(
        "bert_dynamo",
        peft.ShiraConfig(r=2, target_modules=TWO),
        "SHiRA: single entries of the weight",
    ),
    "bert_c3a": Case(
        "bert_dynamo",
        peft.C3AConfig(block_size=8, target_modules=TWO),
        "C3A: circulant blocks",
        std=2.0,
    ),
    "bert_road": Case(
        "bert_dynamo",
        peft.RoadConfig(variant="road_1", group_size=4, target_modules=TWO),
        "RoAd with one angle for two outputs",
    ),
    "bert_road_4": Case(
        "bert_torchscript",
        peft.RoadConfig(variant="road_4", group_size=8, target_modules=TWO),
        "RoAd with four numbers for two outputs",
    ),
    "bert_miss_bat": Case(
        "bert_dynamo",
        peft.MissConfig(r=4, init_weights="bat", target_modules=TWO),
        "MiSS of blocks times the weight",
    ),
    "bert_hra": Case(
        "bert_dynamo",
        peft.HRAConfig(r=2, target_modules=TWO, init_weights=False),
        "HRA: two mirrors",
    ),
    "convnet_hra": Case(
        "convnet_dynamo",
        peft.HRAConfig(r=2, target_modules=["6", "head"], apply_GS=True),
        "HRA of a convolution, with the mirrors made orthogonal",
    ),
    "bert_fourierft": Case(
        "bert_dynamo",
        peft.FourierFTConfig(n_frequency=50, target_modules=TWO, random_loc_seed=777),
        "FourierFT: the places follow from a seed",
        std=3.0,
    ),
    "bert_waveft": Case(
        "bert_dynamo",
        peft.WaveFTConfig(
            n_frequency=60, target_modules=TWO, random_loc_seed=5, use_idwt=False
        ),
        "WaveFT without the transform",
    ),
    "bert_glora": Case(
        "bert_dynamo",
        peft.GloraConfig(r=2, target_modules=TWO),
        "GLoRA with a bias of its own",
    ),
    "bert_peanut": Case(
        "bert_dynamo",
        peft.PeanutConfig(r=4, depth=1, target_modules=TWO),
        "PEANuT: a small network of the weight",
    ),
    "bert_osf": Case(
        "bert_dynamo",
        peft.OSFConfig(effective_rank=10, target_modules=QV),
        "OSF: the small singular vectors were trained",
    ),
    "bert_pissa": Case(
        "bert_dynamo",
        lora(*TWO, init_lora_weights="pissa"),
        "PiSSA that was not converted: the base lost its first singular vectors",
    ),
    "bert_olora": Case(
        "bert_torchscript",
        lora(*TWO, init_lora_weights="olora"),
        "OLoRA that was not converted: the base lost the first columns of its QR",
    ),
}


def main() -> None:
    """Write all cases."""
    chosen = arguments("Write cases of PEFT's methods that compute a weight.")
    for name, case in selected("peft", SUPPORTED, chosen.only).items():
        make_case(name, case, chosen.folder)


if __name__ == "__main__":
    main()
