"""Make of trained virtual tokens the first past of a decoder.

Keys and values are the past as they are. Of embeddings (prompt tuning, P-tuning) the decoder
itself makes it: run on them alone it gives the keys and values that they have in any sequence
behind them, because no token of a decoder sees a later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.states import past_of, state_misfits
from onnx_adapt.checkpoints.edits import VirtualTokens
from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import AdapterError, CheckpointError
from onnx_adapt.graph.index import GraphView, ModelIndex, TensorType, elem_name, index_model
from onnx_adapt.model.file import Model
from onnx_adapt.model.runtime_bytes import model_bytes
from onnx_adapt.ort import read_providers, run_session, start_exactly, start_session

_IDS, _FLAGS, _POSITIONS = "input_ids", "attention_mask", ("position_ids", "cache_position")


def place_virtual_tokens(model: Model, tokens: VirtualTokens) -> dict[str, Array]:
    """The first past of a decoder, by the names of its inputs.

    Raises:
        CheckpointError: If the model has no past among its inputs, one of other sizes, or no
            embedding that the tokens could be put into.
        RunError: If ONNX Runtime does not run the model.
    """
    index = index_model(model)
    types = _input_types(index)
    try:
        names = past_of(types)
    except AdapterError as error:
        raise CheckpointError(
            f"{tokens.method} is the first past of a decoder, and {error.message}",
            hint=error.hint,
        ) from error
    states = tokens.states or _states_of(model, index, names, tokens)
    dtypes = {name: elem_name(known.elem_type) for name, known in types.items()}
    state = {
        name: np.ascontiguousarray(value, DTYPES.get(dtypes[name], np.dtype(np.float32)))
        for name, value in zip(names, states, strict=False)
    }
    shapes = {name: known.shape or () for name, known in types.items()}
    found = state_misfits(Adapter("", {}, initial_state=state), shapes, dtypes)
    if found or len(states) != len(names):
        why = found[0] if found else f"it has {len(names)} keys and values, not {len(states)}"
        raise CheckpointError(
            f"the virtual tokens of {tokens.method} do not fit {model.label}: {why}",
            hint="is it an adapter for another size of this model?",
        )
    return state


def _input_types(index: ModelIndex) -> dict[str, TensorType]:
    """The types of the inputs that must be fed."""
    main = index.main
    names = (str(value.name) for value in main.scope.graph.input)
    return {name: main.type_of(name) for name in names if name not in main.constants}


def _states_of(
    model: Model, index: ModelIndex, names: list[str], tokens: VirtualTokens
) -> tuple[Array, ...]:
    """Run a decoder on the embeddings of virtual tokens alone; returns keys and values."""
    outputs = [str(value.name) for value in index.main.scope.graph.output]
    try:
        made = past_of(outputs, "present")
    except AdapterError as error:
        raise CheckpointError(
            f"{tokens.method} needs the decoder's next past, and {error.message}",
            hint=error.hint,
        ) from error
    embedding = _embedding(index, tokens)
    opened = _reading_embeddings(model, index, embedding)

    def start(options: Any) -> Any:
        given = model_bytes(opened, options)
        return start_session(
            given, options, read_providers(None), label=model.label, hint="does the base run?"
        )

    session, _ = start_exactly(start)
    feeds = _feeds(index, names, embedding, tokens.rows)
    return tuple(run_session(session, made, feeds, label=model.label))


def _embedding(index: ModelIndex, tokens: VirtualTokens) -> str:
    """The embeddings of the tokens in a graph: what a Gather makes of the ids alone.

    Raises:
        CheckpointError: If there is no such Gather, or other nodes use the ids, or scale what
            it gives.
    """
    main, width = index.main, tokens.rows.shape[1]
    ids, readers = [_IDS], []
    for name in ids:  # which grows by the casts of the ids
        for node in main.readers(name):
            if node.op_type in ("Cast", "Identity"):
                ids.append(str(node.output[0]))
            else:
                readers.append(node)
    gathers = [n for n in readers if n.op_type == "Gather" and n.input[1] in ids]
    others = [n for n in readers if n.op_type not in ("Gather", "Shape", "Size")]
    if len(gathers) != 1 or others or main.size(gathers[0].output[0], -1) not in (width, None):
        raise _unknown(tokens, f"input_ids is read by {_labels(readers) or 'no node'}")
    made = str(gathers[0].output[0])
    for node in main.readers(made):
        if node.op_type in ("Mul", "Div") and any(map(main.constant, node.input)):
            raise _unknown(tokens, f"{node.name!r} scales what {gathers[0].name!r} gives")
    return made


def _labels(nodes: list[onnx.NodeProto]) -> str:
    return ", ".join(f"{node.name!r} ({node.op_type})" for node in nodes[:4])


def _unknown(tokens: VirtualTokens, why: str) -> CheckpointError:
    return CheckpointError(
        f"{tokens.method} puts embeddings in place of those of tokens, and the node that "
        f"makes them was not found in the graph: {why}",
        hint="take the decoder as PyTorch exports it, before it is optimised or quantised",
    )


def _reading_embeddings(model: Model, index: ModelIndex, embedding: str) -> Model:
    """A model that is fed the embeddings of its tokens."""
    known = index.main.type_of(embedding)
    result = model.copy()
    graph = result.proto.graph
    for node in graph.node:
        if node.output[0] == embedding:
            node.output[0] = f"{embedding}/of ids"
    kind = known.elem_type or onnx.TensorProto.FLOAT
    value = onnx.helper.make_tensor_value_info(embedding, kind, [None, None, None])
    graph.input.append(value)
    return result


def _feeds(
    index: ModelIndex, past: list[str], embedding: str, rows: Array
) -> Mapping[str, Array]:
    """What to feed for virtual tokens alone: one row, without a past."""
    main, count = index.main, len(rows)
    feeds: dict[str, Array] = {embedding: rows[None].astype(_dtype(main, embedding))}
    for name, known in _input_types(index).items():
        dtype = _dtype(main, name)
        if name in past:
            sizes = [size if isinstance(size, int) else 1 for size in known.shape or ()]
            sizes[2:3] = [0]
            feeds[name] = np.zeros(sizes, dtype)
        elif name == _IDS:
            feeds[name] = np.zeros((1, count), dtype)
        elif name == _FLAGS:
            feeds[name] = np.ones((1, count), dtype)
        elif name in _POSITIONS:
            shape = [1] * (len(known.shape or ()) - 1) + [count]
            feeds[name] = np.arange(count, dtype=dtype).reshape(shape)
        else:
            raise CheckpointError(
                f"input {name!r} of the model has no known value for virtual tokens",
                hint="export the decoder with input_ids, attention_mask, position_ids and "
                "past_key_values alone",
            )
    return feeds


def _dtype(view: GraphView, name: str) -> np.dtype[np.generic]:
    kind = view.type_of(name).elem_type or onnx.TensorProto.FLOAT
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
