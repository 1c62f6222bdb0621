"""`onnx-adapt sites`."""

from __future__ import annotations

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.complete import site_names
from onnx_adapt.cli.outputs import emit, print_json, print_table, say, say_next
from onnx_adapt.cli.progress import patience


@click.command("sites", short_help="List the sites where an adapter can go.")
@click.argument("model", type=click.Path())
@click.argument("pattern", required=False, shell_complete=site_names)
@click.option(
    "--all",
    "all_tensors",
    is_flag=True,
    help="List every float tensor, not only the outputs of layers.",
)
@click.option("--names", is_flag=True, help="Print only what --after takes, one a line.")
@options.as_json
def command(
    model: str, pattern: str | None, all_tensors: bool, names: bool, as_json: bool
) -> None:
    """List the sites of MODEL: the tensors that can take an adapter.

    PATTERN is a name or a glob, as `insert --after` takes it, and shows what that would
    insert after. Any other PATTERN shows what it is a part of: an address, a node, a tensor
    or a module. --names prints the addresses of those that can take an adapter.

    \b
      onnx-adapt sites model.onnx '*.output.dense'
      onnx-adapt sites model.onnx --names | grep dense
    """
    if names and as_json:
        raise click.UsageError("--names has no effect with --json")
    import onnx_adapt as oa
    from onnx_adapt.slot.manifest import read_manifest
    from onnx_adapt.slot.required import must_be_fed

    with patience(f"reading {model}"):
        opened = oa.open_model(model)
        sites = oa.find_sites(opened, pattern, all_tensors=all_tensors)
    if names:
        for site in sites.good:
            emit(site.address)
        return
    if as_json:
        print_json({"sites": [site.as_dict() for site in sites]})
        return
    print_table(*sites.table())
    manifest = read_manifest(opened.proto)
    if manifest is not None and must_be_fed(manifest):
        say(f"{model} is exported: insert into the model that it was exported from")
        return
    good = sites.good
    say(f"{len(good)} of {len(sites)} can take an adapter")
    if good:
        # Most adapters go behind a product, few behind an embedding or a norm.
        first = next((site for site in good if site.multiplies), good[0])
        say_next("insert", model, "--after", first.module or first.node or first.address)
    elif not all_tensors:
        say_next("sites", model, "--all")
