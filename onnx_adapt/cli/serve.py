"""`onnx-adapt serve`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from onnx_adapt.cli.outputs import say
from onnx_adapt.cli.serve_fleet import FLEET, fleet_options
from onnx_adapt.cli.serve_llm import llm_options, read_llm
from onnx_adapt.errors import UnprovableError

if TYPE_CHECKING:
    from onnx_adapt.serve.access import Access
    from onnx_adapt.serve.llm.facts import Writing
    from onnx_adapt.serve.settings import Settings
    from onnx_adapt.serve.warm import Warm

_CERTIFICATE = ("ssl_certfile", "ssl_keyfile")
_EMBED = ("embed", "tokenizer", "pooling", "normalize")
_FILES = ("model", "adapters", "token_file", "access_log")
"""What other processes of the server open, from other folders."""
_RAY_ALONE = ("replicas", "address", "gateways", "route_prefix", "metrics_port")
"""The options that mean nothing to a server of one process."""


@click.command("serve", short_help="Serve a model and a folder of adapters over HTTP.")
@click.argument("model", type=click.Path(), required=False)
@click.option("--adapters", required=True, help="The folder of adapters: a path or a URL.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="The address to listen on; 0.0.0.0 is all.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="The port to listen on; 0 is any that is free.",
)
@click.option(
    "--grpc-port",
    type=click.IntRange(1, 65535),
    help="The port to take gRPC calls on as well; not on Ray.",
)
@click.option(
    "--token-file",
    default="",
    help="A file with the bearer token that clients must send.",
)
@click.option("--ssl-certfile", default="", help="A file with certificates, for TLS.")
@click.option("--ssl-keyfile", default="", help="A file with their private key.")
@click.option(
    "--embed", is_flag=True, help="Serve /v1/embeddings as OpenAI has it; not on Ray."
)
@click.option("--tokenizer", help="With --embed: the file tokenizer.json of the model.")
@click.option(
    "--pooling",
    type=click.Choice(["mean", "cls", "last"]),
    help="With --embed: how the vectors of a text's tokens become one; by default mean.",
)
@click.option("--normalize", is_flag=True, help="With --embed: give vectors length 1.")
@llm_options
@fleet_options
@click.option("--name", default="", help="The name of the base; by default that of its file.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    help="How many CPUs a run of the model uses.",
)
@click.option(
    "--provider",
    default="",
    help="The execution provider, such as `cuda` or `cuda:device_id=1`; by default the CPU.",
)
@click.option(
    "--max-adapters",
    type=click.IntRange(1),
    default=32,
    help="How many adapters stay loaded.",
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
    "--grace",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="How long requests may still take when the server is told to end, in seconds.",
)
@click.option(
    "--replicas", type=click.IntRange(1), help="On Ray: how many copies of the model to run."
)
@click.option("--address", help="On Ray: the cluster to join, instead of a Ray started here.")
@click.option(
    "--gateways", type=click.IntRange(1), help="On Ray: how many processes serve HTTP."
)
@click.option("--route-prefix", help="On Ray: the path before those of the protocol.")
@click.option(
    "--metrics-port",
    type=click.IntRange(1, 65535),
    help="On Ray: the port for metrics in the format of Prometheus.",
)
def command(
    model: str | None,
    host: str,
    port: int,
    grpc_port: int | None,
    grace: float,
    **options: Any,
) -> None:
    """Serve MODEL and a folder of adapters over HTTP.

    The server speaks the Open Inference Protocol 2, like KServe and Triton, and runs until
    it is interrupted. New and changed adapters in the folder are checked and then served.
    It is one process. With --replicas or --address it is many, on Ray Serve. With --llm
    instead of MODEL it writes texts, like the servers of OpenAI and vLLM.

    \b
      onnx-adapt serve adapted.onnx --adapters adapters/
      curl localhost:8000/v2/models/fr
    """
    from onnx_adapt.ort import read_providers
    from onnx_adapt.serve.access import read_access
    from onnx_adapt.serve.settings import read_settings
    from onnx_adapt.serve.warm import read_warm

    model, write = read_llm(model, options)
    embed = _embed(**{name: options.pop(name) for name in _EMBED})
    certificate = [options.pop(name) for name in _CERTIFICATE]
    fleet = {name: options.pop(name) for name in FLEET}
    on_ray = {name: options.pop(name) for name in _RAY_ALONE}
    on_ray = {name: value for name, value in on_ray.items() if value is not None}
    options["model"] = model
    options |= {name: _absolute(options[name]) for name in _FILES}
    access = read_access(options["token_file"], *certificate)
    if options["provider"] and "address" not in on_ray:
        read_providers(options["provider"])  # before replicas fail one after the other
    if "replicas" in on_ray or "address" in on_ray:
        alone = {"grpc-port": grpc_port, "embed": embed, **fleet}
        for name in filter(alone.get, alone):
            raise click.UsageError(f"--{name} is for a server of one process, not for Ray")
        _serve_on_ray(options, host, port, grace, access, **on_ray)
        return
    for name in on_ray:
        raise click.UsageError(f"--{name.replace('_', '-')} needs --replicas or --address")
    settings = read_settings(options)
    warm = read_warm(fleet["preload"], fleet["pin"], settings.max_adapters)
    _serve_here(settings, host, port, grpc_port, grace, embed, write, access, warm)


def _absolute(path: str) -> str:
    return path if path in ("", "-") or "://" in path else os.path.abspath(path)


def _embed(
    *, embed: bool, tokenizer: str | None, pooling: str | None, normalize: bool
) -> tuple[str, str, bool] | None:
    if not embed:
        if tokenizer or pooling or normalize:
            raise click.UsageError("--tokenizer, --pooling and --normalize need --embed")
        return None
    if not tokenizer:
        raise click.UsageError("--embed needs --tokenizer")
    return tokenizer, pooling or "mean", normalize


def _serve_here(
    settings: Settings,
    host: str,
    port: int,
    grpc_port: int | None,
    grace: float,
    embed: tuple[str, str, bool] | None,
    write: Writing | None,
    access: Access,
    warm: Warm,
) -> None:
    try:
        from onnx_adapt.serve.one_process import Embed, listen, serve_here
    except ModuleNotFoundError as error:
        raise UnprovableError(
            f"{error.name} is not installed", hint="pip install 'onnx-adapt[serve]'"
        ) from error
    scheme = "https" if access.certificate else "http"
    with listen(host, port) as listening:
        found = listening.getsockname()[1]
        own = f"[{host}]" if ":" in host else host
        serve_here(
            settings,
            listening,
            grace,
            lambda: _say_serving(f"{scheme}://{own}:{found}"),
            f"{own}:{grpc_port}" if grpc_port else "",
            Embed(*embed) if embed else None,
            write,
            access,
            warm,
        )


def _serve_on_ray(
    options: dict[str, Any],
    host: str,
    port: int,
    grace: float,
    access: Access,
    *,
    address: str | None = None,
    route_prefix: str = "/",
    metrics_port: int | None = None,
    **sizes: int,
) -> None:
    from onnx_adapt.serve import build_app
    from onnx_adapt.serve.records import check_access_log
    from onnx_adapt.serve.settings import read_settings

    settings = read_settings({**options, **sizes})
    if settings.access_log and address is None:  # a cluster has it on other nodes
        check_access_log(settings.access_log)
    app = build_app({**options, **sizes})
    from onnx_adapt.serve.ray_running import Place, running

    place = Place(
        name=settings.base,
        host=host,
        port=port,
        route_prefix=route_prefix,
        address=address,
        metrics_port=metrics_port,
        cpus=settings.replicas * settings.threads,
        grace_s=grace,
        certificate=access.certificate,
        key=access.key,
    )
    with running(app, place) as (url, wait):
        _say_serving(url)
        wait()


def _say_serving(url: str) -> None:
    say(f"serving on {url}/v2; Ctrl-C ends it")
