"""`onnx-adapt sites`."""

from __future__ import annotations

import click

from onnx_adapt.cli import options
from onnx_adapt.cli.complete import site_names
from onnx_adapt.cli.outputs import print_json, print_table, say, say_next
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
@options.as_json
def command(model: str, pattern: str | None, all_tensors: bool, as_json: bool) -> None:
    """List the sites of MODEL: the tensors that can take an adapter.

    PATTERN is a part of a name, or a glob. It is matched against addresses, nodes, tensors
    and modules.

    \b
      onnx-adapt sites model.onnx '*.output.dense'
    """
    import onnx_adapt as oa
    from onnx_adapt.slot.manifest import read_manifest
    from onnx_adapt.slot.required import must_be_fed

    with patience(f"reading {model}"):
        opened = oa.open_model(model)
        sites = oa.find_sites(opened, pattern, all_tensors=all_tensors)
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
        name = good[0].module or good[0].node or good[0].address
        say_next("insert", model, "--after", name)
    elif not all_tensors:
        say_next("sites", model, "--all")
