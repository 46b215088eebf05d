"""The promise: pages and pictures show what a report or a comparison found, are whole and fetch nothing."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import product

import pytest
from reported import SHAPE, network
from torch import nn

from convnorm.comparison import compare
from convnorm.report import report
from convnorm.reporting import text
from convnorm.reporting.axis import HEIGHT, WIDTH

HARD = [math.nan, math.inf, 0.0, 5e-324, 1.7e308, 2.0]  # to draw


def with_l1(norms, title):
    """A report of a chain of layers with these l1 norms."""
    found = report(nn.Sequential(*(nn.Linear(2, 2) for _ in norms)), [1, 2], l2=False)
    rows = [replace(row, norms=replace(row.norms, l1=norm)) for row, norm in zip(found.rows, norms, strict=True)]
    return replace(found, rows=tuple(rows), title=title)


class Page(HTMLParser):
    """Well-formed; its words, its styles and all that it refers to."""

    VOID = ("meta", "link")

    def __init__(self, content):
        super().__init__()
        self.open, self.words, self.styles, self.references = [], [], [], []
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.styles += [value for name, value in attributes if name == "style"]
        self.references += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("l2", [True, False])
def test_html_is_whole_and_fetches_nothing(l2, tmp_path):
    model = network()
    model.add_module("<b>&", nn.Linear(5, 1))
    found = report(model, SHAPE, l2=l2, title="<script>")
    content = found.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == content
    page = Page(content)
    assert page.references == ["data:,"]  # no icon is asked for
    assert not re.search(r"https?:|url\(|@import", content)
    assert "<b>&" in page.words
    assert "<script>" in page.words
    assert all(row.name in page.words for row in found.rows)
    for row in found.rows:
        assert text.number(row.norms.l1) in page.words
    assert content.count("<tbody>") == len(found.rows)
    assert "<script" not in found._repr_html_()
    Page(found._repr_html_())


@pytest.mark.parametrize("l2", [True, False])
def test_a_page_of_several_has_every_norm_and_ratio(l2, tmp_path):
    models = {"before": network(), "a<b>&": network()}
    nn.init.constant_(models["a<b>&"][3].weight, 0.2)
    models["a<b>&"].add_module("<more>", nn.Linear(5, 1))
    both = compare(models, SHAPE, l2=l2)
    content = both.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == content
    page = Page(content)
    assert page.references == ["data:,"]
    assert not re.search(r"https?:|url\(|@import", content)
    assert "5 layers that all have, by name; left out: 1 of a<b>&" in page.words
    assert page.words.count("a<b>&") == 2 + len(both.ords)  # of totals, in the legend, above each table
    for ord in both.ords.values():
        for row in both.layers(ord):
            first, second = row["norms"]
            for word in (row["layer"], text.number(first), text.number(second), f"{second / first:.2f}"):
                assert word in page.words
    assert content.count("<tbody>") == 2 + 5 * len(both.ords)
    assert content.count("<figure>") == len(both.ords) == (3 if l2 else 2)
    assert "<script" not in both._repr_html_()
    Page(both._repr_html_())


def test_a_page_of_several_without_a_layer_in_common():
    both = compare([report(network(), SHAPE, l2=False), report(nn.Conv2d(3, 4, 3), SHAPE, l2=False)])
    page = Page(both.to_html())
    assert "no layer that all have, by name; left out: 5 of Sequential, 1 of Conv2d" in page.words
    assert both.to_html().count("<table>") == 1


def test_bars_of_ratios_end_at_their_logarithm():
    """Left of the middle for less, right of it for more; 0 and infinity fill their half."""
    first = with_l1([1.0] * 5 + [0.0, math.inf], "first")
    second = with_l1([4.0, 0.5, 0.0, math.inf, math.nan, 1.0, math.inf], "second")
    table = compare([first, second]).to_html().split("<details")[1]
    rows = [Page(row) for row in re.findall(r"<tbody>.*?</tbody>", table)]
    shown = [row.words[3:] for row in rows]
    assert shown == [["4.00"], ["0.50"], ["0.00"], ["inf"], ["nan"], [], ["nan"]]
    bars = [re.findall(r"margin-left:(.*?)%;width:(.*?)%", " ".join(row.styles)) for row in rows]
    right, left, half = ("50.0", "50.0"), ("0.0", "50.0"), ("25.0", "25.0")
    assert bars == [[right], [half], [left], [right], [], [], []]


def test_whatever_the_norms_pictures_stay_within_their_frames():
    one, two = (with_l1([pair[i] for pair in product(HARD, HARD)], str(i)) for i in (0, 1))
    for content in (one.to_html(), compare([one, two]).to_html()):
        Page(content)
        for tag in re.findall(r"<(?:line|rect|text|path) [^>]*>", content):
            values = dict(re.findall(r'([\w-]+)="([^"]*)"', tag))
            numbers = {name: float(values[name]) for name in ("x", "y", "x1", "x2", "y1", "y2") if name in values}
            assert all(0 <= value <= (WIDTH if "x" in name else HEIGHT) for name, value in numbers.items()), tag
            assert not re.search("nan|inf", values.get("d", "") + values.get("transform", "")), tag


def test_lines_end_where_there_is_nothing_to_draw():
    norms = [1.0, 2.0, math.nan, 3.0, 0.0, math.inf, 4.0, 5.0]
    picture = compare([with_l1(norms, "one"), with_l1([1.0] * 8, "two")]).to_html().split("<figure>")[1]
    paths = [re.sub(r"[^ML]", "", path) for path in re.findall(r'<path d="([^"]*)" fill="none"', picture)]
    assert paths == ["MLMML", "MLLLLLLL"]
    titles = [unescape(title) for title in re.findall(r"<title>(.*?)</title>", picture, re.DOTALL)]
    assert titles[2:4] == ["2\none: nan\ntwo: 1.000", "3\none: 3.000\ntwo: 1.000"]
    assert picture.count("transform=") == 5 + 8  # a mark for each norm that can be drawn


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("l2", [True, False])
def test_plots_are_drawn(suffix, l2, tmp_path):
    pytest.importorskip("matplotlib")
    one = report(network(), SHAPE, l2=l2)
    figure = one.plot(tmp_path / f"one{suffix}")
    assert len(figure.axes) == (6 if l2 else 4)
    heights = [bar.get_y() + bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx([row.norms.l1 for row in one.rows])
    both = compare({"one": one, "two": one}).plot(tmp_path / f"both{suffix}")
    assert [line.get_label() for line in both.axes[0].lines][:2] == ["one", "two"]
    assert (tmp_path / f"one{suffix}").stat().st_size > 5000
    assert (tmp_path / f"both{suffix}").stat().st_size > 5000


# --- in a browser ----------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CLICK = """<script>
const orders = [...document.querySelectorAll("table")].map(table => [...table.querySelectorAll("th")].map(head =>
  [0, 1].map(() => {
    head.querySelector("button").click();
    return [...table.tBodies].map(body => [0, head.cellIndex].map(i => body.rows[0].cells[i].dataset.sort));
  })));
const marked = document.querySelectorAll("[aria-sort]").length, root = document.documentElement;
root.innerHTML = `<pre>${JSON.stringify([orders, marked, root.scrollWidth - root.clientWidth])}</pre>`;
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("several", [False, True])
def test_tables_are_sorted_by_a_click(several, tmp_path):
    """Downward, then upward, each for itself; with no complaint, in a window that is narrow."""
    names = [f"first.{i}" + "." + "long" * 20 for i in range(6)]
    reports = [with_l1(own, own_title) for own, own_title in ((HARD, "x" * 99), (HARD[::-1], "y/" * 50))]
    reports = [replace(one, rows=tuple(replace(row, name=name) for row, name in zip(one.rows, names, strict=True)))
               for one in reports]  # fmt: skip
    content = compare(reports).to_html() if several else reports[0].to_html()
    (tmp_path / "page.html").write_text(content.replace("</body>", CLICK))
    line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    line += ["--window-size=500,800", "--enable-logging=stderr", "--dump-dom", (tmp_path / "page.html").as_uri()]
    run = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    assert "CONSOLE" not in run.stderr
    tables, marked, too_wide = json.loads(re.search(r"<pre>(.*)</pre>", run.stdout)[1])
    assert (len(tables), marked, too_wide) == ((3, 3, 0) if several else (1, 1, 0))
    for table in tables:
        for down, up in table:
            keys = [[float(key) for _, key in order] for order in (down, up)]
            assert keys == [sorted(keys[0], reverse=True), sorted(keys[0])]
            assert sorted(down) == sorted(up)  # lines stay whole
    l1 = [(int(i), float(key)) for i, key in tables[-2 if several else 0][1][0]]
    assert sorted(l1) == [(i, -math.inf if math.isnan(norm) else norm) for i, norm in enumerate(HARD)]
