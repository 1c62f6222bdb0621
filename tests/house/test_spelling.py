"""Every hint is in the words of who meets it: of the shell, or of Python."""

import ast
import re
from pathlib import Path

import pytest

import onnx_adapt
from onnx_adapt.errors import AdapterError, AdaptError
from onnx_adapt.spelling import FOREIGN, in_python

PACKAGE = Path(onnx_adapt.__file__).parent
OF_THE_SHELL = ("cli", "serve", "spelling.py")
"""What speaks to people in a shell alone."""


def _texts(path: Path) -> list[str]:
    """The texts of a module that are no docstrings, with `X` for what is put into them."""
    tree = ast.parse(path.read_text("utf-8"))
    plain = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            pieces = [v.value if isinstance(v, ast.Constant) else "X" for v in node.values]
            found.append("".join(map(str, pieces)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [] if id(node) in plain else [node.value]
    return found


def test_no_hint_of_the_library_names_an_option_in_python() -> None:
    left = {}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] not in OF_THE_SHELL:
            for text in _texts(path):
                words = in_python(text)
                options = set(re.findall(r"(?<![\w-])(?:--[a-z][a-z_-]+|-o\b)", words))
                if options - {*FOREIGN}:
                    left[words] = path.name
    assert left == {}


@pytest.mark.parametrize(
    ("shell", "python"),
    [
        ("see `onnx-adapt sites`", "see `oa.find_sites`"),
        ("`onnx-adapt check` says", "the command `onnx-adapt check` says"),
        ("--allow-partial leaves slots", "allow_partial=True leaves slots"),
        ("say so: --axis -1 or --axis 1", "say so: axis=-1 or axis=1"),
        ("--axis 1 (64 wide)", "axis=1 (64 wide)"),
        ("rename: --map a.b=c; --part takes", 'rename: module_map={"a.b": "c"}; part= takes'),
        ("--part text; if not", 'part="text"; if not'),
        ("can: --after 'main:a b'", 'can: after="main:a b"'),
        ("with one --after each", "with one after= each"),
        ("--to peft writes it", 'library="peft" writes it'),
        ("insert without --bottleneck for any", "insert without bottleneck= for any"),
        ("choose another path with -o", "choose another path with path="),
        (
            "`onnx-adapt insert BASE --adapter DIR --calibrate INPUTS.npz` widens",
            '`oa.calibrate(model, adapter, "INPUTS.npz")` widens',
        ),
        ("with --extra_options fuse_qkv=false", "with --extra_options fuse_qkv=false"),
        ("pip install -U onnx-adapt", "pip install -U onnx-adapt"),
    ],
)  # fmt: skip
def test_hints_are_said_in_python(shell: str, python: str) -> None:
    assert in_python(shell) == python


def test_the_text_of_an_error_is_its_message_and_its_hint() -> None:
    error = AdapterError("no weights for slot 'fc'", hint="--allow-partial leaves it off")
    assert str(error) == "no weights for slot 'fc'\nhint: allow_partial=True leaves it off"
    assert error.message == "no weights for slot 'fc'"
    assert error.hint == "--allow-partial leaves it off"


def test_an_error_of_python_has_no_words_of_the_shell() -> None:
    base = onnx_adapt.open_model("models/dnsmos-p808.onnx")
    model = onnx_adapt.insert(base, after="conv2d_5", batched=True)
    with pytest.raises(AdaptError) as error:
        onnx_adapt.bake(model)
    assert str(error.value).endswith(
        "hint: insert without batched=True to put an adapter into the model"
    )


def test_an_error_in_another_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(Path("models/dnsmos-p808.onnx").read_bytes()[:5000])
    with pytest.raises(AdaptError) as error:
        onnx_adapt.open_model(tmp_path / "cut.onnx")
    assert str(error.value).count("hint:") == 1
