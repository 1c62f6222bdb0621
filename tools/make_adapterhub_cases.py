"""Write cases of adapters that AdapterHub's ``adapters`` saved to ``tests/cases/``.

What the files are is told in ``case_making.py``. ``make_peft_cases.py`` runs first,
because some cases use a base of its. To make the environment and run the script, from the
root of the repository::

    python -m venv /tmp/adapterhub
    /tmp/adapterhub/bin/pip install torch==2.13.0 adapters==1.3.0 transformers==4.57.6
    /tmp/adapterhub/bin/pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
    /tmp/adapterhub/bin/pip install optimum-onnx==0.1.0
    /tmp/adapterhub/bin/python tools/make_adapterhub_cases.py

``--only NAME`` writes the bases and cases with ``NAME`` in their names; with
``--keep-bases`` the bases are left as they are.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import AdapterConfig
from case_making import (
    LOGITS,
    TOKEN_LOGITS,
    Arrays,
    Base,
    CaseFacts,
    arguments,
    clean_folder,
    compute,
    difference,
    make,
    train,
    write_base,
    write_case,
    write_json,
)
from export_fixtures import (
    BATCH_AXES,
    TEXT_AXES,
    VOCABULARY,
    bert_inputs,
    build_bert,
    build_gpt2,
    build_llama,
    build_vit,
    image_inputs,
    text_inputs,
)
from torch import nn

LIBRARY = f"adapters {metadata.version('adapters')}"
NAME = "task"
HEADS = ("classifier", "score", "lm_head", "heads")
RELOADED = 1e-6
LEGACY = "adapters.1.0.0"

ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "num_labels": 3,
}


def build_roberta() -> nn.Module:
    """Return a RoBERTa classifier, whose head has two Linears."""
    config = transformers.RobertaConfig(**ENCODER, pad_token_id=1)
    return transformers.RobertaForSequenceClassification(config)


def build_xlm_roberta() -> nn.Module:
    """Return an XLM-RoBERTa classifier."""
    config = transformers.XLMRobertaConfig(**ENCODER, pad_token_id=1)
    return transformers.XLMRobertaForSequenceClassification(config)


def build_distilbert() -> nn.Module:
    """Return a DistilBERT classifier."""
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.DistilBertForSequenceClassification(config)


def build_albert() -> nn.Module:
    """Return an ALBERT classifier, whose layers share their weights."""
    config = transformers.AlbertConfig(**ENCODER, embedding_size=16)
    return transformers.AlbertForSequenceClassification(config)


def build_mistral() -> nn.Module:
    """Return a Mistral language model with grouped key and value heads."""
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        sliding_window=None,
        use_cache=False,
    )
    return transformers.MistralForCausalLM(config)


def build_flexible() -> nn.Module:
    """Return a BERT with a flexible head of AdapterHub, which no adapter has trained."""
    config = transformers.BertConfig(**ENCODER)
    model = adapters.BertAdapterModel(config)
    model.add_classification_head(NAME, num_labels=3)
    return model


BERT = (bert_inputs, TEXT_AXES, LOGITS)
TEXT = (text_inputs, TEXT_AXES, LOGITS)
TOKENS = (text_inputs, TEXT_AXES, TOKEN_LOGITS)
IMAGE = (image_inputs("pixel_values", 16), BATCH_AXES, LOGITS)

BASES = {
    "bert_tf4_dynamo": Base(build_bert, *BERT),
    "bert_tf4_torchscript": Base(build_bert, *BERT, "torchscript"),
    "bert_tf4_opset14": Base(build_bert, *BERT, "torchscript-14"),
    "bert_tf4_flexible": Base(build_flexible, *BERT, "torchscript"),
    "roberta_tf4_dynamo": Base(build_roberta, *TEXT),
    "xlm_roberta_tf4_torchscript": Base(build_xlm_roberta, *TEXT, "torchscript"),
    "distilbert_tf4_dynamo": Base(build_distilbert, *TEXT),
    "albert_tf4_torchscript": Base(build_albert, *BERT, "torchscript"),
    "gpt2_tf4_dynamo": Base(build_gpt2, *TOKENS),
    "gpt2_tf4_optimum": Base(build_gpt2, *TOKENS, "optimum"),
    "llama_tf4_dynamo": Base(build_llama, *TOKENS),
    "mistral_tf4_dynamo": Base(build_mistral, *TOKENS),
    "vit_tf4_dynamo": Base(build_vit, *IMAGE),
}
BASES_OF_PEFT = {
    "vit_dynamo": Base(build_vit, *IMAGE),
    "vit_torchscript": Base(build_vit, *IMAGE, "torchscript"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """An adapter to train and save.

    Attributes:
        base: Name of the base.
        config: Configuration of AdapterHub.
        exercises: What this case has that others have not.
        reason: Why the adapter must be refused, or nothing if it is supported.
        std: Standard deviation of the trained weights.
        safe: Whether to save as safetensors.
        head: Whether the head is trained and saved too.
        part: Attribute of the model that is trained, or nothing for all of it.
        legacy: Whether to make the file look as an old release wrote it, which ignored
            the scaling.
    """

    base: str
    config: AdapterConfig
    exercises: str
    reason: str = ""
    std: float = 0.3
    safe: bool = False
    head: bool = False
    part: str = ""
    legacy: bool = False


def seq_bn(**fields: Any) -> AdapterConfig:
    """Return Pfeiffer's bottleneck, eight wide."""
    return adapters.SeqBnConfig(**{"reduction_factor": 4} | fields)


def double_seq_bn(**fields: Any) -> AdapterConfig:
    """Return Houlsby's two bottlenecks, eight wide."""
    return adapters.DoubleSeqBnConfig(**{"reduction_factor": 4} | fields)


def par_bn(**fields: Any) -> AdapterConfig:
    """Return the parallel bottleneck, eight wide."""
    return adapters.ParBnConfig(**{"reduction_factor": 4} | fields)


def plus(**fields: Any) -> AdapterConfig:
    """Return AdapterPlus, eight wide, without what is random in training only."""
    return adapters.AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0, **fields)


def lora(*matrices: str, **fields: Any) -> AdapterConfig:
    """Return LoRA of some of query, key and value, with rank 4 and alpha 8."""
    chosen = {"r": 4, "alpha": 8, "attn_matrices": list(matrices)}
    return adapters.LoRAConfig(**chosen | fields)


EVERYWHERE = {"intermediate_lora": True, "output_lora": True}

BOTTLENECKS = {
    "bert_seq_bn": Case(
        "bert_tf4_torchscript", seq_bn(), "Pfeiffer with a trained head", head=True
    ),
    "bert_opset14_seq_bn": Case(
        "bert_tf4_opset14",
        seq_bn(mh_adapter=True),
        "Pfeiffer at both places; the LayerNorms are decomposed; a trained head",
        head=True,
    ),
    "bert_opset14_flags": Case(
        "bert_tf4_opset14",
        seq_bn(
            ln_before=True,
            ln_after=True,
            residual_before_ln="post_add",
            inv_adapter="nice",
            inv_adapter_reduction_factor=4,
        ),
        "decomposed LayerNorms of base and adapter; NICE",
    ),
    "bert_opset14_adapterplus": Case(
        "bert_tf4_opset14", plus(), "AdapterPlus behind a decomposed LayerNorm", safe=True
    ),
    "bert_double_seq_bn": Case(
        "bert_tf4_dynamo",
        double_seq_bn(),
        "Houlsby with a trained head, safetensors",
        head=True,
        safe=True,
    ),
    "bert_par_bn": Case(
        "bert_tf4_dynamo",
        par_bn(),
        "parallel; ParBnConfig scales by 4.0, safetensors",
        safe=True,
    ),
    "bert_par_bn_ts": Case(
        "bert_tf4_torchscript",
        par_bn(scaling=1.5, non_linearity="gelu_new", mh_adapter=True),
        "parallel at both places, float scaling, gelu_new",
    ),
    "bert_scaled_par_bn": Case(
        "bert_tf4_dynamo", par_bn(scaling="learned"), "parallel with a learned scaling"
    ),
    "bert_adapterplus": Case(
        "bert_tf4_dynamo", plus(), "AdapterPlus after the LayerNorm, scaled per channel"
    ),
    "bert_adapterplus_ts": Case(
        "bert_tf4_torchscript", plus(), "AdapterPlus, TorchScript, safetensors", safe=True
    ),
    "bert_compacter": Case(
        "bert_tf4_dynamo",
        adapters.CompacterConfig(reduction_factor=4),
        "Compacter: Kronecker products with a shared rule",
        std=0.7,
    ),
    "bert_compacter_plus_ts": Case(
        "bert_tf4_torchscript",
        adapters.CompacterPlusPlusConfig(reduction_factor=4),
        "Compacter++, safetensors",
        std=0.7,
        safe=True,
    ),
    "bert_compacter_plus_unshared": Case(
        "bert_tf4_dynamo",
        adapters.CompacterPlusPlusConfig(
            reduction_factor=4, shared_phm_rule=False, phm_rank=2, phm_dim=2
        ),
        "Compacter++ whose layers have rules of their own, two wide and of rank 2",
        std=0.6,
    ),
    "bert_double_seq_bn_inv_ts": Case(
        "bert_tf4_torchscript",
        adapters.DoubleSeqBnInvConfig(reduction_factor=4, inv_adapter_reduction_factor=4),
        "NICE coupling with swish, a trained head, safetensors",
        safe=True,
        head=True,
    ),
    "bert_ln_before": Case(
        "bert_tf4_dynamo",
        seq_bn(ln_before=True, non_linearity="tanh"),
        "ln_before: adapter_down.0 is a LayerNorm; tanh",
    ),
    "bert_ln_after": Case(
        "bert_tf4_dynamo",
        double_seq_bn(ln_after=True, non_linearity="leakyrelu"),
        "ln_after around the adapter's term; leakyrelu, safetensors",
        safe=True,
    ),
    "bert_ln_after_residual": Case(
        "bert_tf4_torchscript",
        seq_bn(ln_after=True, adapter_residual_before_ln=True, non_linearity="gelu"),
        "ln_after around the sum; gelu",
    ),
    "bert_par_bn_ln_after": Case(
        "bert_tf4_dynamo",
        par_bn(ln_before=True, ln_after=True, use_gating=True, scaling="channel"),
        "parallel with both LayerNorms, gate and scaling per channel",
    ),
    "bert_gating": Case(
        "bert_tf4_dynamo",
        double_seq_bn(use_gating=True, scaling=2.5),
        "a gate that is the mean over the sequence; float scaling",
    ),
    "bert_residual_after_ln": Case(
        "bert_tf4_dynamo",
        seq_bn(residual_before_ln=False, scaling=0.5),
        "the residual is taken after the LayerNorm",
    ),
    "bert_post_add": Case(
        "bert_tf4_torchscript",
        seq_bn(residual_before_ln="post_add", mh_adapter=True),
        "the residual is taken between the addition and the LayerNorm, at both places",
    ),
    "bert_factors": Case(
        "bert_tf4_dynamo",
        double_seq_bn(reduction_factor={"1": 0.5, "default": 8}, scaling="learned"),
        "sizes that differ by layer: 4 and 64",
    ),
    "bert_leave_out": Case(
        "bert_tf4_torchscript",
        double_seq_bn(leave_out=[0], output_adapter=False),
        "only the attention of the second layer; silu, safetensors",
        safe=True,
        std=0.5,
    ),
    "bert_from_headless": Case(
        "bert_tf4_dynamo",
        seq_bn(inv_adapter="nice", inv_adapter_reduction_factor=2),
        "keys without bert. (trained on BertModel) on a base that has it",
        part="bert",
    ),
    "bert_flexible_head": Case(
        "bert_tf4_flexible",
        seq_bn(),
        "a flexible head, whose base has the same head untrained",
        head=True,
    ),
    "roberta_seq_bn": Case(
        "roberta_tf4_dynamo", seq_bn(), "RoBERTa; a trained head of two Linears", head=True
    ),
    "roberta_double_seq_bn": Case(
        "roberta_tf4_dynamo", double_seq_bn(), "RoBERTa, safetensors", safe=True
    ),
    "roberta_par_bn": Case("roberta_tf4_dynamo", par_bn(scaling=1.0), "RoBERTa"),
    "xlm_roberta_seq_bn": Case(
        "xlm_roberta_tf4_torchscript",
        seq_bn(mh_adapter=True),
        "XLM-RoBERTa, at both places, safetensors",
        safe=True,
    ),
    "xlm_roberta_par_bn": Case(
        "xlm_roberta_tf4_torchscript", par_bn(scaling="learned"), "XLM-RoBERTa"
    ),
    "distilbert_seq_bn": Case("distilbert_tf4_dynamo", seq_bn(), "DistilBERT"),
    "distilbert_double_seq_bn": Case(
        "distilbert_tf4_dynamo", double_seq_bn(), "DistilBERT; a trained head", head=True
    ),
    "distilbert_par_bn": Case("distilbert_tf4_dynamo", par_bn(scaling=1.0), "DistilBERT"),
    "gpt2_seq_bn": Case(
        "gpt2_tf4_dynamo",
        seq_bn(),
        "GPT-2; the head is saved, and shared with the embedding",
        head=True,
        std=0.2,
    ),
    "gpt2_double_seq_bn": Case(
        "gpt2_tf4_optimum", double_seq_bn(), "GPT-2 exported by optimum", std=0.2
    ),
    "gpt2_par_bn": Case(
        "gpt2_tf4_dynamo", par_bn(mh_adapter=True), "GPT-2, at both places", std=0.15
    ),
    "gpt2_flags": Case(
        "gpt2_tf4_dynamo",
        double_seq_bn(
            original_ln_before=True,
            ln_before=True,
            ln_after=True,
            use_gating=True,
            scaling="channel",
            residual_before_ln=False,
        ),
        "a model without LayerNorm there: both own LayerNorms, gate, scaling per channel",
    ),
    "llama_seq_bn": Case("llama_tf4_dynamo", seq_bn(), "Llama", std=0.2),
    "llama_double_seq_bn": Case(
        "llama_tf4_dynamo",
        double_seq_bn(),
        "Llama; lm_head is trained, safetensors",
        std=0.2,
        safe=True,
        head=True,
    ),
    "llama_par_bn": Case("llama_tf4_dynamo", par_bn(), "Llama", std=0.15),
    "mistral_seq_bn": Case(
        "mistral_tf4_dynamo", seq_bn(mh_adapter=True), "Mistral, at both places", std=0.2
    ),
    "mistral_par_bn": Case(
        "mistral_tf4_dynamo", par_bn(scaling="learned"), "Mistral", std=0.2
    ),
    "vit_seq_bn": Case("vit_tf4_dynamo", seq_bn(), "ViT; a trained head", head=True),
    "vit_double_seq_bn": Case(
        "vit_tf4_dynamo", double_seq_bn(), "ViT, safetensors", safe=True
    ),
    "vit_par_bn": Case("vit_tf4_dynamo", par_bn(scaling=1.0), "ViT"),
    "vit_adapterplus_renamed": Case(
        "vit_torchscript",
        plus(),
        "trained with transformers 4, the base exported with 5 by TorchScript",
    ),
    "vit_double_seq_bn_renamed": Case(
        "vit_dynamo",
        double_seq_bn(),
        "trained with transformers 4, the base exported with 5, which renamed the modules",
        head=True,
    ),
}

LORA_FAMILY = {
    "bert_lora": Case(
        "bert_tf4_dynamo",
        lora("q", "k", "v", **EVERYWHERE),
        "LoRA of query, key, value, intermediate and output; a trained head",
        std=0.2,
        head=True,
    ),
    "bert_lora_gating": Case(
        "bert_tf4_torchscript",
        lora("q", "v", use_gating=True),
        "a gate instead of the scaling",
    ),
    "bert_lora_legacy": Case(
        "bert_tf4_dynamo",
        lora("q", "v"),
        "saved by adapters 1.0.0, which ignored alpha: it counts as r",
        legacy=True,
    ),
    "bert_ia3": Case(
        "bert_tf4_dynamo", adapters.IA3Config(), "IA3: outputs are scaled, with the bias"
    ),
    "bert_dora": Case(
        "bert_tf4_torchscript",
        adapters.DoRAConfig(r=4, alpha=8, attn_matrices=["q", "k", "v"]),
        "DoRA: the norm is without alpha and the bias is scaled, safetensors",
        safe=True,
    ),
    "bert_dora_output": Case(
        "bert_tf4_dynamo",
        adapters.DoRAConfig(r=4, alpha=2, **EVERYWHERE),
        "DoRA also of intermediate and output",
    ),
    "gpt2_lora": Case(
        "gpt2_tf4_dynamo",
        lora("q", "k", "v", **EVERYWHERE),
        "LoRA of c_attn for all three, of c_fc and c_proj",
        std=0.15,
    ),
    "gpt2_lora_qv_optimum": Case(
        "gpt2_tf4_optimum",
        lora("q", "v"),
        "LoRA of c_attn for query and value; optimum",
        std=0.4,
    ),
    "gpt2_lora_k": Case(
        "gpt2_tf4_dynamo", lora("k"), "LoRA of c_attn for the key, safetensors", safe=True
    ),
    "gpt2_ia3": Case("gpt2_tf4_dynamo", adapters.IA3Config(), "IA3 of two thirds of c_attn"),
    "llama_lora": Case(
        "llama_tf4_dynamo",
        lora("q", "v", **EVERYWHERE),
        "LoRA of Llama, whose intermediate and output are swapped",
        std=0.2,
    ),
    "llama_ia3": Case(
        "llama_tf4_dynamo", adapters.IA3Config(), "IA3 of Llama, on down_proj", safe=True
    ),
    "vit_lora_renamed": Case(
        "vit_dynamo",
        lora("q", "k", "v", **EVERYWHERE),
        "LoRA trained with transformers 4, the base exported with 5",
        std=0.2,
    ),
}

REFUSED = {
    "bert_prompt": Case(
        "bert_tf4_dynamo",
        adapters.PromptTuningConfig(prompt_length=4),
        "prompt_tuning",
        "prompt tuning adds tokens to the input",
    ),
    "bert_prefix": Case(
        "bert_tf4_dynamo",
        adapters.PrefixTuningConfig(flat=True, prefix_length=4),
        "prefix_tuning",
        "prefix tuning adds keys and values to the attention",
    ),
    "bert_loreft": Case(
        "bert_tf4_dynamo",
        adapters.LoReftConfig(),
        "reft",
        "ReFT edits hidden states at chosen positions",
    ),
    "bert_vera": Case(
        "bert_tf4_dynamo",
        adapters.VeraConfig(r=4),
        "VeRA",
        "VeRA scales random matrices that all modules share",
    ),
    "bert_mam": Case(
        "bert_tf4_dynamo",
        adapters.MAMConfig(
            adapters.PrefixTuningConfig(bottleneck_size=8, prefix_length=4), par_bn()
        ),
        "union of prefix tuning and ParBn",
        "a union of several methods is one adapter only in its library",
    ),
    "bert_unipelt": Case(
        "bert_tf4_dynamo",
        adapters.UniPELTConfig(
            adapters.PrefixTuningConfig(bottleneck_size=8, prefix_length=4, use_gating=True),
            seq_bn(use_gating=True),
            lora("q", "v", use_gating=True),
        ),
        "union of prefix tuning, SeqBn and LoRA",
        "a union of several methods is one adapter only in its library",
    ),
    "albert_seq_bn": Case(
        "albert_tf4_torchscript",
        seq_bn(),
        "ALBERT",
        "bottleneck adapters of model type 'albert' are not supported",
    ),
}


def attach(model: nn.Module, case: Case) -> tuple[nn.Module, nn.Module]:
    """Make a model ready for adapters; return it and the part that gets the adapter."""
    part = getattr(model, case.part) if case.part else model
    if not isinstance(part, adapters.BertAdapterModel):
        adapters.init(part)
    return model, part


def activate(part: nn.Module) -> None:
    """Switch the adapter on, and its flexible head if there is one."""
    part.set_active_adapters(NAME)
    part.eval()


def train_all(name: str, part: nn.Module, case: Case) -> None:
    """Give all weights of the adapter, and of its head if it is trained, random values.

    A head that is shared with the embedding is not a parameter of its own, and stays.
    """
    for path, parameter in part.named_parameters():
        components = path.split(".")
        is_head = components[0] in HEADS
        if (case.head and is_head) or (NAME in components and not is_head):
            train(parameter, f"{name}:{path}", case.std)


def scalings_of_old(part: nn.Module) -> None:
    """Make LoRA compute as the releases did that ignored alpha."""
    for module in part.modules():
        if hasattr(module, "lora_alpha"):
            module.scaling = 1.0


def edit_version(folder: Path) -> None:
    """Make a saved configuration look as adapters 1.0.0 wrote it."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, config | {"version": LEGACY})


def save(part: nn.Module, case: Case, folder: Path) -> None:
    """Save the adapter as the case wants it."""
    part.save_adapter(str(folder), NAME, with_head=case.head, use_safetensors=case.safe)
    if case.legacy:
        edit_version(folder)


def check_reloaded(name: str, case: Case, base: Base, expected: Arrays, folder: Path) -> None:
    """Load what was saved into a fresh base and compare.

    Raises:
        RuntimeError: If the files do not hold all that was trained.
    """
    model, part = attach(make(base), case)
    part.load_adapter(
        str(folder), with_head=case.head, set_active=True, use_safetensors=case.safe
    )
    activate(part)
    off = difference(compute(model.eval(), base), expected)
    if not off <= RELOADED:
        raise RuntimeError(f"{name} differs by {off:.2g} when loaded again")


def make_case(name: str, case: Case, cases: Path) -> None:
    """Train, save and check one adapter."""
    base = (BASES | BASES_OF_PEFT)[case.base]
    folder = clean_folder(cases / name)
    torch.manual_seed(0)
    model, part = attach(make(base), case)
    part.add_adapter(NAME, config=case.config)
    activate(part)
    train_all(name, part, case)
    if case.legacy:
        scalings_of_old(part)
    expected = compute(model.eval(), base)
    save(part, case, folder / "adapter")
    if not case.reason:
        check_reloaded(name, case, base, expected, folder / "adapter")
    facts = CaseFacts(
        name=name,
        base=case.base,
        library=LIBRARY,
        exercises=case.exercises,
        adapter_name=NAME,
        reason=case.reason,
    )
    write_case(facts, base, expected, cases)


def main() -> None:
    """Write all bases and cases."""
    chosen = arguments("Write cases of adapters that AdapterHub's adapters saved.")
    for name, base in BASES.items():
        if chosen.only in name and not chosen.keep_bases:
            write_base(name, base, chosen.folder)
    for name, case in (BOTTLENECKS | LORA_FAMILY | REFUSED).items():
        if chosen.only in (full_name := f"ah_{name}"):
            make_case(full_name, case, chosen.folder)


if __name__ == "__main__":
    main()
