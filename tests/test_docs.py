"""The promise: all code in the documentation runs as it stands and prints what the pages say, and the site builds.

A block of text after a block of Python is what that prints. Shell blocks are not run: the programs' own parsers read
their command lines.
"""

import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch.distributed

import convnorm
from convnorm import __main__ as command

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
CODE = [name for name, text in PAGES.items() if "```python" in text]
SOURCES = "cite.md"  # the page that holds the external links

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="away from the source tree there is no documentation")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


# --- code ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone():
    """No process group that a page has opened outlives it."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", CODE)
def test_page_runs(page, tmp_path, monkeypatch, alone):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page}
    found = re.findall(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```)?", PAGES[page], re.DOTALL | re.MULTILINE)
    assert len(found) == len(blocks(page, "python"))
    for code, printed in found:
        line = PAGES[page][: PAGES[page].index(code)].count("\n")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * line + code, str(DOCS / page), "exec"), names)  # errors have the lines of the page
        assert output.getvalue() == printed


def test_every_page_of_the_guide_has_code():
    assert {page for page in PAGES if "/" not in page} - set(CODE) == {"cite.md", "reproduce.md"}


def command_lines():
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                if match := re.match(r"python -m (convnorm|train) ", line):
                    found.append(pytest.param(match[1], line[match.end() :], id=f"{page}: {line}"))
    return found


@pytest.mark.parametrize(("program", "line"), command_lines())
def test_command_line_is_understood(program, line, monkeypatch):
    parse = argparse.ArgumentParser.parse_args
    understood = []

    def parse_only(parser, arguments=None, namespace=None):
        options = parse(parser, arguments, namespace)
        understood.append(options)
        options.run = options.command = lambda _: 0
        return options

    main = command.main if program == "convnorm" else pytest.importorskip("train.__main__").main
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    assert main(shlex.split(line, comments=True)) == 0
    assert len(understood) == 1


def test_misspelt_command_line_is_not_understood(monkeypatch):
    with pytest.raises(SystemExit):
        test_command_line_is_understood("convnorm", "report resnet50 --inputs-are 3 32 32", monkeypatch)


# --- what the pages hold ---------------------------------------------------------------------------------------------


def exported():
    """Everything public, as the packages say it, ``from .x import y as y``, by its shortest name."""
    found = {"optim.SGD": convnorm.optim.SGD}
    for prefix, package in (("", convnorm), ("network.", convnorm.network), ("spectral.", convnorm.spectral)):
        for name in re.findall(r"^from \.\w+ import (\w+) as \1$", Path(package.__file__).read_text(), re.MULTILINE):
            if getattr(package, name) not in found.values():
                found[prefix + name] = getattr(package, name)
    return found


EXPORTED = exported()
DETAILED = (convnorm.NormDecay, convnorm.Projection, convnorm.Recorder, convnorm.Report, convnorm.Comparison)
INTERNAL = {f"convnorm.NormDecay.{name}" for name in ("batches", "warn_of_missing", "begin_step", "end_step")}


def documented():
    """[name] = what mkdocstrings shows under it."""
    entries = re.findall(r"^::: (\S+)(?:\n    options: {heading: ([\w.]+))?", "\n".join(PAGES.values()), re.MULTILINE)
    return {heading or path: path for path, heading in entries}


@pytest.mark.parametrize("name", EXPORTED)
def test_export_is_documented(name):
    one = EXPORTED[name]
    assert documented()[f"convnorm.{name}"] in (f"convnorm.{name}", f"{one.__module__}.{one.__qualname__}")


def test_operators_are_shown_with_the_arguments_that_they_have():
    shown = re.findall(r"^    (\w+)\((.*?), \*", PAGES["api/operators.md"], re.MULTILINE)
    assert len(shown) == 4
    for name, arguments in shown:
        schema = getattr(torch.ops.convnorm, name).default._schema
        assert arguments.split(", ") == [argument.name for argument in schema.arguments if not argument.kwarg_only]


@pytest.mark.parametrize("page", sorted(set(PAGES) - {SOURCES}))
def test_external_links_stand_on_one_page(page):
    assert "://" not in PAGES[page]


def test_pictures_are_what_their_script_draws():
    pictures = runpy.run_path(str(DOCS / "pictures.py"))["PICTURES"]
    assert set(pictures) == {path.name for path in DOCS.glob("*.svg")}
    for name, draw in pictures.items():
        assert (DOCS / name).read_text() == str(draw())
        assert f"({name})" in "".join(PAGES.values())


# --- the site --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built where no network is to be had."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class Loaded(HTMLParser):
    """What a page makes a browser load, and the places in it that can be linked to."""

    def __init__(self, page):
        super().__init__()
        self.loads, self.places = [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.places.add(given.get("id"))
        if tag in ("script", "img", "iframe", "source", "link"):
            self.loads.append(given.get("href" if tag == "link" else "src") or "")


def test_site_loads_nothing_from_elsewhere(site):
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) == len(PAGES)
    for page in pages:
        local = [place for place in Loaded(page).loads if place]
        assert len(local) > 3
        for place in local:
            assert not re.match(r"(\w+:)?//", place), page
            assert (page.parent / place.partition("?")[0]).resolve().exists(), place
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text()), sheet


def test_exports_and_their_methods_have_places_in_the_site(site):
    places = set().union(*(Loaded(page).places for page in site.glob("api/*.html")))
    for name, one in EXPORTED.items():
        path = documented()[f"convnorm.{name}"]
        methods = vars(one) if isinstance(one, type) and issubclass(one, DETAILED) else ()
        assert places >= {path} | {f"{path}.{method}" for method in methods if not method.startswith("_")} - INTERNAL
