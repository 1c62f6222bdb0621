"""Which of AdapterHub's model types a graph is, and where that type has its adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from onnx_adapt.checkpoints.readers.adapterhub_places import places_of
from onnx_adapt.checkpoints.writers.wanted import Wanted
from onnx_adapt.errors import CheckpointError

_BERT_LORA = {
    "q": ".attention.self.query",
    "k": ".attention.self.key",
    "v": ".attention.self.value",
    "intermediate": ".intermediate.dense",
    "output": ".output.dense",
}
_OUT_PROJ = {"q": ".self_attn.q_proj", "k": ".self_attn.k_proj", "v": ".self_attn.v_proj"}
_LLAMA_LORA = {**_OUT_PROJ, "intermediate": ".mlp.down_proj", "output": ".mlp.up_proj"}
_BART_LORA = {
    **{letter: f".{letter}_proj" for letter in "qkv"},
    "intermediate": ".fc1",
    "output": ".fc2",
}

# What LoRA is on, by model type. Source: the library's calls of `LoRALinear.wrap`, which
# swap `intermediate` and `output` of Llama and Mistral.
_LORA = {
    **dict.fromkeys(("bert", "roberta", "electra"), _BERT_LORA),
    "vit": {
        **{k: v.replace(".self.", ".attention.") for k, v in _BERT_LORA.items()},
    },
    "distilbert": {
        **{letter: f".attention.{letter}_lin" for letter in "qkv"},
        "intermediate": ".ffn.lin1",
        "output": ".ffn.lin2",
    },
    "gpt2": {"qkv": ".attn.c_attn", "intermediate": ".mlp.c_fc", "output": ".mlp.c_proj"},
    "llama": _LLAMA_LORA,
    **dict.fromkeys(("bart", "mbart"), _BART_LORA),
    "clip": {**_OUT_PROJ, "intermediate": ".mlp.fc1", "output": ".mlp.fc2"},
}

_TELLS = (
    ("vit", r"(^|\.)vit\.|\.attention\.attention\.|patch_embeddings"),
    ("clip", r"(text|vision)_model\.encoder\.layers"),
    ("distilbert", r"\.attention\.(q|k|v|out)_lin$"),
    ("gpt2", r"\.attn\.c_(attn|proj)$"),
    ("llama", r"\.self_attn\.o_proj$"),
    ("bart", r"\.self_attn\.out_proj$"),
    ("roberta", r"(^|\.)roberta\."),
    ("electra", r"(^|\.)electra\."),
    ("bert", r"\.attention\.self\.(query|key|value)$"),
)
"""Paths of modules that only models of one type have, the first that fits counts.

Types whose modules have the same paths and the same adapters are one here: XLM-RoBERTa is
`roberta`, and Mistral `llama`."""

_POST_LN = ("bert", "roberta", "electra", "distilbert", "bart")


@dataclass(frozen=True, slots=True)
class ModelKind:
    """A model type of AdapterHub, and the modules of one model of it.

    Attributes:
        name: The type, as transformers calls it.
        modules: The paths of the graph's modules.
    """

    name: str
    modules: Sequence[str]

    @property
    def post_ln(self) -> bool:
        """Whether a LayerNorm follows the residual sum of a sub-layer."""
        return self.name in _POST_LN

    @property
    def layers(self) -> int:
        """The number of layers that can have adapters."""
        return len(self._numbers)

    @property
    def _numbers(self) -> dict[str, int]:
        """The layers by their paths, in the order in which the library counts them."""
        found = dict.fromkeys(path for m in self.modules if (path := _layer_path(m)))
        ordered = sorted(found, key=lambda path: ("decoder" in path, _number(path)))
        return {path: i for i, path in enumerate(ordered)}

    def layer(self, module: str) -> int | None:
        """The number of the layer that a module is in, or None."""
        return self._numbers.get(_layer_path(module))

    def is_inside(self, module: str) -> bool:
        """Whether a module is in a layer, so that it is no head."""
        return bool(_layer_path(module))

    def location(self, module: str) -> tuple[str, str] | None:
        """Where the bottleneck of a sub-layer is, and which setting switches it on.

        Args:
            module: The path of the sub-layer's output Linear.
        """
        table = places_of(self.name)
        fitting = [end for end, out in table.items() if module.endswith(out)]
        if not fitting:
            return None
        ending = max(fitting, key=lambda end: len(table[end]))
        path = module.removesuffix(table[ending]) + ending
        if "cross" in ending:
            return path, "cross_adapter"
        attends = "attention" in ending or path.endswith(".attention.output")
        return path, "mh_adapter" if attends else "output_adapter"

    def lora_key(self, module: str) -> str:
        """What AdapterHub calls LoRA on a module: `q`, `k`, `v`, `qkv`, ... or ''."""
        if module.endswith(".attention.output.dense"):
            return ""
        table = _LORA[self.name]
        return next((key for key, ending in table.items() if module.endswith(ending)), "")


_LAYER = re.compile(r"^(?:.*?\.)?(?:layers?|h)\.\d+(?=\.|$)")


def _layer_path(module: str) -> str:
    match = _LAYER.match(module)
    return match[0] if match else ""


def _number(path: str) -> int:
    return int(path.rpartition(".")[2])


def model_kind(wanted: Wanted) -> ModelKind:
    """Find out which of AdapterHub's model types a graph is.

    Raises:
        CheckpointError: If the paths of its modules do not tell.
    """
    paths = dict.fromkeys([*(item.edit.module for item in wanted.items), *wanted.modules])
    for name, tell in _TELLS:
        if any(re.search(tell, path) for path in paths):
            return ModelKind(name, list(paths))
    raise CheckpointError(
        "the paths of the graph's modules are of none of the model types that AdapterHub has: "
        + ", ".join(name for name, _ in _TELLS),
        hint="--map OLD=NEW gives them the names that transformers has",
    )
