"""The house stands: imports point down, one door per third party, a small public API."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import code_map
import pytest

import onnx_adapt
from onnx_adapt import errors

PACKAGE = Path(onnx_adapt.__file__).parent

FLOORS = (
    ("spelling",),
    ("errors", "dtypes", "formats", "words"),
    ("tables",),
    ("model",),
    ("ort", "slot"),
    ("adapter",),
    ("graph", "session"),
    ("checkpoints",),
    ("edit",),
    ("graphsurgeon", "proof"),
    ("training",),
    ("report",),
    ("__init__",),
    ("serve",),
    ("cli",),
    ("__main__",),
)
"""From the ground up; a module imports only from floors below its own."""

CHECKPOINT_FLOORS = (
    ("edits",),
    ("readers",),
    ("writers",),
    ("modules",),
    ("placing",),
    ("mapping",),
    ("load", "unplacing"),
)
"""The floors inside `checkpoints/`, from the ground up."""

EVERYWHERE = {"numpy", "onnx", "google", "ml_dtypes", "_typeshed"}
"""Third parties that any room may import; `google` is protobuf, `_typeshed` only types."""

DOORS = {
    "click": {"cli"},
    "rich": {"cli/outputs", "cli/progress"},
    "onnxruntime": {"ort"},
    "onnxruntime_genai": {"serve/llm/model"},
    "onnx_graphsurgeon": {"graphsurgeon"},
    "safetensors": {"adapter/safetensors"},
    "flatbuffers": {"adapter/onnx_adapter"},
    "fsspec": {"serve/repository"},
    "grpc": {"serve/grpc_server"},
    "httptools": {"serve/upgrades"},
    "orjson": {"serve/protocol", "serve/tensors"},
    "ray": {"serve/ray_app", "serve/ray_metrics", "serve/ray_running"},
    "starlette": {"serve/bodies", "serve/edge", "serve/http", "serve/llm/routes"},
    "tokenizers": {"serve/embeddings", "serve/llm/texts"},
    "uvicorn": {"serve/connections", "serve/one_process"},
    "opentelemetry": {"serve/tracing"},
    "prometheus_client": {"serve/metrics"},
    "jinja2": {"report/page"},
    "markupsafe": {"report/page"},
    "pygal": {"report/plots"},
}
"""Where each other third party is imported: in a whole room, or in single modules."""


FILES = {
    path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
}
"""Every module of the package by its path."""

ROOMS = {path.with_suffix("").name for path in PACKAGE.iterdir()}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for path, tree in FILES.items():
        yield path.relative_to(PACKAGE).with_suffix("").parts[0], tree


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
            yield parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"


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
        for imported in _imports(FILES[path])
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


BLIND = {"session": "graph", "checkpoints/readers": "graph"}
"""Folders whose modules, and all that these import, never import a room."""


def _module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {_module_of(path): tree for path, tree in FILES.items()}
"""Every module of the package by its full name."""


def _imported(module: str) -> set[str]:
    """The modules of the package that a module imports anywhere in its code.

    `from onnx_adapt.graph.layout import look` is the module `look` if there is one, and
    else the package `onnx_adapt.graph.layout` itself.
    """
    found = set()
    for name in _imports(TREES[module]):
        while name not in TREES and "." in name:
            name = name.rpartition(".")[0]
        if name in TREES:
            found.add(name)
    return found


def _children(folder: str) -> dict[str, set[str]]:
    """For each module and folder in a folder, those beside it that it imports.

    A folder stands for all modules in it. The folder's own `__init__` is one of the modules
    in it, under the folder's name.
    """

    def child(module: str) -> str | None:
        if module == folder:
            return folder
        rest = module.removeprefix(f"{folder}.")
        return None if rest == module else f"{folder}.{rest.split('.')[0]}"

    beside: dict[str, set[str]] = {}
    for module in TREES:
        if own := child(module):
            others = {child(name) for name in _imported(module)}
            beside.setdefault(own, set()).update(n for n in others if n and n != own)
    return beside


FOLDERS = sorted(
    _module_of(path) for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_inside_a_folder_point_one_way(folder: str) -> None:
    """Modules and folders beside each other form floors, at every depth."""
    beside = _children(folder)
    while beside:
        done = {name for name, needed in beside.items() if not needed & beside.keys()}
        assert done, f"{sorted(beside)} import each other"
        beside = {name: needed for name, needed in beside.items() if name not in done}


@pytest.mark.parametrize(("folder", "room"), BLIND.items())
def test_a_folder_that_needs_no_graph_imports_none(folder: str, room: str) -> None:
    prefix = f"onnx_adapt.{folder.replace('/', '.')}"
    reached = {name for name in TREES if name.startswith(prefix)}
    waiting = list(reached)
    assert waiting
    while waiting:
        # A package runs its `__init__`, but the root imports what it exports only when used.
        new = _imported(waiting.pop()) - reached - {"onnx_adapt"}
        reached |= new
        waiting += new
    assert [name for name in reached if name.startswith(f"onnx_adapt.{room}")] == []


@pytest.mark.parametrize("library", DOORS)
def test_a_third_party_has_one_door(library: str) -> None:
    users = {
        name.removeprefix("onnx_adapt.").replace(".", "/")
        for name, tree in TREES.items()
        if any(imported.split(".")[0] == library for imported in _imports(tree))
    }
    doors = DOORS[library]
    assert users
    assert [u for u in users if u not in doors and u.split("/")[0] not in doors] == []


def test_every_third_party_is_known() -> None:
    imported = {name.split(".")[0] for tree in TREES.values() for name in _imports(tree)}
    known = {*DOORS, *EVERYWHERE, "onnx_adapt", *sys.stdlib_module_names}
    assert imported - known == set()


def _words(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """The names, attributes and texts in a module's code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node, node.id
        elif isinstance(node, ast.Attribute):
            yield node, node.attr
        elif isinstance(node, ast.alias):
            yield node, node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node, node.value


def test_only_the_door_starts_and_runs_sessions_of_onnx_runtime() -> None:
    """Nobody else names InferenceSession in code, by getattr or by a provider's name."""
    wanted = {"InferenceSession", "CPUExecutionProvider", "get_available_providers"}
    users = {name for name, tree in TREES.items() if wanted & {w for _, w in _words(tree)}}
    assert users == {"onnx_adapt.ort"}


def test_the_library_never_prints_asks_or_exits() -> None:
    """Only the command line does; a session's start may redirect stderr in the door."""
    names = {"print", "input", "exit", "quit", "breakpoint"}
    attributes = {"stdout", "stderr", "stdin", "__stdout__", "__stderr__", "exit", "_exit"}
    talking = [
        f"{name}, line {node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if not name.startswith("onnx_adapt.cli")
        if (isinstance(node, ast.Name) and node.id in names)
        or (
            isinstance(node, ast.Attribute)
            and node.attr in attributes
            and isinstance(node.value, ast.Name)
            and node.value.id in ("sys", "os")
        )
    ]
    assert talking == []


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function's body, without decorators, signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_each_file_of_tests_runs_alone() -> None:
    """What tests of two folders share is in `fixtures/`: a test sees only its own folder."""
    tests = {path.stem: path.parent for path in Path(__file__).parents[1].rglob("test_*.py")}
    strangers = [
        f"{home / name} imports {imported}"
        for name, home in tests.items()
        for imported in _imports(ast.parse((home / f"{name}.py").read_text(encoding="utf-8")))
        if (known := imported.split(".")[0]) in tests and tests[known] != home
    ]
    assert strangers == []


def test_files_stay_short() -> None:
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
        for path, tree in FILES.items()
        for node in ast.walk(tree)
        if _begins_like_a_slot(node)
    }
    assert holders == {"slot/names.py"}


def test_functions_stay_within_40_lines() -> None:
    """Of a function its body counts: a signature, its options and a docstring may be long."""
    long_functions = [
        f"{name}.{node.name}: {_lines(node)} lines"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if _lines(node) > 40
    ]
    assert long_functions == []


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
    *("AdaptError", "AdaptedFolder", "Adapter", "AdapterSession", "Checkpoint", "Model"),
    *("Inspection", "Quantised", "Report", "Site"),
    *("compress", "inspect", "measure_loss", "merge", "quantize", "subtract", "train"),
    *("Slot", "add_head", "bake", "blend", "build_adapter", "calibrate", "convert", "extract"),
    *("export", "fill"),
    *(
        "find_sites",
        "insert",
        "insert_checkpoint",
        "insert_folder",
        "list_slots",
        "load_adapter",
        "load_checkpoint",
    ),
    *("make_adapter", "open_model", "pack_rows", "remove", "save_adapter"),
    *("save_checkpoint", "save_model"),
    "verify",
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


def test_the_map_of_the_code_has_every_file_and_says_what_its_docstring_says() -> None:
    page = code_map.PAGE.read_text(encoding="utf-8")
    assert code_map.updated(page) == page, "run tools/code_map.py"
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {name.removesuffix(".py") for name in files} | rooms == set(code_map.ROOMS)
