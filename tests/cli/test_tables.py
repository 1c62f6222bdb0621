"""Tables on a pipe are what rich would draw with no limit to the width."""

from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnx_adapt.cli.outputs import print_table


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="empty"),
        pytest.param(
            [("a", 1, None), ("longer than its head", -20.5, "[b]x[/b]")], id="numbers"
        ),
        pytest.param([("\u5c42/\u6ce8\u610f", 3, "\u00e9"), ("e\u0301", "x", "")], id="wide"),
    ],
)
def test_a_piped_table_is_the_one_that_rich_draws(
    rows: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(("slot", "width", "parts")):
        numbers = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        table.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    drawn = StringIO()
    Console(file=drawn, width=1_000_000).print(table)
    print_table(("slot", "width", "parts"), rows)
    assert capsys.readouterr().out == drawn.getvalue()
