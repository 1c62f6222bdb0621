"""Write cases of adapters that PEFT saved to ``tests/cases/``.

What the files are is told in ``case_making.py``. To make the environment and run the
script, from the root of the repository::

    python -m venv /tmp/peft
    /tmp/peft/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2
    /tmp/peft/bin/pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
    PYTHONHASHSEED=0 /tmp/peft/bin/python tools/make_peft_cases.py

``--only NAME`` writes the bases and cases with ``NAME`` in their names; with
``--keep-bases`` the bases are left as they are.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from case_making import (
    LOGITS,
    SEQUENCE,
    TOKEN_LOGITS,
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
)
from export_fixtures import (
    BATCH_AXES,
    TEXT_AXES,
    VOCABULARY,
    Positional,
    Repeated,
    bert_inputs,
    build_bert,
    build_gpt2,
    build_llama,
    build_vit,
    image_inputs,
    text_inputs,
)
from torch import nn

LIBRARY = f"peft {peft.__version__}"
RELOADED = 1e-6


class InModel(nn.Module):
    """A wrapper whose attribute has the name that Llama's body has too.

    Attributes:
        model: The model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap ``model``."""
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[batch, sequence, vocabulary]``."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


class ConvNet(nn.Module):
    """Convolutions of several strides, paddings, dilations and groups, without BatchNorm.

    Attributes:
        features: The convolutions.
        head: A Linear on a 2-D tensor.
    """

    def __init__(self, dilation: int = 2) -> None:
        """Make the modules, the second convolution with ``dilation``."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=(2, 1)),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding="same", dilation=dilation, bias=False),
            nn.GELU(),
            nn.Conv2d(8, 12, (1, 3), stride=(1, 2), groups=2),
            nn.Tanh(),
            nn.Conv2d(12, 6, 1),
        )
        self.head = nn.Linear(6, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[batch, 3]`` of an image ``[batch, 3, height, width]``."""
        return self.head(self.features(image).mean(dim=(2, 3)))


class Branches(nn.Module):
    """Layers that read one tensor side by side, and convolutions of one to three dimensions.

    Attributes:
        left: A Conv2d on the image.
        right: Another on the image.
        volume: A Conv3d with groups.
        signal: A Conv1d.
        grouped: A Conv1d with groups on the same tensor.
        one: A Linear.
        two: Another on the same tensor.
        head: A Linear that makes the logits.
    """

    def __init__(self) -> None:
        """Make the modules."""
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(3, 8, 1, bias=False)
        self.volume = nn.Conv3d(2, 4, (3, 1, 1), padding=(1, 0, 0), groups=2)
        self.signal = nn.Conv1d(16, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv1d(16, 8, 5, stride=2, padding=2, groups=4)
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[batch, 3]`` of an image ``[batch, 3, height, width]``."""
        image = torch.tanh(self.left(image) + self.right(image)).unflatten(1, (2, 4))
        signal = 2 * self.volume(image).flatten(1, 2).flatten(2)
        states = (self.signal(signal) + self.grouped(signal)).amax(dim=-1)
        return self.head(self.one(states) * torch.tanh(self.two(states)))


class Embedded(nn.Module):
    """A base BERT, so that an adapter trained in a classifier meets a headless model.

    Attributes:
        bert: The model without a head.
    """

    def __init__(self) -> None:
        """Make the model."""
        super().__init__()
        self.bert = build_bert().bert

    def forward(self, **inputs: torch.Tensor) -> Any:
        """Return what the model returns."""
        return self.bert(**inputs)


def headless(model: nn.Module) -> nn.Module:
    """Return the BERT inside a model."""
    return model.bert


def build_albert() -> nn.Module:
    """Return an ALBERT classifier, which runs one layer three times."""
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.AlbertForSequenceClassification(config)


def build_gemma() -> nn.Module:
    """Return a Gemma with one layer, whose norms multiply by one plus their weight."""
    config = transformers.GemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=16,
        use_cache=False,
    )
    return transformers.GemmaForCausalLM(config)


def build_undilated() -> nn.Module:
    """Return a ``ConvNet`` that ONNX Runtime can run when TorchScript exported it."""
    return ConvNet(dilation=1)


TEXT = (text_inputs, TEXT_AXES, TOKEN_LOGITS)
BERT = (bert_inputs, TEXT_AXES, LOGITS)
VIT = (image_inputs("pixel_values", 16), BATCH_AXES, LOGITS)
IMAGE = (image_inputs("image", 11), BATCH_AXES, LOGITS)

BASES = {
    "bert_dynamo": Base(build_bert, *BERT),
    "bert_torchscript": Base(build_bert, *BERT, "torchscript"),
    "bert_wrapped": Base(
        build_bert, text_inputs, TEXT_AXES, LOGITS, "torchscript", Positional
    ),
    "albert_dynamo": Base(build_albert, *BERT),
    "albert_torchscript": Base(build_albert, *BERT, "torchscript"),
    "bert_headless": Base(Embedded, bert_inputs, TEXT_AXES, SEQUENCE, "dynamo", headless),
    "bert_float16": Base(build_bert, *BERT, dtype=torch.float16, tolerance=2e-2),
    "gpt2_dynamo": Base(build_gpt2, *TEXT),
    "gpt2_torchscript": Base(build_gpt2, *TEXT, "torchscript", Positional),
    "llama_dynamo": Base(build_llama, *TEXT),
    "llama_torchscript": Base(build_llama, *TEXT, "torchscript", InModel),
    "gemma_dynamo": Base(build_gemma, *TEXT),
    "vit_dynamo": Base(build_vit, *VIT),
    "vit_torchscript": Base(build_vit, *VIT, "torchscript"),
    "convnet_dynamo": Base(ConvNet, *IMAGE),
    "convnet_torchscript": Base(build_undilated, *IMAGE, "torchscript"),
    "branches_dynamo": Base(Branches, image_inputs("image", 6), BATCH_AXES, LOGITS),
    "branches_torchscript": Base(
        Branches, image_inputs("image", 6), BATCH_AXES, LOGITS, "torchscript"
    ),
    "repeated_dynamo": Base(Repeated, image_inputs("image", 4), BATCH_AXES, LOGITS),
    "repeated_unoptimized": Base(
        Repeated, image_inputs("image", 4), BATCH_AXES, LOGITS, "dynamo-unoptimized"
    ),
    "repeated_torchscript": Base(
        Repeated, image_inputs("image", 4), BATCH_AXES, LOGITS, "torchscript"
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """An adapter to train and save.

    Attributes:
        base: Name of the base.
        config: Configuration of PEFT.
        exercises: What this case has that others have not.
        reason: Why the adapter must be refused, or nothing if it is supported.
        std: Standard deviation of the trained weights.
        safe: Whether to save as safetensors.
        adapter_name: Name of the adapter; PEFT saves all but ``default`` in a sub-folder.
        part: Attribute of the model that is trained, or nothing for all of it.
        change: What is done to the adapter after training, or nothing.
        converted: Whether PEFT converts it to one of the base as it was before training.
    """

    base: str
    config: peft.PeftConfig
    exercises: str
    reason: str = ""
    std: float = 0.3
    safe: bool = True
    adapter_name: str = "default"
    part: str = ""
    change: Callable[[peft.PeftModel], None] | None = None
    converted: bool = False


def prune(adapted: peft.PeftModel) -> None:
    """Prune an AdaLoRA as its training does, to another rank in each module."""
    config = adapted.peft_config["default"]
    names = [name for name, _ in adapted.model.named_parameters() if "lora_E" in name]
    config.rank_pattern = {
        name: [number >= i % 5 for number in range(4)] for i, name in enumerate(names)
    }
    adapted.base_model.resize_modules_by_rank_pattern(config.rank_pattern, "default")


def lora(*targets: str, **fields: Any) -> peft.LoraConfig:
    """Return a configuration of LoRA with rank 4 and alpha 8 unless told otherwise."""
    chosen = targets[0] if targets == ("all-linear",) else list(targets)
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": chosen or None} | fields
    )


def ia3(*targets: str, feedforward: tuple[str, ...] = (), **fields: Any) -> peft.IA3Config:
    """Return a configuration of IA3."""
    return peft.IA3Config(
        target_modules=list(targets), feedforward_modules=list(feedforward), **fields
    )


QV = ("query", "value")
LLAMA_QV = ("q_proj", "v_proj")
GPT2_ALL = ("c_attn", "c_proj", "c_fc")

SUPPORTED = {
    "albert_lora": Case(
        "albert_dynamo",
        lora("query", "value", "ffn", "ffn_output"),
        "LoRA of the layer that ALBERT runs three times",
    ),
    "albert_dora_ts": Case(
        "albert_torchscript",
        lora("query", "ffn_output", use_dora=True),
        "DoRA of the layer that ALBERT runs three times, TorchScript",
    ),
    "bert_lora_patterns": Case(
        "bert_dynamo",
        lora(
            *("query", "key", "dense"),
            rank_pattern={r"encoder\.layer\.0\.attention\.self\.query": 2, "key": 6},
            alpha_pattern={r"layer\.\d+\.output\.dense": 20, "pooler.dense": 3, "key": 1},
        ),
        "rank_pattern and alpha_pattern with regular expressions; the pooler too",
    ),
    "bert_lora_rslora_patterns": Case(
        "bert_torchscript",
        lora(
            *("query", "dense"),
            use_rslora=True,
            rank_pattern={"dense": 9},
            alpha_pattern={"attention.output.dense": 2},
            layers_to_transform=[1],
        ),
        "rsLoRA with rank_pattern and alpha_pattern; only the second layer; .bin",
        safe=False,
        std=0.5,
    ),
    "bert_lora_bias": Case(
        "bert_dynamo",
        lora("query", "intermediate.dense", lora_bias=True),
        "lora_bias: a bias inside the scaling",
    ),
    "bert_lora_bias_all": Case(
        "bert_torchscript",
        lora(*QV, bias="all", modules_to_save=["classifier"]),
        "bias='all' replaces every bias; the classifier's original_module is saved too",
        std=0.2,
    ),
    "bert_lora_bias_lora_only": Case(
        "bert_dynamo",
        lora(*QV, "output.dense", bias="lora_only"),
        "bias='lora_only' replaces the biases of the adapted modules",
    ),
    "bert_lora_embedding": Case(
        "bert_dynamo",
        lora("word_embeddings", "position_embeddings", "query"),
        "LoRA of embeddings: lora_embedding_A and lora_embedding_B; .bin",
        safe=False,
    ),
    "bert_lora_all_linear": Case(
        "bert_dynamo",
        lora("all-linear", task_type="SEQ_CLS"),
        "all-linear, with the pooler; the classifier is replaced",
        std=0.2,
    ),
    "bert_lora_wrapped": Case(
        "bert_wrapped",
        lora(*QV, task_type="SEQ_CLS"),
        "the base was exported inside a wrapper: bert... against inner.bert...",
    ),
    "bert_lora_on_headless": Case(
        "bert_headless",
        lora(*QV, "output.dense"),
        "keys with bert. on a base exported from BertModel; its LayerNorm is an output",
    ),
    "bert_lora_from_headless": Case(
        "bert_dynamo",
        lora(*QV, "output.dense", task_type="FEATURE_EXTRACTION"),
        "keys without bert. (trained on BertModel) on a base that has it",
        part="bert",
    ),
    "bert_lora_named": Case(
        "bert_torchscript",
        lora("key", "value", lora_alpha=5),
        "an adapter that is not called default is saved in a sub-folder",
        adapter_name="summary",
    ),
    "bert_lora_float16": Case(
        "bert_float16",
        lora(*QV, "output.dense"),
        "float16 base; the tensors of the adapter are float32",
    ),
    "bert_dora": Case(
        "bert_dynamo",
        lora(*QV, "output.dense", use_dora=True, lora_alpha=6),
        "DoRA with biases that are not scaled",
    ),
    "bert_dora_rslora_ts": Case(
        "bert_torchscript",
        lora("query", "pooler.dense", use_dora=True, use_rslora=True, task_type="SEQ_CLS"),
        "DoRA with rsLoRA, TorchScript, also of a Linear on a 2-D tensor",
    ),
    "bert_dora_embedding": Case(
        "bert_dynamo",
        lora("word_embeddings", "value", use_dora=True),
        "DoRA of an embedding: the magnitude has the size of the embedding",
    ),
    "bert_token_indices": Case(
        "bert_dynamo",
        lora(*QV, trainable_token_indices={"word_embeddings": [3, 5]}),
        "LoRA with trainable_token_indices of one embedding by name",
    ),
    "gpt2_tokens": Case(
        "gpt2_dynamo",
        peft.TrainableTokensConfig(token_indices=[31, 4, 57]),
        "TRAINABLE_TOKENS; the head has the embedding's weight and follows",
    ),
    "gpt2_token_indices_ts": Case(
        "gpt2_torchscript",
        lora("c_attn", fan_in_fan_out=True, trainable_token_indices=[9, 2]),
        "trainable_token_indices as a list, with a tied head, TorchScript",
    ),
    "gpt2_token_indices_apart": Case(
        "gpt2_dynamo",
        lora(
            *("c_attn",),
            fan_in_fan_out=True,
            trainable_token_indices={"wte": [9, 2], "lm_head": [5]},
        ),
        "other tokens of the embedding than of the head, which is tied in the base only",
    ),
    "bert_ia3": Case(
        "bert_torchscript",
        ia3("key", "value", "output.dense", feedforward=("output.dense",)),
        "IA3; output.dense also matches attention.output.dense",
    ),
    "bert_ia3_output": Case(
        "bert_dynamo",
        ia3("query", "intermediate.dense", "output.dense", task_type="SEQ_CLS"),
        "IA3 without feedforward modules; classifier replaced; .bin",
        safe=False,
    ),
    "gpt2_lora": Case(
        "gpt2_dynamo",
        lora(*GPT2_ALL, fan_in_fan_out=True, task_type="CAUSAL_LM"),
        "LoRA of Conv1D: c_attn, both c_proj and c_fc",
        std=0.15,
    ),
    "gpt2_lora_ts": Case(
        "gpt2_torchscript",
        lora(*GPT2_ALL, fan_in_fan_out=True, lora_alpha=3),
        "LoRA of Conv1D in a wrapper, TorchScript",
    ),
    "gpt2_lora_embedding": Case(
        "gpt2_dynamo",
        lora("wte", "c_attn", fan_in_fan_out=True),
        "LoRA of an embedding whose weight the head shares; the head keeps the base's",
        std=0.2,
    ),
    "gpt2_dora": Case(
        "gpt2_dynamo",
        lora(*GPT2_ALL, fan_in_fan_out=True, use_dora=True, lora_alpha=4),
        "DoRA of Conv1D",
        std=0.15,
    ),
    "gpt2_ia3": Case(
        "gpt2_dynamo",
        ia3("c_attn", "mlp.c_proj", feedforward=("mlp.c_proj",), fan_in_fan_out=True),
        "IA3 of Conv1D, feedforward",
    ),
    "gpt2_ia3_ts": Case(
        "gpt2_torchscript",
        ia3("c_attn", "c_fc", "c_proj", fan_in_fan_out=True),
        "IA3 of Conv1D, outputs only, TorchScript",
    ),
    "llama_lora_all_linear": Case(
        "llama_dynamo",
        lora("all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        "LoRA of all Linears without bias; lm_head replaced",
        std=0.15,
    ),
    "llama_lora_ts": Case(
        "llama_torchscript",
        lora(*LLAMA_QV, "o_proj", "gate_proj", use_rslora=True),
        "LoRA in a wrapper whose attribute is called model, as Llama's own",
        std=0.2,
    ),
    "llama_lora_embedding_norm": Case(
        "llama_dynamo",
        lora("embed_tokens", "up_proj", modules_to_save=["norm"]),
        "embed_tokens.base_layer.weight is saved too; 'norm' replaces every RMSNorm",
        std=0.2,
    ),
    "llama_dora": Case(
        "llama_dynamo",
        lora(*LLAMA_QV, "down_proj", use_dora=True),
        "DoRA of Linears without bias",
    ),
    "llama_ia3": Case(
        "llama_dynamo",
        ia3("k_proj", "v_proj", "down_proj", feedforward=("down_proj",)),
        "IA3 of Linears without bias",
    ),
    "gemma_norms": Case(
        "gemma_dynamo",
        lora(*LLAMA_QV, modules_to_save=["norm"]),
        "every RMSNorm replaced; the graph has 1 + weight",
    ),
    "vit_lora": Case(
        "vit_dynamo",
        lora(*LLAMA_QV, "projection", modules_to_save=["classifier"]),
        "LoRA of q_proj, v_proj and the convolution of the patches; classifier replaced",
    ),
    "vit_lora_ts": Case(
        "vit_torchscript",
        lora("o_proj", "fc1", "fc2", bias="all"),
        "LoRA of ViT, TorchScript; every bias replaced, also that of the convolution",
        std=0.2,
    ),
    "convnet_lora": Case(
        "convnet_dynamo",
        lora("features.0", "features.6", "head", lora_alpha=6),
        "LoRA of Conv2d with stride and padding",
        std=0.45,
    ),
    "convnet_ia3": Case(
        "convnet_dynamo",
        ia3(
            "features.0", "features.2", "features.6", feedforward=("features.2", "features.6")
        ),
        "IA3 on convolutions, two of them on the input",
        std=0.6,
    ),
    "convnet_lora_ts": Case(
        "convnet_torchscript",
        lora("features.0", "features.2", "head", use_rslora=True, lora_bias=True),
        "LoRA of Conv2d with lora_bias, TorchScript; one Conv has auto_pad",
    ),
    "convnet_lora_dilated": Case(
        "convnet_dynamo",
        lora("features.2"),
        "LoRA of a Conv2d with padding='same' and dilation: A is not dilated in PEFT",
        std=0.45,
    ),
    "convnet_lora_groups": Case(
        "convnet_dynamo",
        lora("features.4", r=4),
        "LoRA of a Conv2d with groups: B has these groups, A has none",
        std=1.2,
    ),
    "convnet_dora": Case(
        "convnet_dynamo",
        lora("features.0", "features.6", use_dora=True),
        "DoRA of Conv2d",
    ),
    "branches_lora": Case(
        "branches_dynamo",
        lora("left", "volume", "signal", "grouped", "two"),
        "LoRA of Conv1d and Conv3d, with groups and strides",
        std=0.6,
    ),
    "branches_lora_ts": Case(
        "branches_torchscript",
        lora("volume", "signal", "grouped", use_rslora=True, bias="lora_only"),
        "LoRA of Conv1d and Conv3d with groups, TorchScript; their biases replaced",
        std=0.6,
    ),
    "branches_dora": Case(
        "branches_torchscript",
        lora("left", "signal", "one", use_dora=True),
        "DoRA of Conv1d and Conv2d",
        std=0.5,
    ),
    "branches_ia3": Case(
        "branches_dynamo",
        ia3("right", "volume", "two", "one", feedforward=("right", "volume", "two")),
        "IA3 on inputs that other layers read too, one of them the input of the model",
        std=0.6,
    ),
    "llama_ia3_inputs": Case(
        "llama_dynamo",
        ia3(
            *("q_proj", "k_proj", "v_proj", "up_proj"),
            feedforward=("q_proj", "v_proj", "up_proj"),
        ),
        "IA3 on the inputs of q_proj and v_proj, each with a vector of its own",
    ),
    "repeated_ia3": Case(
        "repeated_torchscript",
        ia3("shared", "project", "head", feedforward=("shared", "head")),
        "IA3 on the input of a Linear that is called twice",
    ),
    "repeated_lora": Case(
        "repeated_dynamo",
        lora("project", "shared", "pooled", "blocks.1.1", "head"),
        "LoRA of a Linear that is called twice, and of modules of a Sequential",
        std=0.35,
    ),
    "repeated_lora_ts": Case(
        "repeated_torchscript",
        lora("project", "shared", "pooled", "blocks.1.1", "head", bias="lora_only"),
        "LoRA of a Linear that is called twice, TorchScript; its bias replaced",
        std=0.35,
    ),
    "bert_adalora": Case(
        "bert_dynamo",
        peft.AdaLoraConfig(target_modules=list(QV), init_r=4, target_r=2, total_step=10),
        "AdaLoRA, before anything was pruned",
        std=0.6,
    ),
    "llama_adalora_pruned": Case(
        "llama_torchscript",
        peft.AdaLoraConfig(
            target_modules=[*LLAMA_QV, "down_proj"], init_r=4, total_step=10, lora_alpha=6
        ),
        "AdaLoRA, pruned to another rank in each module, in one of them to nothing",
        std=0.8,
        change=prune,
    ),
    "bert_loha": Case(
        "bert_dynamo",
        peft.LoHaConfig(r=3, alpha=6, target_modules=[*QV, "intermediate.dense"]),
        "LoHa, whose rank is the square of r",
        std=0.5,
    ),
    "convnet_loha": Case(
        "convnet_dynamo",
        peft.LoHaConfig(
            r=2,
            alpha=4,
            target_modules=["features.0", "features.2", "features.4", "head"],
            use_effective_conv2d=True,
        ),
        "LoHa of convolutions: with hada_t1, dilated, and with groups",
        std=0.9,
    ),
    "convnet_adalora": Case(
        "convnet_dynamo",
        peft.AdaLoraConfig(
            target_modules=["features.0", "features.2", "head"], init_r=3, total_step=10
        ),
        "AdaLoRA of convolutions, whose A has a flattened kernel, one of them dilated",
        std=0.9,
    ),
    "bert_vera": Case(
        "bert_dynamo",
        peft.VeraConfig(r=4, target_modules=["query", "intermediate.dense", "output.dense"]),
        "VeRA: layers of several sizes share two matrices",
        std=1.0,
    ),
    "llama_vera": Case(
        "llama_dynamo",
        peft.VeraConfig(r=4, target_modules=["q_proj"]),
        "VeRA of Linears without bias",
        std=1.0,
    ),
    "gpt2_pvera": Case(
        "gpt2_dynamo",
        peft.PveraConfig(r=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        "PVeRA of Conv1D: inference takes the mean",
        std=1.0,
    ),
    "llama_miss": Case(
        "llama_dynamo",
        peft.MissConfig(r=5, target_modules=[*LLAMA_QV, "down_proj"]),
        "MiSS whose groups do not divide the input",
        std=0.1,
    ),
    "bert_miss_mini": Case(
        "bert_torchscript",
        peft.MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=list(QV)),
        "MiSS with init_weights mini: the block is repeated",
        std=0.1,
    ),
    "llama_vblora": Case(
        "llama_dynamo",
        peft.VBLoRAConfig(
            r=3, num_vectors=20, vector_length=8, topk=2, target_modules=[*LLAMA_QV, "up_proj"]
        ),
        "VB-LoRA: A and B are mixed from a bank of vectors",
        std=0.5,
    ),
    "bert_vblora_topk": Case(
        "bert_torchscript",
        peft.VBLoRAConfig(
            r=3,
            num_vectors=20,
            vector_length=8,
            topk=3,
            target_modules=["query", "intermediate.dense"],
            save_only_topk_weights=True,
        ),
        "VB-LoRA with save_only_topk_weights",
        std=0.5,
    ),
    "bert_delora": Case(
        "bert_torchscript",
        peft.DeloraConfig(
            r=4, target_modules=["query", "output.dense"], rank_pattern={"query": 2}
        ),
        "DeLoRA with a rank pattern: the norms of the base's columns are in the file",
        std=0.8,
    ),
    "llama_gralora": Case(
        "llama_dynamo",
        peft.GraloraConfig(
            r=4, alpha=6, gralora_k=2, hybrid_r=2, target_modules=[*LLAMA_QV, "down_proj"]
        ),
        "GraLoRA in four blocks, with a LoRA of the whole weight beside them",
    ),
    "bert_beft": Case(
        "bert_dynamo",
        peft.BeftConfig(target_modules=["value", "output.dense"]),
        "BEFT of Linears that have a bias",
    ),
    "llama_beft": Case(
        "llama_torchscript",
        peft.BeftConfig(target_modules=["v_proj", "down_proj"]),
        "BEFT of Linears without bias",
    ),
    "bert_ln_tuning": Case(
        "bert_dynamo",
        peft.LNTuningConfig(target_modules=["LayerNorm"]),
        "LN tuning: weight and bias of every LayerNorm",
    ),
    "llama_ln_tuning": Case(
        "llama_torchscript",
        peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
        "LN tuning of RMSNorms, which have no bias",
    ),
    "llama_unilora": Case(
        "llama_dynamo",
        peft.UniLoraConfig(
            r=3, theta_d_length=50, target_modules=[*LLAMA_QV, "up_proj"], save_indices=True
        ),
        "Uni-LoRA: the numbers of A and B are of one vector",
        std=2.0,
    ),
    "bert_tinylora": Case(
        "bert_dynamo",
        peft.TinyLoraConfig(
            r=3, u=6, weight_tying=1.0, target_modules=["query", "output.dense"]
        ),
        "TinyLoRA whose modules share one vector",
        std=0.8,
    ),
    "bert_olora_converted": Case(
        "bert_dynamo",
        lora(*QV, init_lora_weights="olora"),
        "OLoRA that PEFT converted: a plain LoRA of twice the rank",
        converted=True,
    ),
    "bert_pissa": Case(
        "bert_dynamo",
        lora(*QV, init_lora_weights="pissa"),
        "PiSSA that was not converted: its singular values are taken from the base",
    ),
    "llama_olora": Case(
        "llama_dynamo",
        lora(*LLAMA_QV, init_lora_weights="olora", lora_alpha=6),
        "OLoRA that was not converted: a part of a QR decomposition is taken from the base",
    ),
    "llama_kasa": Case(
        "llama_dynamo",
        lora(*LLAMA_QV, kasa_config=peft.KasaConfig()),
        "KaSA: the base loses its smallest singular values",
    ),
    "bert_deft": Case(
        "bert_torchscript",
        peft.DeftConfig(r=4, target_modules=["query", "output.dense"]),
        "DEFT: a part of the outputs is taken away, and another put in its place",
    ),
    "llama_supertuning": Case(
        "llama_torchscript",
        peft.SupertuningConfig(
            sparsity=0.9, r=2, lora_alpha=4, target_modules=[*LLAMA_QV, "down_proj"]
        ),
        "Super-Tuning with a LoRA beside the sparse values",
    ),
    "llama_mica": Case(
        "llama_dynamo",
        lora(*LLAMA_QV, init_lora_weights="mica"),
        "MiCA: B is of the base's minor singular vectors; the base is untouched",
    ),
    "llama_orthogonal": Case(
        "llama_dynamo",
        lora(*LLAMA_QV, init_lora_weights="orthogonal", r=4),
        "LoRA that starts from orthogonal matrices; the base is untouched",
    ),
    "bert_bdlora": Case(
        "bert_dynamo",
        lora(
            *(*QV, "key"),
            use_bdlora=peft.BdLoraConfig(
                target_modules_bd_a=["query"],
                target_modules_bd_b=["value"],
                nblocks=2,
                match_strict=False,
            ),
        ),
        "BD-LoRA: A of one module and B of another are block-diagonal",
    ),
    "llama_velora": Case(
        "llama_dynamo",
        lora(*LLAMA_QV, velora_config=peft.VeloraConfig()),
        "VeLoRA, which only changes the training",
    ),
    "llama_monteclora": Case(
        "llama_dynamo",
        lora(*LLAMA_QV, monteclora_config=peft.MontecloraConfig(num_samples=2, buffer_size=2)),
        "MonteCLoRA, which samples in training only",
    ),
    "repeated_lora_unoptimized": Case(
        "repeated_unoptimized",
        lora("features.0", "features.3", "project", "shared", "pooled", "blocks.0.1"),
        "dynamo with optimize=False: Transpose before MatMul, Conv and BatchNorm apart",
    ),
}

REFUSED = {
    "llama_prompt": Case(
        "llama_dynamo",
        peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        "PROMPT_TUNING",
        "PROMPT_TUNING is the first past of a decoder",
    ),
    "llama_prefix": Case(
        "llama_dynamo",
        peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        "PREFIX_TUNING",
        "PREFIX_TUNING is the first past of a decoder",
    ),
    "llama_layer_replication": Case(
        "llama_dynamo",
        lora(*LLAMA_QV, layer_replication=[(0, 2), (1, 2)]),
        "layer_replication",
        "layers of the base are repeated",
    ),
}


def attach(model: nn.Module, case: Case) -> tuple[nn.Module, peft.PeftModel]:
    """Add the case's adapter, and return the whole model and the part PEFT wrapped."""
    if not case.part:
        adapted = peft.get_peft_model(model, case.config, adapter_name=case.adapter_name)
        return adapted, adapted
    part = getattr(model, case.part)
    adapted = peft.get_peft_model(part, case.config, adapter_name=case.adapter_name)
    setattr(model, case.part, adapted)
    return model, adapted


def train_all(name: str, adapted: peft.PeftModel, std: float) -> None:
    """Give every parameter that PEFT would train a random value."""
    for path, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            train(parameter, f"{name}:{path}", std)


def save(adapted: peft.PeftModel, case: Case, folder: Path, start: Path) -> Path:
    """Save the adapter without the model card, and return its own folder."""
    more = {"path_initial_model_for_weight_conversion": str(start)} if case.converted else {}
    adapted.save_pretrained(folder, safe_serialization=case.safe, **more)
    (folder / "README.md").unlink(missing_ok=True)
    return folder if case.adapter_name == "default" else folder / case.adapter_name


def check_reloaded(name: str, case: Case, expected: dict[str, Any], folder: Path) -> None:
    """Load what was saved into a fresh base and compare.

    Raises:
        RuntimeError: If the files do not hold all that was trained.
    """
    base = BASES[case.base]
    model = make(base)
    part = getattr(model, case.part) if case.part else model
    loaded = peft.PeftModel.from_pretrained(part, folder, adapter_name=case.adapter_name)
    if case.part:
        setattr(model, case.part, loaded)
    else:
        model = loaded
    off = difference(compute(model.eval(), base), expected)
    if not off <= RELOADED:
        raise RuntimeError(f"{name} differs by {off:.2g} when loaded again")


def make_case(name: str, case: Case, cases: Path) -> None:
    """Train, save and check one adapter."""
    base = BASES[case.base]
    folder = clean_folder(cases / name)
    model, adapted = attach(make(base), case)
    with tempfile.TemporaryDirectory() as start:
        if case.converted:
            case.config.init_lora_weights = True
            adapted.save_pretrained(start)
        train_all(name, adapted, case.std)
        if case.change:
            case.change(adapted)
        expected = compute(model.eval(), base)
        adapter = save(adapted, case, folder / "adapter", Path(start))
    if not case.reason:
        check_reloaded(name, case, expected, adapter)
    facts = CaseFacts(
        name=name,
        base=case.base,
        library=LIBRARY,
        exercises=case.exercises,
        adapter_name=case.adapter_name,
        reason=case.reason,
        adapter=adapter.relative_to(folder).as_posix(),
    )
    write_case(facts, base, expected, cases)


def selected(prefix: str, cases: dict[str, Case], part: str) -> dict[str, Case]:
    """Return the cases with ``part`` in their full names, by these names."""
    named = {f"{prefix}_{name}": case for name, case in cases.items()}
    return {name: case for name, case in named.items() if part in name}


def main() -> None:
    """Write all bases and cases."""
    chosen = arguments("Write cases of adapters that PEFT saved.")
    for name, base in BASES.items():
        if chosen.only in name and not chosen.keep_bases:
            write_base(name, base, chosen.folder)
    for name, case in selected("peft", SUPPORTED | REFUSED, chosen.only).items():
        make_case(name, case, chosen.folder)


if __name__ == "__main__":
    main()
