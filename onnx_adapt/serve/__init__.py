"""A server of one model and many adapters: the Open Inference Protocol over HTTP.

`onnx-adapt serve` is one process (`one_process.py`): `pip install 'onnx-adapt[serve]'`. Or it
is many, on Ray Serve (`ray_app.py`): `pip install 'onnx-adapt[serve-ray]'`; `build_app` makes
its application for `serve run` and Serve config files. All else is the same code for both.
"""

from __future__ import annotations

from typing import Any

from onnx_adapt.errors import UnprovableError

__all__ = ["build_app"]


def build_app(arguments: dict[str, Any]) -> Any:
    """The Ray Serve application of a model and its adapters.

    Args:
        arguments: The fields of `onnx_adapt.serve.settings.Settings`, as `serve run` and a
            Serve config file give them.

    Returns:
        What `ray.serve.run` takes.

    Raises:
        AdaptError: If an argument is unknown or wrong, the model has no swappable slots, or
            Ray is not installed.

    Example:
        >>> build_app({"model": "adapted.onnx"})
        Traceback (most recent call last):
        ...
        onnx_adapt.errors.RequestError: `adapters` is missing
        hint: give a path
    """
    from onnx_adapt.serve.settings import read_settings

    settings = read_settings(arguments)
    try:
        from onnx_adapt.serve.ray_app import application
    except ModuleNotFoundError as error:
        raise UnprovableError(
            f"{error.name} is not installed", hint="pip install 'onnx-adapt[serve-ray]'"
        ) from error
    return application(settings)
