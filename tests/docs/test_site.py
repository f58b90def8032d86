"""The site builds strictly, links lead somewhere, nothing comes from another host."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.main import get_command

import latentdem
import latentdem_ext as ext
from latentdem.cli import app

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "python" / "benchmarks" / "results"
LOADING = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "img": ("src", "srcset"),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("mkdocs", "material", "mkdocstrings")),
    reason="no mkdocs: pip install 'latentdem[docs]'",
)


class Page(HTMLParser):
    """Anchors, links, and what a browser would load by itself."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads, self.classes = {""}, [], [], set()
        self.html = path.read_text()
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        self.classes |= set((found.get("class") or "").split())
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        self.loads += [found[key] for key in LOADING.get(tag, ()) if found.get(key)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    paths = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def hook():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_source_is_a_page(site, pages):
    sources = {p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")}
    built = {p.relative_to(site).with_suffix(".md") for p in pages}
    assert sources == {p for p in built if p.name != "404.md"}
    assert not list(site.rglob("*.py"))
    for path in sources:
        text = re.sub(r"<[^>]+>", "", pages[site / path.with_suffix(".html")].html)
        assert "<!-- include" not in pages[site / path.with_suffix(".html")].html
        assert len(text.split()) > 300, path  # menus alone are about 150 words


def test_internal_links_lead_somewhere(site, pages):
    count = 0
    for path, page in pages.items():
        if path.name == "404.html":  # its links start at the server's root
            continue
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            place = (path.parent / unquote(target)).resolve() if target else path
            assert place.exists(), f"{path.relative_to(site)} links to {link}"
            if place.suffix == ".html":
                assert unquote(anchor) in pages[place].anchors, f"{path.relative_to(site)}: {link}"
            count += 1
    assert count > 500


def test_nothing_is_loaded_from_outside(site, pages):
    for path, page in pages.items():
        for address in page.loads:
            assert not re.match(r"([a-z]+:)?//", address), f"{path.relative_to(site)}: {address}"
        assert "@import" not in page.html
        # The theme's script would fetch these two from a host.
        assert "mermaid" not in page.classes
        assert 'data-md-component="source"' not in page.html
    for path in site.rglob("*.css"):
        text = path.read_text()
        assert not re.findall(r"(?:url\(|@import\s)['\"]?(?:https?:)?//", text), path.name


def test_links_that_load_nothing_are_told_from_those_that_do(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        '<a href="https://example.org">x</a><script src="https://example.org/x.js"></script>'
    )
    page = Page(path)
    assert page.links == ["https://example.org"]
    assert page.loads == ["https://example.org/x.js"]


def test_every_operator_is_documented(site, pages):
    page = pages[site / "reference" / "operators.html"]
    for name in ext.__all__:
        assert f"latentdem_ext.{name}" in page.anchors, name
    for family in ("blur", "camera", "deconv", "kernel_map", "varying_blur", "volume_render"):
        module = importlib.import_module(f"latentdem_ext.ops.{family}")
        assert module.__doc__.partition(".")[0] in page.html


def test_the_python_api_is_documented(site, pages):
    page = pages[site / "reference" / "api.html"]
    for name in latentdem.__all__:
        assert f"latentdem.{name}" in page.anchors, name
    assert "latentdem.ProxSettings.error_scale" in page.anchors


def test_docstrings_are_markdown_by_then(site, pages):
    for name in ("operators", "api"):
        html = pages[site / "reference" / f"{name}.html"].html
        assert "<blockquote>" not in html  # what a bare doctest would become
        assert not re.findall(r":(?:func|class|meth|mod|data):", html)
        assert "doctest:" not in html


def commands(group, name):
    for child, entry in group.commands.items():
        if hasattr(entry, "commands"):
            yield from commands(entry, f"{name}-{child}")
        else:
            yield f"{name}-{child}", entry


def test_every_command_and_option_is_documented(site, pages):
    page = pages[site / "reference" / "cli.html"]
    for anchor, command in commands(get_command(app), "latentdem"):
        assert anchor in page.anchors
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert f"<code>{parameter.opts[0]}</code>" in page.html, parameter.opts[0]


def test_benchmarks_show_the_stored_figures(site, pages):
    quality = json.loads((RESULTS / "quality_prox.json").read_text())["summary"]
    shown = pages[site / "benchmarks" / "quality.html"].html.replace("\N{NO-BREAK SPACE}", " ")
    assert f"{quality['psnr_blind']:.2f} dB" in shown
    speed = pages[site / "benchmarks" / "speed.html"].html
    for row in json.loads((RESULTS / "blur.json").read_text())["rows"]:
        assert row["case"] in speed


def test_no_figure_of_the_benchmark_pages_is_typed():
    for path in (ROOT / "docs" / "benchmarks").glob("*.md"):
        assert not re.findall(r"\d(?:\.\d+)?\s?(?:ms|dB|%|x\b|GB/s)", path.read_text()), path.name


def test_sections():
    text = "# A\nlead\n## B\none\n```console\n# no heading\n```\ntwo\n### C\nthree\n"
    section = hook().section
    assert section(text, "A", name="x") == "lead"
    assert section(text, "B", name="x") == "one\n```console\n# no heading\n```\ntwo"
    assert section(text, "C", name="x") == "three"
    with pytest.raises(Exception, match="x has no heading 'D'"):
        section(text, "D", name="x")


def test_links_of_included_documents():
    relink, readme = hook().relink, ROOT / "README.md"
    pages = {"python/README.md": "method.md"}

    def lead(text, page="howto/a.md"):
        return relink(text, readme, page, pages)

    assert lead("[x](python/README.md#kernels)") == "[x](../method.md#kernels)"
    assert lead("[x](docs/install.md)", "index.md") == "[x](install.md)"
    picture = "python/benchmarks/results/scaling.svg"
    assert lead(f"![x]({picture})") == f"![x](../files/{picture})"
    assert lead("[cards](python/latentdem/assets)") == "cards (`python/latentdem/assets`)"
    assert lead("[how-tos](docs/howto)") == "how-tos (`docs/howto`)"
    assert lead("[setup.py](setup.py)") == "`setup.py`"
    assert lead("[`setup`](docs/install.md)", "index.md") == "[`setup`](install.md)"
    code = "```python\ny = layers[0](image)\n```"
    for unchanged in ("[x](https://example.org)", "[x](#limits)", "[x][latentdem.deblur]",
                      code, "`layers[0](image)`"):  # fmt: skip
        assert lead(unchanged) == unchanged
    with pytest.raises(Exception, match=r"README.md links to nowhere.md, which is not there"):
        lead("[x](nowhere.md)")


def test_the_reference_names_what_is_public():
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = module.public_names()
    assert set(names.values()) == {
        *(f"latentdem_ext.{name}" for name in ext.__all__),
        *(f"latentdem.{name}" for name in latentdem.__all__),
    }
    text = "See :func:`~latentdem.deblur` and :mod:`x.y`::\n\n    a = b\n\nThen:\n\n>>> 1 + 1\n2\n"
    expected = (
        "See [`latentdem.deblur`][latentdem.deblur] and `x.y`:\n\n```text\na = b\n```\n\n"
        "Then:\n\n\n```pycon\n>>> 1 + 1\n2\n```\n"
    )
    assert module.to_markdown(text, names) == expected
