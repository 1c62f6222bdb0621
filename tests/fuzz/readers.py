"""What is fuzzed: one function for each reader, from bytes to nothing.

A reader may take the bytes or raise an AdaptError. Anything else that comes out of it is a
bug, and so is memory or time out of proportion.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import shutil
import struct
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

import onnx_adapt as oa
from onnx_adapt.checkpoints.readers.pickles import (
    read_pickled_shapes,
    read_pickled_tensors,
)
from onnx_adapt.checkpoints.readers.table import read_edits, read_saved
from onnx_adapt.cli.run import read_choice
from onnx_adapt.edit.damage import damages
from onnx_adapt.errors import AdaptError, ModelFileError
from onnx_adapt.model import payloads
from onnx_adapt.model.fingerprint import fingerprint
from onnx_adapt.model.tensors import payload_of, read_tensor
from onnx_adapt.model.walk import tensors
from onnx_adapt.proof.feeds import read_arrays
from onnx_adapt.slot.manifest import KEY, manifest_from_text, read_manifest

CASES = Path(__file__).parent.parent / "cases"
ROOM = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir=ROOM))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
(FOLDER / "w.bin").write_bytes(bytes(64))  # what the models with external data refer to
SMALL = 16
"""In the fuzzed models, tensors from this many bytes on count as large."""


def model(data: bytes) -> None:
    """A model file: what opens is what protobuf reads, and saves as it was."""
    if payloads._MAGIC in data:
        return  # libFuzzer saw it in this process; it is random, so that no file can hold it
    path, copy = FOLDER / "m.onnx", FOLDER / "copy.onnx"
    path.write_bytes(data)
    payloads.LARGE = SMALL
    opened = oa.open_model(path)
    for tensor in tensors(opened.proto):
        if payload_of(opened, tensor) is not None:
            with contextlib.suppress(ModelFileError):
                read_tensor(opened, tensor)
    copy.unlink(missing_ok=True)
    oa.save_model(opened, copy)
    saved, theirs = copy.read_bytes(), onnx.ModelProto.FromString(data)
    assert onnx.ModelProto.FromString(saved) == theirs
    assert saved == data or not opened.canonical


def graph(data: bytes) -> None:
    """The graph of a model: sites, slots, damage, fingerprint, a slot in and out."""
    path = FOLDER / "g.onnx"
    path.write_bytes(data)
    payloads.LARGE = SMALL
    opened = oa.open_model(path)
    before = opened.proto.SerializeToString()
    for look in (oa.list_slots, damages, fingerprint, oa.remove):
        with contextlib.suppress(AdaptError):
            look(opened)
    sites = [site for site in oa.find_sites(opened, all_tensors=True) if site.refused is None]
    for site in sites[:2]:
        with contextlib.suppress(AdaptError):
            adapted = oa.insert(opened, after=site.address)
            made = read_manifest(adapted.proto)
            if made and made.canonical and not oa.list_slots(opened):
                assert oa.remove(adapted).proto.SerializeToString() == before
    assert opened.proto.SerializeToString() == before


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def manifest(data: bytes) -> None:
    """The record of slots in a model."""
    opened = oa.Model(onnx.ModelProto.FromString(_with_slots()))
    (entry,) = [entry for entry in opened.proto.metadata_props if entry.key == KEY]
    entry.ClearField("value")
    try:
        entry.MergeFromString(b"\x12" + _varint(len(data)) + data)
    except DecodeError:
        return  # no text: protobuf refuses the file
    adapter = oa.Adapter("a", {"fc1": {"down": np.ones((4, 1)), "up": np.ones((1, 4))}})
    actions: tuple[Callable[[], object], ...] = (
        lambda: oa.list_slots(opened),
        lambda: damages(opened),
        lambda: oa.remove(opened),
        lambda: oa.extract(opened),
        lambda: oa.fill(opened, adapter),
    )
    for action in actions:
        with contextlib.suppress(AdaptError):
            action()
    manifest_from_text(_text(data))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


_WITH_SLOTS: list[bytes] = []


def _with_slots() -> bytes:
    if not _WITH_SLOTS:
        from adapter_models import adapted

        _WITH_SLOTS.append(adapted().proto.SerializeToString())
    return _WITH_SLOTS[0]


def _adapter(suffix: str, data: bytes) -> None:
    path = FOLDER / f"a{suffix}"
    path.write_bytes(data)
    for value in oa.load_adapter(path).feeds().values():
        value.tobytes()


def onnx_adapter(data: bytes) -> None:
    """An adapter in ONNX Runtime's format."""
    _adapter(".onnx_adapter", data)


def safetensors(data: bytes) -> None:
    """A safetensors file, or after an even byte its header alone."""
    odd, data = _told(data)
    if not odd:
        header = data
        data = struct.pack("<Q", len(header)) + header + bytes(_end(header))
    _adapter(".safetensors", data)


def _end(header: bytes) -> int:
    """Where the data of a header ends, if that is a sensible number."""
    nonsense = (ValueError, LookupError, TypeError, AttributeError)
    with contextlib.suppress(*nonsense, RecursionError, OverflowError):
        items = [v for k, v in json.loads(header).items() if k != "__metadata__"]
        end = max(int(item["data_offsets"][1]) for item in items)
        return end if 0 <= end < 4096 else 0
    return 0


def npz(data: bytes) -> None:
    """An npz file, or after an even byte its only member."""
    odd, data = _told(data)
    if not odd:
        data = _archive({"a.npy": data})
    (FOLDER / "x.npz").write_bytes(data)
    with contextlib.suppress(AdaptError):
        read_arrays(FOLDER / "x.npz")
    _adapter(".npz", data)


def _told(data: bytes) -> tuple[bool, bytes]:
    """Whether the first byte is odd, and what follows: checksums are no obstacle then."""
    return bool(data[:1] and data[0] % 2), data[1:]


def _archive(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


_STORAGES = (256, 8, 256, 32, 256, 8, 256, 32, 4)
"""How many numbers there are for each storage that a pickle of the corpus names."""


def pickle(data: bytes) -> None:
    """A `.bin` of PyTorch, or after an even byte the pickle in it."""
    odd, data = _told(data)
    if not odd:
        stored = {f"archive/data/{i}": bytes(4 * size) for i, size in enumerate(_STORAGES)}
        data = _archive({"archive/data.pkl": data} | stored)
    tensors = read_pickled_tensors(data, Path("a.bin"))
    for value in tensors.values():
        value.tobytes()
    shapes = read_pickled_shapes(io.BytesIO(data), Path("a.bin"))
    assert shapes == {name: value.shape for name, value in tensors.items()}


_TRAINED = (
    *("peft_bert_lora_patterns", "peft_bert_lora_rslora_patterns", "peft_bert_ia3"),
    *("ah_bert_seq_bn", "ah_bert_par_bn", "ah_bert_compacter", "ah_bert_adapterplus"),
    "ah_bert_lora",
)


def config(data: bytes) -> None:
    """The configuration of a trained checkpoint: spaces before it count the checkpoints."""
    number = len(data) - len(data.lstrip(b" "))
    case = _TRAINED[number % len(_TRAINED)]
    place = FOLDER / case
    if not place.exists():
        shutil.copytree(CASES / case / "adapter", place)
    (place / "adapter_config.json").write_bytes(data)
    read_edits(read_saved(place))


def gguf(data: bytes) -> None:
    """A GGUF file of a LoRA, beside the configuration of its base."""
    place = FOLDER / "gguf"
    place.mkdir(exist_ok=True)
    base = {"num_attention_heads": 2, "num_key_value_heads": 1}
    (place / "config.json").write_text(json.dumps(base))
    (place / "a.gguf").write_bytes(data)
    read_edits(read_saved(place))


def nemo(data: bytes) -> None:
    """A `.nemo` archive, or after an even byte the settings of one."""
    odd, data = _told(data)
    path = FOLDER / "a.nemo"
    path.write_bytes(data)
    if not odd:
        weights = CORPUS.parent / "nemo_weights.ckpt"
        with tarfile.open(path, "w") as archive:
            archive.add(weights, "model_weights.ckpt")
            info = tarfile.TarInfo("model_config.yaml")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    read_edits(read_saved(path))


def choice(data: bytes) -> None:
    """What `run --blend` and `run --rows` are given."""
    from click import UsageError

    with contextlib.suppress(UsageError):
        chosen, names = read_choice(None, _text(data), None)
        assert isinstance(chosen, dict)
        assert set(chosen) == set(names)
        assert all(isinstance(weight, float) for weight in chosen.values())
    with contextlib.suppress(UsageError):
        chosen, names = read_choice(None, None, _text(data))
        assert isinstance(chosen, list)
        assert {name for name in chosen if name is not None} == set(names)


READERS: dict[str, Callable[[bytes], None]] = {
    reader.__name__: reader
    for reader in (
        *(
            model,
            graph,
            manifest,
            onnx_adapter,
            safetensors,
            npz,
            pickle,
            config,
            gguf,
            nemo,
            choice,
        ),
    )
}


def read(name: str, data: bytes) -> bool:
    """Read bytes, or get an AdaptError: nothing else. Gives whether they were read."""
    large = payloads.LARGE
    try:
        with warnings.catch_warnings(), contextlib.suppress(AdaptError):
            warnings.simplefilter("ignore")  # numpy's, of odd headers
            READERS[name](data)
            return True
    finally:
        payloads.LARGE = large
    return False


def corpus(name: str) -> list[bytes]:
    """The committed files of a reader."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


CORPUS = Path(__file__).parent / "corpus"
