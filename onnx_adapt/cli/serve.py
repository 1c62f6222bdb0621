"""`onnx-adapt serve`."""

from __future__ import annotations

import os
from typing import Any

import click

from onnx_adapt.cli.outputs import say


@click.command("serve", short_help="Serve a model and a folder of adapters over HTTP.")
@click.argument("model", type=click.Path())
@click.option("--adapters", required=True, help="The folder of adapters: a path or a URL.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="The address to listen on; 0.0.0.0 is all.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=8000,
    show_default=True,
    help="The port to listen on.",
)
@click.option("--address", help="The Ray cluster to join; by default Ray is started here.")
@click.option("--name", default="", help="The name of the base; by default that of its file.")
@click.option(
    "--replicas",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="How many copies of the model to run.",
)
@click.option(
    "--threads", type=click.IntRange(1), default=1, help="How many CPUs each replica uses."
)
@click.option(
    "--provider",
    default="",
    help="The execution provider, such as `cuda` or `cuda:device_id=1`; by default the CPU.",
)
@click.option(
    "--gateways", type=click.IntRange(1), default=1, help="How many processes serve HTTP."
)
@click.option(
    "--max-adapters",
    type=click.IntRange(1),
    default=32,
    help="How many adapters each replica keeps loaded.",
)
@click.option(
    "--batching/--no-batching", default=True, help="Run concurrent requests as one batch."
)
@click.option(
    "--batch-axis",
    type=click.IntRange(0),
    help="The axis of the batch, if its dimension is not called `batch`.",
)
@click.option(
    "--max-batch-size",
    type=click.IntRange(1),
    default=64,
    help="The most rows in a batch and in a request.",
)
@click.option(
    "--batch-wait-ms",
    type=click.FloatRange(0),
    default=0.0,
    help="How long the first request of a batch waits for others.",
)
@click.option(
    "--max-body-mb",
    type=click.FloatRange(0.001),
    default=64.0,
    help="The largest request in megabytes.",
)
@click.option(
    "--timeout-s",
    type=click.FloatRange(0.001),
    default=60.0,
    help="How long a request may take.",
)
@click.option(
    "--poll-s",
    type=click.FloatRange(0.05),
    default=1.0,
    help="How often to look for new adapters, in seconds.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(1, 65535),
    help="The port for metrics in the format of Prometheus.",
)
def command(
    model: str,
    host: str,
    port: int,
    address: str | None,
    metrics_port: int | None,
    **options: Any,
) -> None:
    """Serve MODEL and a folder of adapters over HTTP.

    The server speaks the Open Inference Protocol 2, like KServe and Triton, and runs until
    it is interrupted. New and changed adapters in the folder are checked and then served.

    \b
      onnx-adapt serve adapted.onnx --adapters adapters/
      curl localhost:8000/v2/models/fr
    """
    from onnx_adapt.ort import read_providers
    from onnx_adapt.serve import build_app

    if "://" not in options["adapters"]:
        options["adapters"] = os.path.abspath(options["adapters"])
    if options["provider"] and address is None:
        read_providers(options["provider"])  # before replicas fail one after the other
    app = build_app({"model": os.path.abspath(model), **options})
    from onnx_adapt.serve.running import running

    cpus = options["replicas"] * options["threads"]
    started = running(app, host, port, address=address, metrics_port=metrics_port, cpus=cpus)
    with started as wait:
        say(f"serving on http://{host}:{port}/v2; Ctrl-C ends it")
        wait()
