"""`onnx-adapt serve`."""

from __future__ import annotations

import os
from typing import Any

import click

from onnx_adapt.cli.show import say


@click.command("serve", short_help="Serve a model and a folder of adapters.")
@click.argument("model", type=click.Path())
@click.option("--adapters", required=True, help="The folder of adapters: a path or a URL.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--address", help="A Ray cluster to join; by default Ray starts here.")
@click.option("--name", default="", help="What the base is called; else as its file.")
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, help="CPUs of each replica.")
@click.option("--gateways", type=click.IntRange(1), default=1, help="Processes for HTTP.")
@click.option("--max-adapters", type=click.IntRange(1), default=32, help="In each replica.")
@click.option("--batching/--no-batching", default=True, help="Join concurrent requests.")
@click.option("--batch-axis", type=click.IntRange(0), help="If it is not called `batch`.")
@click.option("--max-batch-size", type=click.IntRange(1), default=64, help="In rows.")
@click.option("--batch-wait-ms", type=click.FloatRange(0), default=0.0, help="For others.")
@click.option("--max-body-mb", type=click.FloatRange(0.001), default=64.0)
@click.option("--timeout-s", type=click.FloatRange(0.001), default=60.0)
@click.option("--poll-s", type=click.FloatRange(0.05), default=1.0, help="Between looks.")
@click.option("--metrics-port", type=click.IntRange(1, 65535), help="For Prometheus.")
def command(
    model: str,
    host: str,
    port: int,
    address: str | None,
    metrics_port: int | None,
    **options: Any,
) -> None:
    """Serve MODEL and a folder of adapters over HTTP.

    Until it is interrupted. Open Inference Protocol 2, as of KServe and Triton. Adapters
    that appear in the folder, or change, are checked and served.

    \b
      onnx-adapt serve adapted.onnx --adapters adapters/
      curl localhost:8000/v2/models/fr
    """
    from onnx_adapt.serve import build_app

    if "://" not in options["adapters"]:
        options["adapters"] = os.path.abspath(options["adapters"])
    app = build_app({"model": os.path.abspath(model), **options})
    from onnx_adapt.serve.running import running

    cpus = options["replicas"] * options["threads"]
    started = running(app, host, port, address=address, metrics_port=metrics_port, cpus=cpus)
    with started as wait:
        say(f"serving on http://{host}:{port}/v2; Ctrl-C ends it")
        wait()
