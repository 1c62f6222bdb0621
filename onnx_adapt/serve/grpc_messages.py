"""The messages of the Open Inference Protocol over gRPC, as a table.

The wire format is that of the published `grpc_predict_v2.proto` (KServe) and
`grpc_service.proto` (Triton): names, numbers and types of fields are the same. They are in a
descriptor pool of their own, so that Triton's client, which has messages of the same names,
can be used in one process.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "inference"
_NAMED = "string name=1, string version=2"
_PARAMETERS = "map InferParameter parameters"
_TENSOR = f"string name=1, string datatype=2, * int64 shape=3, {_PARAMETERS}=4"
_ASKED = "string repository_name=1, string model_name=2"

_FIELDS: dict[str, str] = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "bool live=1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "bool ready=1",
    "ModelReadyRequest": _NAMED,
    "ModelReadyResponse": "bool ready=1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": f"{_NAMED}, * string extensions=3",
    "ModelMetadataRequest": _NAMED,
    "ModelMetadataResponse": "string name=1, * string versions=2, string platform=3, "
    "* ModelMetadataResponse.TensorMetadata inputs=4, "
    "* ModelMetadataResponse.TensorMetadata outputs=5",
    "ModelMetadataResponse.TensorMetadata": "string name=1, string datatype=2, "
    "* int64 shape=3",
    "InferParameter": "? bool bool_param=1, ? int64 int64_param=2, ? string string_param=3, "
    "? double double_param=4, ? uint64 uint64_param=5",
    "InferTensorContents": "* bool bool_contents=1, * int32 int_contents=2, "
    "* int64 int64_contents=3, * uint32 uint_contents=4, * uint64 uint64_contents=5, "
    "* float fp32_contents=6, * double fp64_contents=7, * bytes bytes_contents=8",
    "ModelInferRequest": "string model_name=1, string model_version=2, string id=3, "
    f"{_PARAMETERS}=4, * ModelInferRequest.InferInputTensor inputs=5, "
    "* ModelInferRequest.InferRequestedOutputTensor outputs=6, * bytes raw_input_contents=7",
    "ModelInferRequest.InferInputTensor": f"{_TENSOR}, InferTensorContents contents=5",
    "ModelInferRequest.InferRequestedOutputTensor": f"string name=1, {_PARAMETERS}=2",
    "ModelInferResponse": "string model_name=1, string model_version=2, string id=3, "
    f"{_PARAMETERS}=4, * ModelInferResponse.InferOutputTensor outputs=5, "
    "* bytes raw_output_contents=6",
    "ModelInferResponse.InferOutputTensor": f"{_TENSOR}, InferTensorContents contents=5",
    "ModelStreamInferResponse": "string error_message=1, ModelInferResponse infer_response=2",
    "RepositoryIndexRequest": "string repository_name=1, bool ready=2",
    "RepositoryIndexResponse": "* RepositoryIndexResponse.ModelIndex models=1",
    "RepositoryIndexResponse.ModelIndex": f"{_NAMED}, string state=3, string reason=4",
    "ModelRepositoryParameter": "? bool bool_param=1, ? int64 int64_param=2, "
    "? string string_param=3, ? bytes bytes_param=4",
    "RepositoryModelLoadRequest": f"{_ASKED}, map ModelRepositoryParameter parameters=3",
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": f"{_ASKED}, map ModelRepositoryParameter parameters=3",
    "RepositoryModelUnloadResponse": "",
}
"""The fields of each message; `*` is a repeated one, `map` one by text, and those with `?`
are the choices of which a message has one."""

_Field = descriptor_pb2.FieldDescriptorProto


def _file() -> Any:
    """The table as a file descriptor; messages with a dot in their name are nested."""
    file = descriptor_pb2.FileDescriptorProto(
        name="open_inference.proto", package=_PACKAGE, syntax="proto3"
    )
    made: dict[str, Any] = {}
    for name, fields in _FIELDS.items():
        outer, _, own = name.rpartition(".")
        message = made[outer].nested_type.add() if outer else file.message_type.add()
        message.name = own
        made[name] = message
        for field in filter(None, fields.split(", ")):
            _add_field(message, name, field)
    return file


def _add_field(message: Any, owner: str, text: str) -> None:
    """Add a field: a rule where there is one, a type, and the name with its number."""
    *rule, kind, named = text.split()
    name, _, number = named.partition("=")
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if rule == ["map"]:
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _add_field(entry, "", "string key=1")
        _add_field(entry, "", f"{kind} value=2")
        rule, kind = ["*"], f"{owner}.{entry.name}"
    elif rule == ["?"]:
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    if rule == ["*"]:
        field.label = _Field.LABEL_REPEATED
    if kind[0].islower():
        field.type = _Field.Type.Value(f"TYPE_{kind.upper()}")
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"


_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(_file())


def message(name: str) -> Any:
    """The class of a message.

    Example:
        >>> message("ServerLiveResponse")(live=True).live
        True
    """
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
