"""What ``mkdocs`` does beyond Markdown: nothing that stands elsewhere is written a second time.

Comments in a page are replaced while it is built::

    <!-- include python/README.md -->                     a document of the repository
    <!-- include README.md: Two commands -->              one section of it
    <!-- table speed_table -->                            a function of benchmarks/tables.py
    <!-- commands -->                                     every command's help

The mark ``no-run: reason`` of a Python block, which tests read, is taken off.

Links of an included document are relative to its own folder.  They are turned into links to the
page that includes that document, to a published copy (pictures), or into plain names (sources).
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r"^<!-- include ([\w./-]+)(?:: (.+?))? -->$", flags=re.M)
TABLE = re.compile(r"^<!-- table (\w+) -->$", flags=re.M)
COMMANDS = re.compile(r"^<!-- commands -->$", flags=re.M)
NOT_RUN = re.compile(r"^```python no-run: .*$", flags=re.M)
# Code comes first in the pattern: what looks like a link there, such as layers[0](image), is none.
LINK = re.compile(r"^```.*?^```$|`[^`\n]+`|(!?)\[([^\[\]]+)\]\(([^()\s]+)\)", flags=re.M | re.S)
UNIT = re.compile(r"(?<=\d) (?=(?:dB|MB|MFLOP|ms)\b)")
PICTURES = {".jpg", ".png", ".svg", ".webp"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Publish the pictures that pages and included documents show."""
    documents = {ROOT / "docs" / file.src_uri for file in files.documentation_pages()}
    documents |= {ROOT / name for name in page_of_document(files)}
    for document in sorted(documents):
        for _, _, link in LINK.findall(document.read_text()):
            path = repository_path(document, link)
            if path and PurePosixPath(path).suffix in PICTURES and not path.startswith("docs/"):
                address = published(path)
                if files.get_file_from_path(address) is None:
                    source = str(ROOT / path)
                    files.append(File.generated(config, address, abs_src_path=source))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what the comments ask for, then lead every link to where it is on the site."""
    here = ROOT / "docs" / page.file.src_uri
    pages = page_of_document(files)

    def include(match: re.Match[str]) -> str:
        document = ROOT / match[1]
        text = document.read_text()
        if match[2]:
            text = section(text, match[2], name=match[1])
        return relink(text, document, page.file.src_uri, pages)

    markdown = NOT_RUN.sub("```python", markdown)
    markdown = relink(markdown, here, page.file.src_uri, pages)
    markdown = INCLUDE.sub(include, markdown)
    markdown = TABLE.sub(lambda match: getattr(tables(), match[1])(), markdown)
    markdown = COMMANDS.sub(lambda _: command_reference(), markdown)
    # In tables a figure and its unit stay on one line.
    lines = (UNIT.sub("\N{NO-BREAK SPACE}", x) if x[:1] == "|" else x for x in markdown.split("\n"))
    return "\n".join(lines)


def page_of_document(files: Files) -> dict[str, str]:
    """Documents of the repository that a page includes as a whole, with that page."""
    return {
        document: file.src_uri
        for file in files.documentation_pages()
        for document, part in INCLUDE.findall((ROOT / "docs" / file.src_uri).read_text())
        if not part
    } | {"README.md": "index.md"}


def section(text: str, heading: str, *, name: str) -> str:
    """The lines under a heading, without it, up to the next one of any level."""
    outside = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    # Comments in a shell's or Python's block look like headings.
    hidden = "".join(
        part.replace("\n#", "\n\0") if i % 2 else part for i, part in enumerate(outside)
    )
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", hidden, flags=re.M | re.S)
    if match is None:
        raise PluginError(f"{name} has no heading '{heading}'")
    return match[1].replace("\0", "#").strip()


def repository_path(document: Path, link: str) -> str | None:
    """The file that a relative link of ``document`` leads to, from the repository's root."""
    target = link.split("#")[0]
    if re.match(r"[a-z]+:", link) or not target:
        return None
    path = Path(os.path.normpath(document.parent / target))
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None


def published(path: str) -> str:
    """Where a picture of the repository lies on the site."""
    return f"files/{path}"


def relink(text: str, document: Path, page: str, pages: dict[str, str]) -> str:
    """``text`` of ``document`` with its links as the page at ``page`` needs them."""

    def lead(match: re.Match[str]) -> str:
        mark, label, link = match.groups(default="")
        path = repository_path(document, link)
        if path is None:
            return match[0]
        if not (ROOT / path).exists():
            raise PluginError(f"{document.relative_to(ROOT)} links to {path}, which is not there")
        anchor = link[len(link.split("#")[0]) :]
        if path in pages:
            target = pages[path]
        elif path.startswith("docs/") and (ROOT / path).is_file():
            target = path.removeprefix("docs/")
        elif PurePosixPath(path).suffix in PICTURES:
            target = published(path)
        else:
            name = path.rsplit("/", 1)[-1]
            return f"`{path}`" if label.strip("`") in (name, path) else f"{label} (`{path}`)"
        start = PurePosixPath(page).parent
        return f"{mark}[{label}]({os.path.relpath(target, start)}{anchor})"

    return LINK.sub(lead, text)


def tables() -> ModuleType:
    """The module that makes every table of the documents from the stored results."""
    path = ROOT / "python" / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("benchmark_tables", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_reference() -> str:
    """Every command with its help, arguments and options, from the program itself."""
    sys.path.insert(0, str(ROOT / "python"))
    try:
        from typer.main import get_command

        from latentdem.cli import app
    finally:
        sys.path.pop(0)
    return "\n".join(_group(get_command(app), "latentdem"))


def _group(command: Any, name: str) -> list[str]:
    lines: list[str] = []
    for child, entry in command.commands.items():
        full = f"{name} {child}"
        lines += _group(entry, full) if hasattr(entry, "commands") else _command(entry, full)
    return lines


def _command(command: Any, name: str) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join([name, *(_metavar(p) for p in arguments), "[OPTIONS]" if options else ""])
    lines = [f"## {name}", "", "```text", usage.strip(), "```", "", *command.help.splitlines(), ""]
    if arguments:
        lines += ["| argument | |", "|---|---|"]
        lines += [f"| `{_metavar(p)}` | {_help(p)} |" for p in arguments]
        lines.append("")
    if options:
        lines += ["| option | | default |", "|---|---|---|"]
        for option in options:
            names = ", ".join(f"`{flag}`" for flag in option.opts)
            lines.append(f"| {names} | {_help(option)} | {_default(option)} |")
        lines.append("")
    return lines


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _help(parameter: Any) -> str:
    return " ".join((parameter.help or "").split()).replace("|", "\\|")


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.default is None or option.default is False or option.default == []:
        return ""
    return f"`{option.default}`"
