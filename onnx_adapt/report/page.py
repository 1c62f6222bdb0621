"""The report page: one HTML file that loads nothing else."""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING

from onnx_adapt.errors import AdaptError
from onnx_adapt.report.drawing import draw
from onnx_adapt.report.numbers import by_unit, count, file_size, power, seconds, share
from onnx_adapt.report.overview import Overview
from onnx_adapt.report.summary import by_need, in_one_sentence, layers_of, needs_a_look
from onnx_adapt.report.whole_graph import COLUMN, LANE, MARK, MOST
from onnx_adapt.words import plain

if TYPE_CHECKING:
    from jinja2 import Environment


_FILTERS = (by_unit, count, file_size, power, seconds, share)
"""The functions that the template calls by their names."""


def render(overview: Overview) -> str:
    """Render an overview as one HTML page.

    The page has no scripts and loads nothing. Names from the model are escaped.

    Raises:
        AdaptError: If jinja2 or pygal is not installed.

    Example:
        >>> import onnx_adapt as oa
        >>> from onnx_adapt.report.overview import overview
        >>> base = oa.open_model("models/plcmos.onnx")
        >>> adapted = oa.insert(base, after="Conv_0")
        >>> page = render(overview(base, adapted))
        >>> page.startswith("<!doctype html>")
        True
    """
    require_libraries()
    from markupsafe import Markup

    from onnx_adapt.report.plots import effect_plot, error_plot, map_plot

    plots = {"map": map_plot, "error": error_plot, "effect": effect_plot}
    folder = files(__package__)
    template = _environment().from_string((folder / "page.html").read_text(encoding="utf-8"))
    return str(
        template.render(
            overview=overview,
            report=overview.report,
            costs=overview.costs,
            # Not escaped: the style sheet is a file of this package, and the plots escape
            # the names that they show.
            style=Markup((folder / "style.css").read_text(encoding="utf-8")),
            plots={name: Markup(plot(overview)) for name, plot in plots.items()},
            sentence=in_one_sentence(overview),
            numbers={view.slot.name: n for n, view in enumerate(overview.slots, 1)},
            places=by_need(overview.slots),
            layers=layers_of(overview.slots),
            unit={"column": COLUMN, "lane": LANE, "mark": MARK, "most": MOST},
        )
    )


def _environment() -> Environment:
    """The templates' settings: all text is escaped, an unknown name is an error."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for filter_ in (*_FILTERS, draw):
        environment.filters[filter_.__name__] = filter_
    environment.tests[needs_a_look.__name__] = needs_a_look
    return environment


def _printable(value: object) -> object:
    """Text without control characters; what is markup already stays as it is."""
    from markupsafe import Markup

    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def require_libraries() -> None:
    """Raise unless the libraries that the page needs are installed.

    Raises:
        AdaptError: If jinja2 or pygal is not installed.
    """
    for name in ("jinja2", "pygal"):
        if find_spec(name) is None:
            raise AdaptError(
                f"the report page needs {name}, which is not installed",
                hint="pip install 'onnx-adapt[report]', or take the data with --json",
            )
