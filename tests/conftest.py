"""The long tests, and those that fetch models: `tools/test --quick` leaves them out.

The others come after them, so that the two processes of `tools/test` end at about one time.
"""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent

collect_ignore = ["fuzz/run.py"]
"""Searched for doctests, it would instrument the whole package, for all tests."""

SLOW = (
    # Whole rooms: a server, exporters' models, trained adapters of many libraries.
    *("serve/", "pipelines/", "parts/", "diffusion/", "genai/", "exports/", "qdq/", "deploy/"),
    *("training/", "report/", "proof/", "test_fuzz.py"),
    # What runs examples, pages and benchmarks from beginning to end.
    *("house/test_two_tasks.py", "house/test_benchmarks.py", "house/test_browser_example.py"),
    *("house/test_readme.py", "house/test_notebook.py", "house/test_truths.py"),
    # Long in one place.
    *("cli/test_talk.py", "cli/test_terminal.py", "cli/test_train_command.py"),
    *("session/test_session_load.py", "session/test_seq2seq_loops.py"),
    *("model/test_hostile_sizes.py", "model/test_thin.py::test_every_model"),
    *("edit/test_odd_models.py", "edit/test_graphsurgeon.py", "edit/test_export.py"),
    "graph/test_resolve.py::test_thousands",
    *("checkpoints/test_checkpoints.py", "checkpoints/test_optimised_bases.py"),
    *("checkpoints/test_quantised_bases.py", "checkpoints/test_image_adapters.py"),
    *("adapter/test_adapter_files_hostile.py", "model/test_crash_safety.py"),
    *("edit/test_mutation_laws.py", "edit/test_insert_laws.py", "edit/test_weight_slots.py"),
    # With the 108 MB of models that are fetched.
    *("edit/test_remove.py::test_fp16", "graph/test_sites_graphs.py"),
)
"""Beginnings of the names of tests, as pytest writes them below this folder."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them, and take their files first."""
    slow = set()
    for item in items:
        if TESTS in item.path.parents:
            name = item.nodeid.partition("tests/")[2]
            if name.startswith(SLOW):
                item.add_marker(pytest.mark.slow)
                slow.add(item.path)
    items.sort(key=lambda item: item.path not in slow)
