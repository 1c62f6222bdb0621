"""PyTorch's `.bin` files: honest ones are read, hostile ones execute nothing."""

import base64
import copyreg
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from torch_files import (
    EMPTY,
    FILE,
    NONE,
    ORDERED,
    PARAMETER,
    TENSOR,
    TRUE,
    archive,
    mapping,
    num,
    one,
    refused,
    storage,
    tensor,
    text,
    tup,
)

from onnx_adapt.checkpoints.readers.pickles import read_pickled_tensors

TORCH_SAVED = zlib.decompress(base64.b85decode(
    b"c-pO3No*Tc7=B*jxNe%IEhH_F22#L*HuXBTyCpGYXc=goX$x*yoQXY+hdOrtnU_`tRf<3f<$%;m95^8^NE~~k2"
    b"P7gmbEqIy4?(Ix2ytMMxNt)JZ^kk6Uh2Aa80F6>llhkaE&u-}r}+GY1cPMV)l0S#%`BFU3;Mp2Mzzto^A$PUP0"
    b"n)Hg11<#RVsRs8nvnwI$@S{Q!gDciZlddL<LVcA3(B;x-nCx;4RV`QjQkpsZp^)1yi4%H!7t9)vH#`EL@0%z!w"
    b"hZI}u^wo7#*Heg_hgD>aRtbRLGFBk#d?A`r;?@LrsohfXCxAvmcJ#iw|eV3XoiJWCMzpv+usrqHFrmOQ3PrVY)"
    b"4?lS6>{bh$I3O(gc#Ydsn#xFvj;#q{P4t5)b?J7K!58;c{)T-88&C*NoFvk#s{<7_0py6PL;!%7{u+w3Agu<gL"
    b"JXTN5G)hP@$Wg>$7gB7eFf@tCz#=@(oIK&chbin<;YnvKjcTcO5uW1E33wXO0~ErOiXU@F<q`COL-35l@GONrD"
    b"(tlxtg?oa1fy#V<vMoXq!Lv8ix6SyM;%;@LR^J}J#=NQat@LXsy;18@lj(|B-=_7Qb^~ekY;1yU4#sy+wagFpm"
    b"0!yL-`Ii6Q*WV;V{RSwdXl1H8{s?P6@^x&Iy~7<(0)z!rOBW?-2^mt03Fym1^_T6&+sSh>zG08?;Al+7ui^S`U"
    b"R687;b0*sqry%9kk|SK&l{6TUd7ncA#QbrW(;mT=>Z5KMA2lLpnXezHCsr<lfRN8=R=ud0y0V*hdGeK@PaYt9r"
    b"EwTfoK>l{@E-f--`iBuya4n={&lnR<XqWbI{y#&(@ke4m)2ow=TD3q81qWG6U$2Educg|s$p-@)An7<5f*~u0#"
    b"4~=bkIB);Il4tb*W-mk4UcVP~)56^jHN|6D*7Rsj=?q?fXXRTzt`QcwrZuIXq#8A4^jyuH)o7v4CTHV9X}PZ}%"
    b"EZ6;WA!~YJ}jDx?{tgT%S%D47&Fyby-M5EmlDjt*hTo2jkWil2KvZY!@%?<s@GVtl(Prg(OtVL2Bj69d00I3(+"
    b";+B0{8ULO%8KaeP2Y*?%#j`LKeo5b{u~&7BD`=SRQANcK@8&F@XOZXyIrN?<gu~!{q+;3Df@ywGT7RW8Z~;?7|"
    b"0KEi}`-W=zf|NPGFSYyB87Fa1}4xz<Mh@dwPGG@AoL?qHA!?By6k7!izdj2y-k#vH~1#ubdK7#~kC-`6~Ql^pZ"
    b"j!gqrAoshE;@_&tAyZ#Z2@j1qIj2m`7?@p{%r;uo>MLxUve3Ei@sAWF5otBw~w6gLMYmxpI8sof%Bxet9Wc#08"
    b"9vipyy@SKs+R#sJRR7Fhe}BEJ`k9A$xb^#o|1i;D3l9f*4{14@ChgZBwl;`8&s%=@(%Xi9W@Gv}d#~UAX81RL{"
    b"K;Lkdt4pBsdbSJ*8k>t_K<B2twxXS5w+qW=Kkg<GpAekuR#*~uYub3E!{M*gTAe?(|^Gz$=T5dOeUJjNa;i@nN"
    b"G(NQY4;CWa6=i6iH;#87ZEMCZtR{nU>-i<}!bLcrc7U!nR8fGu!a#K7aJCb1r_zh-mi#qMt*a@{?vK7Lmk#2-w"
    b"My+;o$yJ9&sa?nd6n@u(eS{Q*LRySr{T2fx)pgx)V=-QAPNmIDGdDq`K;j>oQw*qDfQcN{^tQ^3YWth>7N*rA|"
    b"+O^8@`)#kB(irA!xbyr*-duo$_l|-z&Qu5gEMQlpMx~m+IWuK^gWfigRD#c@Oi`dK>_U?6z%XhQ5Hr6dHcY)!-"
    b"%Pw$}jpg3=gB*Bk7im$Ea!MeuXRUtu_PWmE{5|Y<?l-!eJL1@<4!Kh=CeEitN5H}K+3!2={tGq`%a#"
))  # fmt: skip
"""What torch 2.13 saves: a Linear's state_dict() with some views and types added."""

window = np.arange(24, dtype=np.float32)
SAVED = {
    "weight": np.array([[1, 2], [3, 4], [5, 6]], np.float32),
    "bias": np.array([0.5, -0.5, 0.25], np.float32),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "strided": np.arange(20, dtype=np.float32)[1:19:3],
    "window": window[4:10].reshape(2, 3),
    "shared": window[8:12],
    "half": np.array([1.5, -2], np.float16),
    "brain": np.array([[1.5], [-3]], ml_dtypes.bfloat16),
    "double": np.array([1e-300]),
    "parameter": np.array([9, 8], np.float32),
    "scalar": np.array(3.25, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def test_what_torch_saved_is_read_as_torch_reads_it() -> None:
    found = read_pickled_tensors(TORCH_SAVED, FILE)
    assert found.keys() == SAVED.keys()
    for name, value in SAVED.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)


def test_the_assembler_of_these_tests_writes_what_is_read() -> None:
    found = read_pickled_tensors(archive(one(tensor())), FILE)
    assert found["w"].tolist() == [1, 2, 3, 4]
    parameter = PARAMETER + tup(tensor(num(1), tup(num(3))), TRUE, NONE) + b"R"
    assert read_pickled_tensors(archive(one(parameter)), FILE)["w"].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("offset", "size", "stride", "wanted"),
    [
        (0, (2, 2), (2, 1), [[1, 2], [3, 4]]),
        (0, (2, 2), (1, 2), [[1, 3], [2, 4]]),
        (1, (2,), (2,), [2, 4]),
        (3, (), (), 4),
        (2, (1, 2), (77, 1), [[3, 4]]),
        (0, (0,), (1,), []),
        (4, (0, 2), (2, 1), []),
        (0, (3, 1), (1, 1), [[1], [2], [3]]),
    ],
)
def test_a_view_is_read_as_it_strides(
    offset: int, size: tuple[int, ...], stride: tuple[int, ...], wanted: object
) -> None:
    shape, steps = (tup(*map(num, numbers)) for numbers in (size, stride))
    found = read_pickled_tensors(archive(one(tensor(num(offset), shape, steps))), FILE)
    assert found["w"].shape == size
    assert found["w"].tolist() == wanted


# Execution.

CALLS = {
    "os.system": "posix system",
    "eval": "builtins eval",
    "old eval": "__builtin__ eval",
    "exec": "builtins exec",
    "getattr": "builtins getattr",
    "import": "builtins __import__",
    "Popen": "subprocess Popen",
    "touch": "pathlib Path.touch",
    "codecs": "_codecs encode",
    "copyreg": "copyreg _reconstructor",
    "partial": "functools partial",
    "operator": "operator attrgetter",
    "runpy": "runpy run_path",
    "pickle": "pickle loads",
    "numpy": "numpy frombuffer",
    "numpy load": "numpy load",
    "ourselves": "onnx_adapt.checkpoints.readers.pickles read_pickled_tensors",
    "our view": "onnx_adapt.checkpoints.readers.pickles _rebuild_tensor",
    "torch load": "torch load",
    "torch bytes": "torch.storage _load_from_bytes",
    "torch other": "torch._utils _rebuild_sparse_tensor",
    "torch globals": "torch._utils _rebuild_tensor_v2.__globals__",
    "torch method": "torch FloatStorage.__init__",
    "method": "collections OrderedDict.fromkeys",
    "neighbour": "collections defaultdict",
}


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


@pytest.mark.parametrize("how", [_global, _stack_global])
@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("what", CALLS)
def test_nothing_but_views_of_tensors_is_looked_up(
    what: str, called: bool, how: object, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    module, _, name = CALLS[what].partition(" ")
    pickle = how(module, name)
    if called:
        pickle += tup(text(f"touch {witness}")) + b"R"
    error = refused(archive(one(pickle)))
    assert f"{module}.{name}" in error.message
    assert "hostile" in error.hint
    assert not witness.exists()


@pytest.mark.parametrize(
    "pickle",
    {
        "INST": b"(" + text("touch WITNESS") + b"iposix\nsystem\n",
        "OBJ": b"(" + _global("posix", "system") + text("touch WITNESS") + b"o",
        "NEWOBJ": _global("posix", "system") + tup(text("touch WITNESS")) + b"\x81",
        "NEWOBJ_EX": _global("posix", "system") + tup(text("touch WITNESS")) + b"}\x92",
        "INST of ours": b"(itorch._utils\n_rebuild_tensor_v2\n",
        "NEWOBJ of a function": TENSOR + EMPTY + b"\x81",
        "NEWOBJ_EX of a function": TENSOR + EMPTY + b"}\x92",
        "REDUCE of a type of storage": b"ctorch\nFloatStorage\n" + tup(num(1)) + b"R",
        "REDUCE of a tensor": tensor() + EMPTY + b"R",
        "APPEND to a function": TENSOR + NONE + b"a",
        "PERSID": b"P0\n",
        "EXT1": b"\x82\x05",
        "EXT2": b"\x83\x05\x05",
        "EXT4": b"\x84\x05\x05\x05\x05",
    }.items(),
    ids=lambda item: item[0],
)
def test_no_opcode_leads_around_the_list(pickle: tuple[str, bytes], tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    name = str(witness)
    command = pickle[1].replace(text("touch WITNESS"), text(f"touch {name}"))
    refused(archive(one(command)))
    assert not witness.exists()


def _mark(path: str) -> dict[str, str]:
    Path(path).touch()
    return {}


@pytest.fixture
def extension() -> Iterator[bytes]:
    """A callable that the host program has registered, and used, under an extension code."""
    copyreg.add_extension(__name__, "_mark", 0x5150)
    copyreg._extension_cache[0x5150] = _mark
    yield b"\x83" + struct.pack("<H", 0x5150)
    copyreg.remove_extension(__name__, "_mark", 0x5150)
    copyreg._extension_cache.pop(0x5150, None)


def test_extension_codes_of_the_host_program_are_not_called(
    extension: bytes, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    refused(archive(one(extension + tup(text(str(witness))) + b"R")))
    assert not witness.exists()


@pytest.mark.parametrize("attribute", ["__defaults__", "__kwdefaults__", "__name__", "note"])
def test_the_reader_itself_cannot_be_changed(attribute: str) -> None:
    values = {
        "__defaults__": tup(*[num(0)] * 4),
        "__kwdefaults__": b"}",
        "__name__": text("x"),
        "note": num(1),
    }
    state = tup(NONE, mapping(text(attribute), values[attribute]))
    refused(archive(TENSOR + state + b"b0" + one(tensor())))


def test_a_type_of_storage_cannot_be_changed() -> None:
    kind = b"ctorch\nFloatStorage\n" + mapping(text("dtype"), text("V8")) + b"b"
    refused(archive(one(tensor(size=tup(num(2)), data=storage(kind=kind, count=num(2))))))


@pytest.mark.parametrize("method", ["items", "keys", "values", "__class__"])
def test_a_dictionary_cannot_hide_what_it_holds(method: str) -> None:
    ordered = ORDERED + EMPTY + b"R(" + text("w") + text("no tensor") + b"u"
    refused(archive(ordered + mapping(text(method), ORDERED) + b"b"))
