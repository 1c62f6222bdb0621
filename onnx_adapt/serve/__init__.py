"""A server of one model and many adapters: Ray Serve, the Open Inference Protocol.

`build_app` makes the application; `onnx-adapt serve`, `serve run` and Serve config files run
it. Ray and fsspec are imported here and nowhere else: `pip install 'onnx-adapt[serve]'`.
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
        from onnx_adapt.serve.app import application
    except ModuleNotFoundError as error:
        raise UnprovableError(
            f"{error.name} is not installed", hint="pip install 'onnx-adapt[serve]'"
        ) from error
    return application(settings)
