"""What the folder of a language model says, and how much may be asked of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_adapt.errors import ModelFileError

CONFIG = "genai_config.json"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the `genai_config.json` of a folder says.

    Attributes:
        folder: The folder.
        model: The path of the decoder.
        context_length: How many tokens prompt and answer can have together.
        vocabulary: How many tokens there are.
        ends: The tokens that end a text.
        pad: The token that stands for none.
        search: How the model's makers would have tokens chosen: `temperature` and such.
    """

    folder: Path
    model: Path
    context_length: int
    vocabulary: int
    ends: frozenset[int]
    pad: int
    search: Mapping[str, Any]


def read_facts(folder: Path) -> Facts:
    """Read the `genai_config.json` of a folder.

    Raises:
        ModelFileError: If there is none, or it is not one of a single decoder.
    """
    path = folder / CONFIG
    hint = "give the folder that onnxruntime-genai's builder wrote"
    try:
        found = json.loads(path.read_bytes())
        model = found["model"]
        decoder, ends = model["decoder"]["filename"], model["eos_token_id"]
        return Facts(
            folder,
            folder / decoder,
            int(model["context_length"]),
            int(model["vocab_size"]),
            frozenset(ends if isinstance(ends, list) else [ends]),
            int(model.get("pad_token_id", 0)),
            dict(found.get("search", {})),
        )
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    except (ValueError, TypeError, KeyError) as error:
        raise ModelFileError(
            f"{path} does not describe a single decoder: {error!r}", hint=hint
        ) from error


@dataclass(frozen=True, slots=True)
class Writing:
    """A language model to serve, and how much may be asked of it.

    Attributes:
        facts: What its folder says.
        texts: How many texts are written at a time; each holds a cache of keys and values.
        waiting: How many may wait until one of those has ended.
        length: How many tokens a prompt and its answer can have together; 0 is as many as
            the model's context has.
    """

    facts: Facts
    texts: int = 16
    waiting: int = 256
    length: int = 0

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer can have together."""
        return min(self.length or self.facts.context_length, self.facts.context_length)
