"""What releases of transformers, and tools, renamed: the names of modules on both sides.

A checkpoint has the names of the release that trained it, and a graph those of the release
that exported it. transformers renames the keys of a whole model when it loads them (the tables
here are those of its `conversion_mapping.py`). For example a module of LLaVA was

    language_model.model.layers.0.self_attn.q_proj        before 4.52
    model.language_model.layers.0.self_attn.q_proj        since
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Pairs = tuple[tuple[str, str], ...]
"""Words of paths, and what they became; `#` stands for a number."""

_TOWERS = (
    *("vision_tower", "audio_tower", "image_tower", "video_tower", "vision_model", "vqmodel"),
    *("multi_modal_projector", "vision_embed_tokens", "acoustic_tokenizer_encoder"),
    "semantic_tokenizer_encoder",
)
_INTO_MODEL: Pairs = tuple((name, f"model.{name}") for name in _TOWERS)

LLAVA: Pairs = (
    ("language_model.model", "model.language_model"),
    ("language_model.lm_head", "lm_head"),
    *_INTO_MODEL,
)
"""4.52: LLaVA, Gemma 3, PaliGemma, InternVL, Mllama, Mistral 3, Aya, Fuyu, VipLLaVA, ...; 5.x:
Qwen2-Audio, Voxtral and others with an `audio_tower`."""

QWEN_VL: Pairs = (
    ("model", "model.language_model"),
    ("visual", "model.visual"),
    ("audio_tower", "model.audio_tower"),
)
"""4.52: Qwen2-VL, Qwen2.5-VL; 5.x: the thinker of Qwen Omni."""

EMU3: Pairs = (
    ("text_model.model", "model.text_model"),
    ("text_model.lm_head", "lm_head"),
    *_INTO_MODEL,
)
"""4.52."""

TOWERS: Pairs = tuple((f"{name}.vision_model", name) for name in _TOWERS if "tower" in name)
"""5.0: CLIP's and SigLIP's vision models, alone or inside others."""

VIT: Pairs = (
    ("encoder.layer.#.attention.attention.query", "layers.#.attention.q_proj"),
    ("encoder.layer.#.attention.attention.key", "layers.#.attention.k_proj"),
    ("encoder.layer.#.attention.attention.value", "layers.#.attention.v_proj"),
    ("encoder.layer.#.attention.output.dense", "layers.#.attention.o_proj"),
    ("encoder.layer.#.intermediate.dense", "layers.#.mlp.fc1"),
    ("encoder.layer.#.output.dense", "layers.#.mlp.fc2"),
    ("encoder.layer.#", "layers.#"),
)
"""5.0: ViT, BEiT, DeiT, AST, ViT-MAE, ViT-MSN, I-JEPA, ViViT."""

DINO: Pairs = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("mlp.weights_out", "mlp.down_proj"),
)
"""5.0: DINOv2."""

SEGFORMER: Pairs = tuple(
    (f"encoder.block.#.#.{old}", f"stages.#.blocks.#.{new}")
    for old, new in (
        ("attention.self.query", "attention.q_proj"),
        ("attention.self.key", "attention.k_proj"),
        ("attention.self.value", "attention.v_proj"),
        ("attention.self.sr", "attention.sequence_reduction.sequence_reduction"),
        ("attention.output.dense", "attention.o_proj"),
        ("mlp.dense1", "mlp.fc1"),
        ("mlp.dense2", "mlp.fc2"),
    )
)
"""5.0."""

NEOX: Pairs = (("embed_out", "lm_head"),)
"""5.0: GPT-NeoX."""

GENAI: Pairs = (("self_attn", "attn"),)
"""What the builder of onnxruntime-genai calls attentions."""

WRAPPED: Pairs = (("module", ""),)
"""What DistributedDataParallel puts before the modules of a part that it wraps."""


@dataclass(frozen=True, slots=True)
class Naming:
    """One way to rename all modules of a checkpoint.

    Attributes:
        steps: What was renamed, release by release.
        newer: Whether the graph has the newer names.
    """

    steps: tuple[Pairs, ...] = ()
    newer: bool = True

    def renamed(self, path: str) -> str:
        """A module's path as it is in the other release."""
        for pairs in self.steps if self.newer else reversed(self.steps):
            path = _renamed(path, [pair if self.newer else pair[::-1] for pair in pairs])
        return path


_SCHEMES: tuple[tuple[Pairs, ...], ...] = (
    *((VIT,), (GENAI,), (LLAVA,), (TOWERS,), (LLAVA, TOWERS), (QWEN_VL,), (EMU3,), (DINO,)),
    *((SEGFORMER,), (NEOX,), (WRAPPED,)),
)

NAMINGS = (
    Naming(),
    *(Naming(steps, newer) for steps in _SCHEMES for newer in (True, False)),
)
"""All namings that are tried, the likeliest first."""


def _renamed(path: str, pairs: Sequence[tuple[str, ...]]) -> str:
    """Replace the words of a path that a pair renames; the longest that fit, once.

    If those are names that a pair ends with, the path has been renamed already. For example
    `model` became `model.language_model`, and `model.language_model.layers.0` stays as it is.
    """
    words = path.split(".")
    fitting = [
        (-len(side.split(".")), at, turn, old, new)
        for old, new in pairs
        for turn, side in enumerate((old, new))
        if side and (at := _find(words, side.split("."))) is not None
    ]
    if not fitting:
        return path
    negative, at, turn, _, new = min(fitting)
    if turn:
        return path
    there = words[at : at - negative]
    numbers = iter([word for word in there if word.isdigit()])
    instead = [next(numbers) if word == "#" else word for word in new.split(".") if word]
    return ".".join([*words[:at], *instead, *words[at - negative :]])


def _find(words: Sequence[str], part: Sequence[str]) -> int | None:
    """Where words occur in others, one after the other; None if they do not."""
    return next(
        (
            i
            for i in range(len(words) - len(part) + 1)
            if all(
                word == theirs or (theirs == "#" and word.isdigit())
                for word, theirs in zip(words[i : i + len(part)], part, strict=True)
            )
        ),
        None,
    )
