"""Which tests `tools/test --quick` leaves out: the long ones, and those that fetch models."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent

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
    *("graph/test_resolve.py::test_thousands", "graph/test_resolve.py::test_twenty_thousand"),
    "checkpoints/test_checkpoints.py::test_the_same_checkpoint",
    # With the 108 MB of models that are fetched.
    *("edit/test_remove.py::test_fp16", "graph/test_sites_graphs.py"),
)
"""Beginnings of the names of tests, as pytest writes them below this folder."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them."""
    for item in items:
        if TESTS in item.path.parents:
            name = item.nodeid.partition("tests/")[2]
            if name.startswith(SLOW):
                item.add_marker(pytest.mark.slow)
