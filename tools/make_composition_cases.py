"""Write what AdapterHub's ``adapters`` computes with two adapters at once to ``tests/cases/``.

The folder ``compositions/`` there has the adapters, each as the library saved it, and
``expected.npz`` with one array for each composition, such as ``stack/seq/houlsby``. Where the
library refuses a pair there is none. The bases are those of ``make_adapterhub_cases.py``,
which says how to make the environment. Run this script after it, from the root of the
repository::

    /tmp/adapterhub/bin/python tools/make_composition_cases.py
"""

from __future__ import annotations

import itertools
from pathlib import Path

import adapters
import adapters.composition as ac
import make_adapterhub_cases as single
import numpy as np
import torch
from adapters import AdapterConfig
from case_making import Base, clean_folder, compute, make, train, write_json
from torch import nn

CASES = Path(__file__).parent.parent / "tests" / "cases"
SMALL = {"reduction_factor": 16, "leave_out": [0]}
LATE = {"leave_out": [0]}

ADAPTERS: dict[str, dict[str, AdapterConfig]] = {
    "bert_tf4_dynamo": {
        "seq": single.seq_bn(mh_adapter=True, **SMALL),
        "seq_tanh": single.seq_bn(non_linearity="tanh", **SMALL),
        "houlsby": single.double_seq_bn(**SMALL),
        "normed": single.seq_bn(residual_before_ln=False, **SMALL),
        "plus": adapters.AdapterPlusConfig(stochastic_depth=0.0, **SMALL),
        "par": single.par_bn(scaling=1.0, **SMALL),
        "lora": single.lora("q", "v", r=2, output_lora=True, **LATE),
        "dora": adapters.DoRAConfig(
            r=2, alpha=4, attn_matrices=["k"], output_lora=True, selfattn_lora=True, **LATE
        ),
        "ia3": adapters.IA3Config(**LATE),
        "inv": single.seq_bn(inv_adapter="nice", inv_adapter_reduction_factor=8, **SMALL),
    },
    "gpt2_tf4_dynamo": {
        "gpt2_seq": single.seq_bn(**SMALL),
        "gpt2_houlsby": single.double_seq_bn(**SMALL),
        "gpt2_par": single.par_bn(scaling=1.0, **SMALL),
    },
}
AGAIN = ("lora", "par", "seq", "ia3")
"""Those that have a second one of the same form, which is called `lora2` and so on."""


def add(model: nn.Module, name: str, config: AdapterConfig) -> None:
    """Give a model an adapter with the weights of a long training."""
    model.add_adapter(name, config=config)
    for path, parameter in model.named_parameters():
        if name in path.split("."):
            train(parameter, f"{name}:{path}", 0.3)


def computed(model: nn.Module, base: Base, setup: object) -> np.ndarray | None:
    """Return the model's first output with a composition; None if the library refuses it."""
    try:
        model.set_active_adapters(setup)
        model.eval()
        return next(iter(compute(model, base).values()))
    except (ValueError, RuntimeError, KeyError):
        return None


def main() -> None:
    """Write the adapters and what the library computes with pairs of them."""
    folder = clean_folder(CASES / "compositions")
    expected: dict[str, np.ndarray | None] = {}
    for base_name, configs in ADAPTERS.items():
        base = single.BASES[base_name]
        torch.manual_seed(0)
        model = make(base)
        adapters.init(model)
        for name, config in configs.items():
            add(model, name, config)
            model.save_adapter(str(folder / name), name, with_head=False, use_safetensors=True)
        for name in configs:
            expected[name] = computed(model, base, name)
        for a, b in itertools.permutations(configs, 2):
            expected[f"stack/{a}/{b}"] = computed(model, base, ac.Stack(a, b))
        if "seq" not in configs:
            continue
        for a in AGAIN:
            b = f"{a}2"
            add(model, b, configs[a])
            model.save_adapter(str(folder / b), b, with_head=False, use_safetensors=True)
            expected[f"stack/{a}/{b}"] = computed(model, base, ac.Stack(a, b))
            for weights in ([0.5, 0.5], [0.7, 0.3]):
                setup = ac.Average(a, b, weights=weights)
                expected[f"average/{a}/{weights[0]}"] = computed(model, base, setup)
        a, b = "seq", "seq2"
        rows = ac.BatchSplit(a, b, batch_sizes=[1, 2])
        expected[f"batch_split/{a}/{b}"] = computed(model, base, rows)
        expected[f"parallel/{a}/{b}"] = computed(model, base, ac.Parallel(a, b))
    given = {name: value for name, value in expected.items() if value is not None}
    np.savez_compressed(folder / "expected.npz", **given)
    bases = {name: base for base, configs in ADAPTERS.items() for name in configs}
    write_json(folder / "compositions.json", {"library": single.LIBRARY, "bases": bases})
    print(sorted(set(expected) - set(given)))


if __name__ == "__main__":
    main()
