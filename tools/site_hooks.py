"""What mkdocs is told beside mkdocs.yml: pages from elsewhere, and pages nobody listed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from onnx_adapt import __version__
from onnx_adapt.cli import cli

COMMANDS = "reference/commands.md"
ELSEWHERE = {
    "SECURITY.md": "security.md",
    "benchmarks/results/README.md": "results/index.md",
    "benchmarks/results/results.svg": "results/results.svg",
}
"""Files of the repository, outside docs/, that are on the site, and where."""
INTRODUCTION = """# Commands

Data goes to stdout, talk to stderr; `--quiet` leaves only errors. `--json` is one document
with stable keys. Exit status: 0 done, 1 ran and the answer is no, 2 could not do it.
"""


def commands_page() -> str:
    """The help of every command, as the program prints it."""
    root = cli.context_class(
        cli, info_name="onnx-adapt", max_content_width=95, **cli.context_settings
    )
    parts = [INTRODUCTION, _fenced(cli.get_help(root))]
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root, max_content_width=95)
        parts.append(f"## {name}\n\n{_fenced(command.get_help(context))}")
    return "\n".join(parts)


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the version into the header, and pages that the navigation does not name last."""
    config.site_name = f"{config.site_name} {__version__}"
    named = set(_pages(config.nav))
    folder = Path(config.docs_dir)
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.md"))
    more = [{_title(folder / page): page} for page in found if page not in named]
    if more and config.nav is not None:
        config.nav.append({"More": more})
    return config


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [page for item in items for page in _pages(item)]


def _title(path: Path) -> str:
    found = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else path.stem


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of commands, which is nowhere but in the code, and what is elsewhere."""
    files.append(File.generated(config, COMMANDS, content=commands_page()))
    for path, place in ELSEWHERE.items():
        there = Path(config.config_file_path).parent / path
        files.append(File.generated(config, place, abs_src_path=str(there)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links that leave docs/ stay on the site, and so those from above into docs/."""
    if page.file.src_uri in ELSEWHERE.values():
        markdown = markdown.replace("](docs/", "](")
    up = "../" * (page.file.src_uri.count("/") + 1)
    for path, place in ELSEWHERE.items():
        markdown = markdown.replace(f"]({up}{path})", f"]({up.removeprefix('../')}{place})")
    return markdown
