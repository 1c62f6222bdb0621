"""An overview of an adapted model as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec

from onnx_adapt.errors import AdaptError
from onnx_adapt.report.numbers import by_unit, count, power, seconds, share
from onnx_adapt.report.overview import Overview
from onnx_adapt.words import plain


def render(overview: Overview) -> str:
    """The page: no scripts, no network, names of the model escaped.

    Raises:
        AdaptError: If the libraries it is made with are not installed.

    Example:
        >>> import onnx_adapt as oa
        >>> from onnx_adapt.report.overview import overview
        >>> base = oa.open_model("models/dnsmos-p808.onnx")
        >>> adapted = oa.insert(base, after="conv2d_5")
        >>> page = render(overview(base, adapted))
        >>> page.startswith("<!doctype html>")
        True
    """
    require_libraries()
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from onnx_adapt.report.drawing import draw
    from onnx_adapt.report.plots import effect_plot, error_plot, map_plot

    def shown(value: object) -> object:
        known = isinstance(value, str) and not isinstance(value, Markup)
        return plain(str(value)) if known else value

    environment = Environment(
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., object]] = {
        "by_unit": by_unit,
        "count": count,
        "power": power,
        "seconds": seconds,
        "share": share,
        "draw": draw,
    }
    environment.filters.update(filters)
    folder = files(__package__)
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    return template.render(
        overview=overview,
        report=overview.report,
        costs=overview.costs,
        # Both are made here, out of nothing but this package's files and numbers.
        style=Markup((folder / "style.css").read_text(encoding="utf-8")),
        plots={
            name: Markup(plot(overview))
            for name, plot in (
                ("map", map_plot),
                ("error", error_plot),
                ("effect", effect_plot),
            )
        },
    )


def require_libraries() -> None:
    """Raise unless what the page is made with is installed.

    Raises:
        AdaptError: With what to install.
    """
    for name in ("jinja2", "pygal"):
        if find_spec(name) is None:
            raise AdaptError(
                f"the report page needs {name}, which is not installed",
                hint="pip install 'onnx-adapt[report]', or take the data with --json",
            )
