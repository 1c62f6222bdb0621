"""Write cases of PEFT whose modules are inside operators to ``tests/cases/``.

Fused attention, recurrent layers and stacked experts. What the files are is told in
``case_making.py``; beside each base is ``parameters.npz``, its own values of what is inside
operators. The environment is that of ``make_peft_cases.py``; that of ``bert_optimised`` has
transformers 4.57.3, peft 0.18.0, optimum-onnx 0.1.0 and onnxruntime 1.32.0 instead, whose
exports can be fused. From the root of the repository::

    PYTHONHASHSEED=0 /tmp/peft/bin/python tools/make_inner_weight_cases.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import make_peft_cases as peft_cases
import numpy as np
import onnx
import torch
import transformers
from case_making import (
    EXPORTERS,
    LOGITS,
    TOKEN_LOGITS,
    Base,
    arguments,
    export_optimum,
    make,
    write_base,
)
from export_fixtures import (
    BATCH_AXES,
    TEXT_AXES,
    VOCABULARY,
    bert_inputs,
    build_bert,
    text_inputs,
)
from make_peft_cases import Case, ia3, lora, make_case, selected
from torch import nn

SERIES = {0: "batch", 1: "sequence"}


class Recurrent(nn.Module):
    """A stack of LSTMs in both directions and a GRU whose input is as wide as its output.

    Attributes:
        lstm: Two layers in both directions.
        gru: One layer.
        head: A Linear.
    """

    def __init__(self) -> None:
        """Make the modules."""
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[batch, 3]`` of a series ``[batch, sequence, 6]``."""
        hidden = self.gru(self.lstm(series)[0])[0]
        return self.head(hidden.mean(1))


class Experts(nn.Module):
    """Experts in two stacks, all of which see every token.

    Attributes:
        up: ``(experts, in, out)``.
        down: ``(experts, out, in)``, as ``nn.Linear`` has it.
    """

    def __init__(self, form: str) -> None:
        """Make the stacks; ``form`` says how they are used."""
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(3, 12, 20))
        self.down_proj = nn.Parameter(torch.empty(3, 12, 20))
        self.form = form

    def forward(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Return ``[tokens, 12]`` of tokens ``[tokens, 12]`` and gates ``[tokens, 3]``."""
        if self.form == "loop":
            each = [
                torch.tanh(x @ self.up_proj[i]) @ self.down_proj[i].T * gates[:, i : i + 1]
                for i in range(3)
            ]
            return torch.stack(each).sum(0)
        if self.form == "bmm":
            hidden = torch.tanh(torch.bmm(x.expand(3, *x.shape), self.up_proj))
            each = torch.bmm(hidden, self.down_proj.transpose(1, 2))
            return (each * gates.T[..., None]).sum(0)
        hidden = torch.tanh(torch.einsum("td,edf->etf", x, self.up_proj))
        return torch.einsum("etf,edf,te->td", hidden, self.down_proj, gates)


class Mixture(nn.Module):
    """A mixture of experts between two Linears.

    Attributes:
        first: A Linear.
        router: A Linear.
        experts: The experts.
        head: A Linear.
    """

    def __init__(self, form: str) -> None:
        """Make the modules."""
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.router = nn.Linear(12, 3)
        self.experts = Experts(form)
        self.head = nn.Linear(12, 3)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[batch, 3]`` of a series ``[batch, sequence, 6]``."""
        x = self.first(series.mean(1))
        return self.head(x + self.experts(x, self.router(x).softmax(-1)))


def series_inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Return a random series."""
    generator = torch.Generator().manual_seed(batch * length)
    return {"series": torch.randn(batch, length, 6, generator=generator)}


def five_steps(batch: int, _length: int) -> dict[str, torch.Tensor]:
    """Return a random series of five steps; the dynamo exporter fixes an LSTM's length."""
    return series_inputs(batch, 5)


def build_mixtral() -> nn.Module:
    """Return a Mixtral language model."""
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=16,
        use_cache=False,
        experts_implementation="batched_mm",
        attn_implementation="eager",
    )
    return transformers.MixtralForCausalLM(config)


def build_olmoe() -> nn.Module:
    """Return an OLMoE language model, whose gates and values have a square weight."""
    config = transformers.OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=16,
        use_cache=False,
        experts_implementation="batched_mm",
        attn_implementation="eager",
    )
    return transformers.OlmoeForCausalLM(config)


def export_optimised(model: nn.Module, base: Base, path: Path) -> None:
    """Export with optimum and fuse as its O2 and onnxruntime.transformers do."""
    from onnxruntime.transformers import optimizer

    export_optimum(model, base, path)
    fused = optimizer.optimize_model(str(path), "bert", num_heads=4, hidden_size=32)
    fused.save_model_to_file(str(path))
    require_attention(path)


def require_attention(path: Path) -> None:
    """Check that the projections of attention are inside a node.

    Raises:
        RuntimeError: If they were not fused; newer exports have other patterns.
    """
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    if "Attention" not in kinds:
        raise RuntimeError(f"{path} has no Attention: {sorted(kinds)}")


EXPORTERS |= {"optimised": export_optimised}

BERT = (bert_inputs, TEXT_AXES, LOGITS)

EXPERTS = {"loop": "torchscript", "bmm": "dynamo", "einsum": "torchscript"}
"""Forms of the experts, each with one exporter."""

BASES = {
    "bert_optimised": Base(build_bert, *BERT, "optimised"),
    "recurrent_torchscript": Base(Recurrent, series_inputs, SERIES, LOGITS, "torchscript"),
    "recurrent_dynamo": Base(Recurrent, five_steps, BATCH_AXES, LOGITS),
    "mixtral_dynamo": Base(build_mixtral, text_inputs, TEXT_AXES, TOKEN_LOGITS),
    "olmoe_dynamo": Base(build_olmoe, text_inputs, TEXT_AXES, TOKEN_LOGITS),
    **{
        f"experts_{form}": Base(
            lambda form=form: Mixture(form), series_inputs, SERIES, LOGITS, exporter
        )
        for form, exporter in EXPERTS.items()
    },
}


def on_parameters(*names: str, modules: tuple[str, ...] = (), **fields: Any) -> Any:
    """Return a configuration of LoRA on parameters."""
    config = lora(*modules, target_parameters=list(names), **fields)
    config.target_modules = set(modules)
    return config


LSTM = ("lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_hh_l1_reverse")
GRU = ("gru.weight_ih_l0", "gru.weight_hh_l0")

CASES = {
    "bert_optimised_lora": Case(
        "bert_optimised", lora("query", "value", "output.dense"), "LoRA inside Attention"
    ),
    "bert_optimised_lora_patterns": Case(
        "bert_optimised",
        lora("query", "key", "value", rank_pattern={"key": 2}, layers_to_transform=[1]),
        "other ranks for the projections inside one Attention",
    ),
    "bert_optimised_dora": Case(
        "bert_optimised",
        lora("query", "value", use_dora=True, lora_alpha=6),
        "DoRA inside Attention",
    ),
    "bert_optimised_ia3": Case(
        "bert_optimised", ia3("key", "value"), "IA3 inside Attention, with its bias"
    ),
    **{
        f"{kind}_{name}": Case(f"recurrent_{exporter}", on_parameters(*targets), said, std=std)
        for kind, exporter in (("recurrent", "dynamo"), ("recurrent_ts", "torchscript"))
        for name, targets, said, std in (
            ("lstm", LSTM, "target_parameters of an LSTM in both directions", 1.5),
            ("gru", GRU, "target_parameters of a GRU, whose two weights have one shape", 0.8),
            ("all", (*LSTM, *GRU, "head.weight"), "parameters of three modules", 0.5),
        )
    },
    "mixtral_experts": Case(
        "mixtral_dynamo",
        on_parameters(
            *("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), modules=("q_proj",)
        ),
        "target_parameters of experts beside target_modules",
    ),
    "mixtral_one_stack": Case(
        "mixtral_dynamo",
        on_parameters("mlp.experts.down_proj", use_rslora=True),
        "one of two stacks of experts, with rsLoRA",
    ),
    "olmoe_square": Case(
        "olmoe_dynamo",
        on_parameters("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        "experts with a square weight, whose shape does not tell its orientation",
    ),
    **{
        f"experts_{form}": Case(
            f"experts_{form}",
            on_parameters("experts.up_proj", "experts.down_proj"),
            f"stacked experts: {form}",
            std=0.4,
        )
        for form in ("bmm", "einsum")
    },
    "experts_loop": Case(
        "experts_loop",
        on_parameters("experts.up_proj", "experts.down_proj"),
        "a stack of experts that the exporter cut into pieces; --base-weights tells which",
        reason="'experts.up_proj' [3, 12, 20] was not found",
        std=0.4,
    ),
}


def write_parameters(name: str, base: Base, cases: Path) -> None:
    """Write the base's own values of what is inside operators, as ``parameters.npz``."""
    named = make(base).state_dict().items()
    inner = re.compile(
        r"weight_[ih]h_l\d|_proj$|attention\.self\.\w+\.weight$|c_attn\.weight$"
    )
    values = {key: value.numpy() for key, value in named if inner.search(key)}
    np.savez_compressed(cases / "bases" / name / "parameters.npz", **values)


def main() -> None:
    """Write all bases and cases."""
    chosen = arguments("Write cases of PEFT whose modules are inside operators.")
    peft_cases.BASES |= BASES
    for name, base in BASES.items():
        if chosen.only in name and not chosen.keep_bases:
            write_base(name, base, chosen.folder)
            write_parameters(name, base, chosen.folder)
    for name, case in selected("peft", CASES, chosen.only).items():
        make_case(name, case, chosen.folder)


if __name__ == "__main__":
    main()
