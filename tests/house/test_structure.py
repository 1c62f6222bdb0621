"""The house stands: imports point down, one door per third party, a small public API."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnx_adapt
from onnx_adapt import errors

PACKAGE = Path(onnx_adapt.__file__).parent

FLOORS = (
    ("errors", "dtypes", "formats", "words"),
    ("model",),
    ("ort", "slot"),
    ("adapter",),
    ("graph", "session"),
    ("checkpoints",),
    ("edit",),
    ("graphsurgeon", "proof"),
    ("report",),
    ("__init__",),
    ("serve",),
    ("cli",),
)
"""From the ground up; a module imports only from floors below its own."""

CHECKPOINT_FLOORS = (("edits",), ("readers",), ("modules",), ("placing",), ("load",))
"""The floors inside `checkpoints/`, from the ground up."""

DOORS = {
    "click": {"cli"},
    "rich": {"cli"},
    "onnxruntime": {"ort"},
    "onnx_graphsurgeon": {"graphsurgeon"},
    "safetensors": {"adapter"},
    "flatbuffers": {"adapter"},
    "fsspec": {"serve"},
    "ray": {"serve"},
    "starlette": {"serve"},
    "jinja2": {"report"},
    "pygal": {"report"},
}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield parts[0], ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _rooms(tree: ast.Module) -> Iterator[str]:
    for name in _imports(tree):
        parts = name.split(".")
        if parts[0] == "onnx_adapt":
            known = len(parts) > 1 and (PACKAGE / parts[1]).with_suffix(".py").exists()
            package = len(parts) > 1 and (PACKAGE / parts[1]).is_dir()
            yield parts[1] if known or package else "__init__"


def test_every_module_has_its_floor() -> None:
    planned = [name for floor in FLOORS for name in floor]
    assert sorted(planned) == sorted({name for name, _ in _modules()})


def test_imports_point_down() -> None:
    level = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    upward = [
        f"{module} imports {room}"
        for module, tree in _modules()
        for room in _rooms(tree)
        if level[room] >= level[module] and room != module
        if module != "__init__"
    ]
    assert upward == []


def test_imports_point_down_inside_checkpoints() -> None:
    folder = PACKAGE / "checkpoints"
    level = {name: i for i, floor in enumerate(CHECKPOINT_FLOORS) for name in floor}
    paths = {
        path: path.relative_to(folder).with_suffix("").parts[0]
        for path in folder.rglob("*.py")
        if path != folder / "__init__.py"
    }
    assert set(paths.values()) == level.keys()
    upward = [
        f"{path.relative_to(folder)} imports {imported}"
        for path, room in paths.items()
        for imported in _imports(ast.parse(path.read_text(encoding="utf-8")))
        if imported.startswith("onnx_adapt.checkpoints.")
        if (other := imported.split(".")[2]) != room and level[other] >= level[room]
    ]
    assert upward == []


def test_the_readers_of_checkpoints_know_no_graph() -> None:
    """Nor does anything that they import."""
    code = (
        "import sys, onnx_adapt.checkpoints.readers.table\n"
        "rooms = ('graph', 'edit', 'checkpoints.modules', 'checkpoints.placing')\n"
        "names = tuple(f'onnx_adapt.{room}' for room in rooms)\n"
        "found = [name for name in sys.modules if name.startswith(names)]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _inside(folder: Path) -> dict[str, set[str]]:
    """For each module of a folder the modules beside it that it imports at its top."""
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    prefix = f"onnx_adapt.{folder.name}."
    return {
        name: {
            imported.removeprefix(prefix).split(".")[0]
            for imported in _imports(ast.parse((folder / f"{name}.py").read_text("utf-8")))
            if imported.startswith(prefix)
        }
        & names
        for name in names
    }


@pytest.mark.parametrize(
    "folder", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
)
def test_no_two_modules_of_a_folder_import_each_other(folder: str) -> None:
    beside = _inside(PACKAGE / folder)
    while beside:
        done = {name for name, needed in beside.items() if not needed & beside.keys()}
        assert done, f"{sorted(beside)} import each other"
        beside = {name: needed for name, needed in beside.items() if name not in done}


@pytest.mark.parametrize("library", DOORS)
def test_a_third_party_has_one_door(library: str) -> None:
    users = {m for m, t in _modules() if any(n.split(".")[0] == library for n in _imports(t))}
    assert users <= DOORS[library]
    assert users


def test_the_library_never_prints() -> None:
    printing = [
        module
        for module, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert printing == []


def test_files_and_functions_stay_small() -> None:
    long_files = [
        path.name
        for path in PACKAGE.rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > 350
    ]
    assert long_files == []


def _begins_like_a_slot(node: ast.AST) -> bool:
    """Whether a literal, an f-string's first piece included, is a beginning of slot names."""
    text = node.value if isinstance(node, ast.Constant) else None
    return isinstance(text, str) and re.match(r"adapter\\?\.($|[^a-z])", text) is not None


def test_the_names_of_slots_are_built_and_parsed_in_one_module() -> None:
    holders = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if _begins_like_a_slot(node)
    }
    assert holders == {"slot/names.py"}


def _raised(tree: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield node.exc


def test_every_error_says_what_to_do_about_it() -> None:
    """By a hint of its own, or where its class has advice by that."""
    plain = {
        name
        for name in errors.__all__
        if issubclass(kind := getattr(errors, name), errors.AdaptError)
        if kind.advice == errors.AdaptError.advice
    }
    silent = [
        f"{module}, line {call.lineno}"
        for module, tree in _modules()
        for call in _raised(tree)
        if isinstance(call.func, ast.Name) and call.func.id in plain
        if not any(keyword.arg == "hint" for keyword in call.keywords)
    ]
    assert silent == []


PUBLIC = [
    *("AdaptError", "Adapter", "AdapterSession", "Checkpoint", "Model", "Report", "Site"),
    *("Slot", "bake", "blend", "build_adapter", "calibrate", "convert", "extract", "fill"),
    *(
        "find_sites",
        "insert",
        "insert_checkpoint",
        "list_slots",
        "load_adapter",
        "load_checkpoint",
    ),
    *("make_adapter", "open_model", "remove", "save_adapter", "save_model", "verify"),
]


def test_the_public_names_are_these_and_all_of_them_work() -> None:
    assert onnx_adapt.__all__ == sorted(PUBLIC)
    for name in PUBLIC:
        assert callable(getattr(onnx_adapt, name))


def test_a_public_name_is_the_same_whatever_was_imported_before() -> None:
    code = "import onnx_adapt.proof.verify, onnx_adapt as oa; assert callable(oa.verify)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = onnx_adapt.no_such_name


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, onnx_adapt, onnx_adapt.cli\n"
        "heavy = {'onnx', 'numpy', 'onnxruntime', 'rich', 'ml_dtypes', 'ray', 'fsspec'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
