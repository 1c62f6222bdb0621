"""Tell which part of a model a module's path names: its encoder, its vision tower, ...

The parts of one model often have layers of the same names, so a path that loses the name
of its part on the way into a graph may be found in another part. Words are those of
transformers 5 and diffusers, and of the wrappers that people write around them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import onnx

from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.index import text

_SAME = {
    "vision": (
        *("vision", "visual", "vision_model", "vision_tower", "vision_encoder"),
        *("image_encoder", "vision_backbone", "visual_encoder", "vision_embed_tokens"),
    ),
    "language": (
        *("language", "text", "language_model", "text_model", "text_encoder", "llm"),
        *("text_backbone", "language_backbone"),
    ),
    "audio": (
        *("audio", "audio_tower", "audio_model", "audio_encoder", "speech_encoder"),
        *("speech_model", "audio_backbone"),
    ),
}
"""One part under the names that models and wrappers give it."""

_FAMILY = {word: family for family, words in _SAME.items() for word in words}


def family_of(word: str) -> str:
    """The name of a part of a model, whatever models and wrappers call it.

    Example:
        >>> family_of("vision_tower"), family_of("vision_encoder"), family_of("decoder")
        ('vision', 'vision', 'decoder')
    """
    return _FAMILY.get(word, word)


_OTHERS = frozenset(
    [
        *("encoder", "decoder", "generator", "discriminator", "student", "teacher"),
        *("student_model", "teacher_model", "actor", "critic", "policy", "reward_model"),
        *("unet", "vae", "controlnet", "prior", "transformer", "backbone", "neck"),
        *("qformer", "thinker", "talker", "token2wav", "code2wav", "t2u_model", "vocoder"),
        *("semantic", "coarse_acoustics", "fine_acoustics"),
    ]
)
_COMPOSED = re.compile(r"\w+_(encoder|decoder|tower)")
_NUMBER = re.compile(r"_\d+$")

_WHOLE = {
    "transformer": ("h", "layer", "layers", "block", "blocks", "encoder", "wte", "wpe"),
    "backbone": ("layers", "embeddings", "norm_f"),
}
"""Words that name no part if one of these follows: GPT-2's only stack is `transformer.h`, and
Mamba's is `backbone.layers`. In diffusers `transformer` is a part, beside `vae`."""

_ENCODER_ONLY = frozenset(
    [
        *("albert", "bert", "beit", "camembert", "data2vec_audio", "data2vec_text", "deberta"),
        *("deit", "distilbert", "electra", "ernie", "esm", "hubert", "layoutlm", "longformer"),
        *("mpnet", "roberta", "vit", "wav2vec2", "wavlm", "xlm_roberta"),
    ]
)
"""Architectures that are one encoder, so that the word names no part of them."""


def architecture_of(paths: Iterable[str]) -> str:
    """The architecture that a word of some paths names, or ''.

    Example:
        >>> architecture_of(["bert.encoder.layer.0.output.dense"])
        'bert'
    """
    words = (word for path in paths for word in path.split("."))
    return next((word for word in words if word in _ENCODER_ONLY), "")


def parts_of(path: str, kind: str = "") -> dict[str, str]:
    """Find the parts that a path names, each with the path's own word for it.

    Args:
        path: A module's path, or the beginning of one.
        kind: The architecture of the model, if it is known.

    Example:
        >>> parts_of("model.vision_tower.encoder.layers.0")
        {'vision': 'vision_tower', 'encoder': 'encoder'}
        >>> parts_of("transformer.h.0.attn"), parts_of("bert.encoder.layer.0")
        ({}, {})
    """
    words = path.split(".")
    found: dict[str, str] = {}
    for before, word, after in zip([kind, *words], words, [*words[1:], ""], strict=False):
        plain = _NUMBER.sub("", word)
        if word in _FAMILY:
            found.setdefault(_FAMILY[word], word)
        elif after in _WHOLE.get(word, ()) or (word == "encoder" and before in _ENCODER_ONLY):
            continue
        elif plain in _OTHERS or plain in _FAMILY or _COMPOSED.fullmatch(plain):
            found.setdefault(word, word)
    return found


def part_of_path(module: str) -> str:
    """The beginning of a module's path that names its part of the model."""
    words = module.split(".")
    named = {*parts_of(module).values()}
    for i, word in enumerate(words):
        if word in named:
            return ".".join(words[: i + 1])
    numbers = [i for i, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: numbers[0]] if numbers and numbers[0] else words[:1])


_INPUTS = {
    "input_ids": ("language",),
    "inputs_embeds": ("language",),
    "pixel_values": ("vision", "encoder"),
    "input_features": ("audio", "encoder"),
    "input_values": ("audio", "encoder"),
}
"""The parts that a graph must be if it has one of these inputs."""

_CLASS_WORDS = {
    "Encoder": "encoder",
    "Decoder": "decoder",
    "Vision": "vision",
    "Text": "language",
    "Audio": "audio",
}
_CROSS_ATTENTION = frozenset(["encoder_attn", "EncDecAttention", "crossattention"])
"""What transformers calls the attention that only a decoder behind an encoder has."""


def is_cross_attention(module: str) -> bool:
    """Whether a module is of the attention that a decoder pays to what an encoder gave."""
    return not _CROSS_ATTENTION.isdisjoint(module.split("."))


_AXES = ({"encoder", "decoder"}, {"vision", "language", "audio"})
_CLASSES = "pkg.torch.onnx.class_hierarchy"


def contradicts(part: str, shown: Collection[str]) -> bool:
    """Whether a graph shows itself to be another part than a path names."""
    named = parts_of(part).keys()
    return any(
        (named & axis) and axis.intersection(shown) and not (named & axis).intersection(shown)
        for axis in _AXES
    )


def parts_shown(proto: onnx.ModelProto, modules: Iterable[str]) -> frozenset[str]:
    """Find the parts that a graph must be, by other evidence than its modules' paths.

    PyTorch's newer exporter writes down the class that was exported, a decoder has
    cross-attention, and transformers calls inputs by what they hold.

    Args:
        proto: The model.
        modules: The paths of its modules.
    """
    found = set(_from_class(proto))
    if any(map(is_cross_attention, modules)):
        found.add("decoder")
    for value in proto.graph.input:
        found.update(_INPUTS.get(text(value.name), ()))
    for axis in _AXES:
        if len(found & axis) > 1:  # the graph is more than one part
            found -= axis
    return frozenset(found)


def _from_class(proto: onnx.ModelProto) -> Iterator[str]:
    for node in proto.graph.node:
        for entry in node.metadata_props:
            if text(entry.key) != _CLASSES:
                continue
            try:
                classes = ast.literal_eval(text(entry.value))
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return
            if isinstance(classes, list) and classes and isinstance(classes[0], str):
                words = re.findall(r"[A-Z][a-z]+", classes[0].rpartition(".")[2])
                yield from (_CLASS_WORDS[word] for word in words if word in _CLASS_WORDS)
            return


def lost_parts(
    removed: str, found: Mapping[str, str], shown: Iterable[str], kind: str = ""
) -> list[str]:
    """Find the parts that only the removed prefix names, not the graph or the paths found.

    Args:
        removed: What each name begins with in the checkpoint and not in the graph.
        found: The graph's path for modules of the checkpoint.
        shown: The parts that the graph shows itself to be.
        kind: The architecture of the model that was trained, if it is known.

    Returns:
        The words of the prefix for them.
    """
    module = next(iter(found), "")
    prefixed = module if module.startswith(removed) else removed
    # What follows the prefix tells whether its last word is a part, as in `transformer.h`.
    whole = parts_of(prefixed, kind)
    named = {part: word for part, word in whole.items() if word in removed.split(".")}
    known = {part for name in found.values() for part in parts_of(name.rpartition(".")[0])}
    return [word for part, word in named.items() if part not in known | set(shown)]


def other_part(
    removed: str,
    parts: Sequence[str],
    found: Mapping[str, str],
    wanted: int,
    file: str,
    shown: Collection[str],
) -> CheckpointError:
    """The error that says why modules of one part of a model are not looked for in a graph.

    Args:
        removed: What their paths begin with in the checkpoint.
        parts: The parts that the checkpoint names.
        found: The graph's paths that they would have.
        wanted: The number of the checkpoint's modules.
        file: The file of the base's weights, if modules are found by value.
        shown: The parts that the graph shows itself to be.
    """
    module, path = next(iter(found.items()))
    known = file or "the graph"
    weights = (
        f"give --base-weights of the whole model, whose names begin with {removed!r}"
        if file
        else "give --base-weights model.safetensors of the whole model, which tells by value"
    )
    part = removed.removesuffix(".")
    several = (
        "if the model is in several files, give their folder: `onnx-adapt insert FOLDER "
        "--adapter DIR -o OUT`"
    )
    if contradicts(removed, shown):
        return CheckpointError(
            f"the checkpoint is of {' and '.join(map(repr, parts))}, a part of a model; the "
            f"graph shows by its class or inputs that it is of {' and '.join(sorted(shown))}",
            hint=f"export the part that the adapter is for; {several}",
        )
    folder = f"; {several}" if len(found) < wanted else ""
    return CheckpointError(
        f"the checkpoint is of {' and '.join(map(repr, parts))}, a part of a model; {known} "
        f"does not name the part it is: {module!r} would be {path!r} there, which may be "
        "another part with layers of the same names",
        hint=f"if {known} is that part: --part {part}; if not, {weights}, or export the part "
        f"inside its model, so that its paths begin with {removed!r}{folder}",
    )
