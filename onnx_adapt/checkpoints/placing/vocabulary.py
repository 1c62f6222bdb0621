"""Refuse an adapter for another vocabulary: new tokens enlarge an embedding and its head."""

from __future__ import annotations

from onnx_adapt.errors import CheckpointError
from onnx_adapt.words import count

_OVER_VOCABULARY = frozenset(
    [
        *("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "shared", "embed_in"),
        *("lm_head", "embed_out", "output_layer", "output_projection"),
    ]
)
"""What models call their embedding of tokens and the head behind it."""


def refuse_other_vocabulary(module: str, theirs: int, ours: int) -> None:
    """Refuse a checkpoint whose embedding or head has other rows than the graph's.

    Args:
        module: The module's path in the checkpoint.
        theirs: The rows that it has there.
        ours: Those that it has in the graph.

    Raises:
        CheckpointError: If they are not as many, and are those of a vocabulary.
    """
    leaf = module.rpartition(".")[2]
    if theirs == ours or leaf not in _OVER_VOCABULARY:
        return
    more = theirs - ours
    sizes = f"{module!r} has {theirs} rows in the checkpoint and {ours} in the graph"
    if more > 0:
        raise CheckpointError(
            f"the vocabulary was enlarged by {count(more, 'row')} for this adapter: {sizes}",
            hint=f"resize the base by {count(more, 'row')} and export again: "
            f"model.resize_token_embeddings({theirs})",
        )
    raise CheckpointError(
        f"the graph's vocabulary has {count(-more, 'row')} more than the adapter's: {sizes}",
        hint="is it an adapter for another base? if the base was enlarged after training, "
        f"export it as it was: model.resize_token_embeddings({theirs})",
    )
