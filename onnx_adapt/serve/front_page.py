"""The first page of a server: what it is, what it serves, and what can be asked of it."""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping
from typing import Any

from onnx_adapt import __version__

_ADDRESSES = {
    "/v2/health/ready": ("GET", "whether requests are taken"),
    "/v2/models": ("GET", "the base, the adapters and the aliases"),
    "/v2/models/{model}": ("GET", "the inputs and outputs of one of them"),
    "/v2/models/{model}/infer": ("POST", "run it: the Open Inference Protocol, version 2"),
    "/v2/repository/index": ("POST", "every adapter, and why it is not served"),
    "/v2/repository/models/{model}/load": ("POST", "read an adapter's file, or set an alias"),
    "/v1/models": ("GET", "the same models, as OpenAI has them"),
    "/v1/embeddings": ("POST", "vectors of texts, as OpenAI has them"),
    "/v1/completions": ("POST", "texts that go on, as OpenAI has them"),
    "/v1/chat/completions": ("POST", "the next turn of a chat, as OpenAI has it"),
    "/metrics": ("GET", "what is counted, as Prometheus reads it"),
}
"""What can be asked of a server, how, and what that is."""


def described(base: str, names: Collection[str], paths: Collection[str]) -> dict[str, Any]:
    """What a server is.

    Args:
        base: What the base is called.
        names: The adapters and aliases that are served.
        paths: The paths that the server answers.

    Example:
        >>> found = described("bert", ["fr", "fr@stable"], ["/v2/models"])
        >>> found["adapters"], found["aliases"], found["addresses"]
        (1, 1, {'/v2/models': 'GET: the base, the adapters and the aliases'})
    """
    aliases = sum("@" in name for name in names)
    return {
        "name": "onnx-adapt",
        "version": __version__,
        "model": base,
        "adapters": len(names) - aliases,
        "aliases": aliases,
        "addresses": {
            path: f"{method}: {what}"
            for path, (method, what) in _ADDRESSES.items()
            if path in paths
        },
    }


def page(about: Mapping[str, Any], root: str) -> str:
    """The page for people.

    Args:
        about: What `described` tells.
        root: The path before those of the addresses, or ''.
    """
    lines = []
    for path, what in about["addresses"].items():
        shown = html.escape(root + path)
        if what.startswith("GET") and "{" not in path:
            shown = f'<a href="{shown}">{shown}</a>'
        lines.append(f"<tr><td>{shown}<td>{html.escape(what)}")
    rows, model = "\n".join(lines), html.escape(about["model"])
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{model} - onnx-adapt</title>
<h1>{model}</h1>
<p>onnx-adapt {about["version"]} serves this model, {about["adapters"]} adapters and
{about["aliases"]} aliases.</p>
<table>
{rows}
</table>
"""
