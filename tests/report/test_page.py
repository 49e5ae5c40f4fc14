"""The page: whole, self-contained, and saying what the numbers say."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import pytest

from stablemask.evaluation import perplexity_of
from stablemask.models.configuration import ATTENTION_KINDS
from stablemask.report.drawing import COLORS, STYLE, svg_uri, visible_token
from stablemask.report.figures import draw_all, mask_ratio, perplexity_by_length
from stablemask.report.html import FIGURES, render
from stablemask.report.page import PAPER
from stablemask.report.summary import captions, table, text_table, what_differs

from .conftest import COMMAND


class Reader(HTMLParser):
    """Collects what a page refers to, its table cells and its images."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.references, self.rows, self.pre = [], [], [], ""
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "pre" in self.open:
            self.pre += data


@pytest.fixture(scope="module")
def page(comparison) -> Reader:
    return Reader(render(comparison))


def test_self_contained(page):
    assert page.open == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    outside = [target for target in page.references if not target.startswith("data:")]
    assert outside == [PAPER]


def test_every_figure_is_a_drawing(page, comparison):
    images = [target for target in page.references if target.startswith("data:")]
    assert len(images) == len(FIGURES) == len(captions(comparison))
    for image in images:
        header, data = image.split(",")
        assert header == "data:image/svg+xml;base64"
        root = ElementTree.fromstring(base64.b64decode(data))
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 20


def test_the_table_is_that_of_the_results(page, comparison):
    runs = json.loads(comparison.to_json())["runs"].values()
    shown = {row[0]: row[1:] for row in page.rows if row}

    def expected(form, value):
        return [format(value(run), form) for run in runs]

    for i, name in enumerate(("32 tokens (1x)", "64 tokens (2x)", "128 tokens (4x)")):
        values = expected(".2f", lambda run, i=i: run["perplexity"][i]["perplexity"])
        assert shown[f"validation perplexity, {name}"] == values
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert shown["training, tokens per second"] == expected(
        ",.0f", lambda r: r["tokens_per_second"]
    )
    assert shown["attention on the first token"] == expected(
        ".1%", lambda r: mean(r["first_token"])
    )
    assert shown["attention that real tokens receive"] == expected(
        ".1%", lambda r: mean(r["real_share"])
    )
    spread = "spread of identical tokens' output"
    assert shown[spread] == expected(".2g", lambda r: r["identical_spread"])
    for row in table(comparison):
        assert row.name in text_table(comparison)


def test_generated_text_is_escaped(comparison):
    evil = "</pre><script>alert('x')</script> $title ${lead}"
    runs = {label: replace(run, sample=evil) for label, run in comparison.runs.items()}
    snippet = ["<b>", "$a$", "\u6f22", *comparison.snippet[3:]]
    page = Reader(
        render(replace(comparison, runs=runs, prompt="<i>", snippet=snippet, identical_token="<u>"))
    )
    assert not {"script", "i", "u"} & set(page.tags)
    assert page.pre.count("<i>" + evil) == 2


def test_commands_and_versions(page, comparison):
    assert COMMAND in page.pre
    for run in comparison.runs.values():
        assert run.record["command"] in page.pre


def test_captions_claim_no_more_than_the_numbers(comparison):
    def with_perplexity(softmax: float, stablemask: float):
        values = {"softmax": softmax, "stablemask": stablemask}
        runs = {
            label: replace(
                run, perplexity=[{**row, "perplexity": values[label]} for row in run.perplexity]
            )
            for label, run in comparison.runs.items()
        }
        return replace(comparison, runs=runs)

    worse = with_perplexity(50.0, 60.0)
    assert "20.0% higher at 32 tokens" in captions(worse)["perplexity"]
    assert "lower at" not in captions(worse)["perplexity"]
    assert table(worse)[0].best == "softmax"
    assert "10.0% lower at 128 tokens" in captions(with_perplexity(50.0, 45.0))["perplexity"]
    same = with_perplexity(50.0, 50.001)
    assert "the same within 0.1% at 64 tokens" in captions(same)["perplexity"]
    assert table(same)[0].best is None

    assert "rounding, so the output says nothing" in captions(comparison)["identical"]
    assert "depends on the position" in captions(comparison)["identical"]


def test_a_length_that_was_not_scored(comparison):
    run = comparison.runs["stablemask"]
    missing = {**run.perplexity[2], "perplexity": None, "note": "too <little> text"}
    runs = {
        **comparison.runs,
        "stablemask": replace(run, perplexity=[*run.perplexity[:2], missing]),
    }
    page = render(replace(comparison, runs=runs))
    assert "stablemask, 128 tokens: too &lt;little&gt; text" in page
    assert table(replace(comparison, runs=runs))[2].text("stablemask") == "–"


def test_runs_that_differ_in_more_than_attention_are_not_said_to_be_alike(comparison):
    assert "and in nothing else" in what_differs(comparison)
    assert what_differs(replace(comparison, differences=["attention", "learning_rate"])) == (
        "Mind that the runs differ in attention and learning rate."
    )


def test_three_runs_of_one_kind(comparison):
    runs = {**comparison.runs, "stablemask, again": comparison.runs["stablemask"]}
    page = Reader(render(replace(comparison, runs=runs)))
    assert len([row for row in page.rows if len(row) == 4]) > 8


def test_figures_are_the_same_every_time(comparison):
    assert draw_all(comparison) == draw_all(comparison)


def test_every_attention_kind_has_a_colour():
    assert set(COLORS) == set(ATTENTION_KINDS)
    assert len(set(COLORS.values())) == len(COLORS)


def test_tokens_as_labels():
    assert visible_token(" a\n\tb") == "·a↵→b"
    assert visible_token("$x$") == r"\$x\$"
    assert visible_token("\u6f22\u5b57") == "□□"
    assert re.fullmatch(r".{10}…", visible_token("a" * 30))


@pytest.mark.parametrize("nats", [700.0, 712.5])
def test_a_perplexity_past_all_bounds_is_told_and_spoils_nothing(comparison, nats):
    wild = {"nats": nats, "perplexity": perplexity_of(nats)}
    run = comparison.runs["stablemask"]
    runs = {
        **comparison.runs,
        "stablemask": replace(run, perplexity=[{**row, **wild} for row in run.perplexity]),
    }
    comparison = replace(comparison, runs=runs)
    shown = "inf" if nats > 709.8 else "1.01e+304"  # e^700 = 1.0142e304
    assert table(comparison)[0].text("stablemask") == shown
    assert table(comparison)[0].best == "softmax"
    assert shown in text_table(comparison)
    caption = captions(comparison)["perplexity"]
    assert "inf" not in caption
    assert "nan" not in caption
    assert len(caption) < 1000
    drawn = base64.b64decode(svg_uri(perplexity_by_length(comparison)).split(",")[1]).decode()
    assert f"<!-- {shown} -->" in drawn

    def refuse(constant):
        raise AssertionError(constant)

    plain = json.loads(comparison.to_json(), parse_constant=refuse)
    row = plain["runs"]["stablemask"]["perplexity"][0]
    assert row["nats"] == nats
    assert (row["perplexity"] is None) == (nats > 709.8)


@pytest.mark.parametrize("layers", [1, 4, 5])
def test_every_figure_of_any_number_of_layers_and_heads(comparison, layers):
    heads = 3

    def resized(run):
        ratio = [[run.mask_ratio[0][0]] * heads] * layers
        return replace(
            run,
            mask_ratio=ratio,
            map_real=[run.map_real[0]] * heads,
            map_pseudo=[run.map_pseudo[0]] * heads,
            **dict.fromkeys(("first_token", "first_token_of_real", "real_share"), [0.1] * layers),
        )

    runs = {label: resized(run) for label, run in comparison.runs.items()}
    with matplotlib.rc_context(STYLE):
        panels = mask_ratio(replace(comparison, runs=runs, head=0)).axes
    shown = [axes.get_title(loc="left") for axes in panels if axes.get_visible()]
    assert shown == [f"layer {layer}" for layer in range(layers)]
    assert draw_all(replace(comparison, runs=runs, head=0)).keys() == FIGURES.keys()
