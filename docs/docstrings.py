"""Docstrings as the site needs them: Sphinx roles and doctests become Markdown.

In the sources they stay what editors, ``help()`` and doctest read.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[1]
ROLE = re.compile(r":(?:func|class|meth|mod|data):`~?([\w.]+)`")
DOCTEST = re.compile(r"(?:^[ ]*>>> .*\n?)(?:^(?![ ]*$).*\n?)*", flags=re.M)
LITERAL = re.compile(r"::\n\n((?:^(?:[ ]{4,}.*)?\n?)+)", flags=re.M)


def public_names() -> dict[str, str]:
    """What has an entry in the reference: short name and full one, with the full path of each."""
    found: dict[str, str] = {}
    for package, folder in (("latentdem_ext", ROOT), ("latentdem", ROOT / "python")):
        tree = ast.parse((folder / package / "__init__.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in ast.literal_eval(node.value):
                    found[name] = found[f"{package}.{name}"] = f"{package}.{name}"
    return found


def to_markdown(text: str, names: dict[str, str]) -> str:
    """A docstring with links for roles and fences for examples.

    >>> print(to_markdown("See :func:`deblur`.", {"deblur": "latentdem.deblur"}))
    See [`deblur`][latentdem.deblur].
    """

    def role(match: re.Match[str]) -> str:
        target = names.get(match[1])
        return f"[`{match[1]}`][{target}]" if target else f"`{match[1]}`"

    def example(match: re.Match[str]) -> str:
        lines = textwrap.dedent(match[0]).rstrip().splitlines()
        # What only doctest reads.
        body = "\n".join(re.sub(r"\s+# doctest: .*$", "", line) for line in lines)
        return f"\n```pycon\n{body}\n```\n"

    def literal(match: re.Match[str]) -> str:
        return f":\n\n```text\n{textwrap.dedent(match[1]).strip()}\n```\n\n"

    return DOCTEST.sub(example, LITERAL.sub(literal, ROLE.sub(role, text)))


class PlainDocstrings(griffe.Extension):
    """Runs :func:`to_markdown` over every docstring that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.names = public_names()

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value, self.names)
