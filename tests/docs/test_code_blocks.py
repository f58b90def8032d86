"""Every Python block of the documents runs, and every command in them exists.

Blocks of one document share their names and run in order, in a folder with small pictures called
as in the text.  What would take minutes is made small here, so that the text can show what a user
types:

* ``latentdem.deblur`` takes one chain and one step (two where the text says how many, or gives
  settings);
* ``latentdem.reconstruct`` gets a prior that knows its one object, and small settings;
* a mesh opens no window.

``python no-run: reason`` marks a block that cannot run everywhere.
"""

import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trimesh
import typer
from em.object_stand_in import exact_prior
from typer.main import get_command
from typer.testing import CliRunner

import latentdem
from latentdem.cli import app
from latentdem.cli_prior import PACKAGED
from latentdem.em.settings import PaperSettings, ProxSettings
from latentdem.io import to_pil

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "python" / "README.md",
    ROOT / "latentdem_ext" / "PERFORMANCE.md",
    ROOT / "csrc" / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^(?P<ticks>```+)(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=ticks)$", re.M | re.S)
LANGUAGES = {"", "console", "python", "text"}
NOT_RUN = 3
"""At most so many Python blocks may be marked no-run, in all documents together."""
BUILD_VARIABLES = {"LATENTDEM_CUDA", "LATENTDEM_CUDA_ARCHS"}
UsageError = typer.BadParameter.__base__
"""What typer raises on a command line that it does not understand."""


def blocks(document):
    """Language, remark, line and text of every fenced block."""
    text = document.read_text()
    for match in FENCE.finditer(text):
        language, _, remark = match["info"].strip().partition(" ")
        yield language, remark, text[: match.start()].count("\n") + 2, match["body"]


def python_blocks(document):
    return [
        (line, body)
        for language, remark, line, body in blocks(document)
        if language == "python" and not remark
    ]


def commands(document):
    """Every ``$`` line of the console blocks, without prompt and remark."""
    for language, _, _, body in blocks(document):
        if language == "console":
            for line in body.replace("\\\n", " ").splitlines():
                if line.startswith("$ "):
                    yield shlex.split(line[2:], comments=True)


def name(document):
    return str(document.relative_to(ROOT))


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    prior, views = exact_prior()
    for file, view in zip(("front.png", "side.png"), views, strict=False):
        to_pil(view).save(file)
    to_pil(torch.rand(3, 48, 56)).save("photo.jpg")
    deblur, reconstruct = latentdem.deblur, latentdem.reconstruct
    quick = latentdem.ReconstructSettings(
        rounds=1, resolution=16, iterations=30, samples_per_ray=24,
        poses=latentdem.PoseSettings(azimuth_step=60, levels=(0.5,), modes=1, iterations=1),
        sampler=latentdem.SamplerSettings(targets=3, steps=2),
    )  # fmt: skip

    def deblur_quickly(image, *, steps=None, settings=None, **options):
        method = options.get("method", "prox")
        count = 1 if steps is None and settings is None else 2
        settings = settings or {"prox": ProxSettings(), "paper": PaperSettings()}[method]
        few = {"chains": 1} if method == "prox" else {"last": 1}
        return deblur(image, settings=replace(settings, steps=count, **few), **options)

    def reconstruct_quickly(pictures, **options):
        return reconstruct(pictures, prior=prior, settings=quick, **options)

    shown = []
    monkeypatch.setattr(latentdem, "deblur", deblur_quickly)
    monkeypatch.setattr(latentdem, "reconstruct", reconstruct_quickly)
    monkeypatch.setattr(trimesh.Trimesh, "show", lambda mesh: shown.append(mesh))
    return shown


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if python_blocks(d)], ids=name)
def test_python_blocks_run(document, small):
    namespace = {"__name__": "__main__"}
    for line, body in python_blocks(document):
        # Blank lines in front give errors the document's own line numbers.
        exec(compile("\n" * (line - 1) + body, name(document), "exec"), namespace)
    if document.name == "README.md":
        assert len(small) == 1 and small[0].faces.shape[0] > 0
        assert Path("out/report.json").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_blocks_have_a_known_language(document):
    text = document.read_text()
    assert text.count("```") == 2 * len(list(FENCE.finditer(text)))
    for language, remark, line, _ in blocks(document):
        assert language in LANGUAGES, f"{name(document)}:{line}: {language}"
        assert remark == "" or re.fullmatch(r"no-run: .{8,}", remark), f"{name(document)}:{line}"


def test_few_blocks_are_not_run():
    remarks = [remark for document in DOCUMENTS for _, remark, _, _ in blocks(document)]
    assert sum(remark != "" for remark in remarks) <= NOT_RUN
    assert sum(len(python_blocks(document)) for document in DOCUMENTS) > 10


def parse(arguments):
    """Read the arguments as the program would; run nothing.

    Raises what the program would raise on an unknown command or option, or a missing one.
    """
    command = get_command(app)
    path = "latentdem"
    while hasattr(command, "commands"):
        assert arguments and arguments[0] in command.commands, f"no command {path} {arguments[:1]}"
        command, path = command.commands[arguments[0]], f"{path} {arguments[0]}"
        arguments = arguments[1:]
    command.make_context(path, list(arguments))


def check(words):
    """One command line of a document: its program, and what is known about that one."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        assert words[0].split("=")[0] in BUILD_VARIABLES
        words = words[1:]
    program, *arguments = words
    if program == "latentdem":
        card = arguments[:2] == ["prior", "info"] and arguments[2] in PACKAGED
        if arguments == ["info"] or card or "--help" in arguments:
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
        else:
            parse(arguments)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert arguments[0] in targets
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for group in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
            assert set(group.split(",")) <= set(extras["optional-dependencies"])
    elif program == "python":
        assert [word for word in arguments if (ROOT / word).exists()]
    else:
        assert program in ("cibuildwheel", "source", "unzip"), f"unknown program {program}"


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if any(commands(d))], ids=name)
def test_commands_exist(document):
    for words in commands(document):
        check(words)


@pytest.mark.parametrize(
    "line",
    [
        "latentdem deblurr photo.jpg -o out",
        "latentdem deblur photo.jpg -o out --kernel 25",
        "latentdem deblur photo.jpg",
        "latentdem deblur photo.jpg -o out --steps many",
        "latentdem prior show natural",
        "make dinner",
        "pip install '.[everything]'",
        "python tests/no_such_test.py",
        "rm -r out",
    ],
)
def test_wrong_commands_are_found(line):
    with pytest.raises((AssertionError, UsageError)):
        check(shlex.split(line))
