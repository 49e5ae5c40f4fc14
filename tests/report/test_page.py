"""The page: whole, self-contained, and saying what the numbers say."""

import base64
import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from unittest.mock import patch
from xml.etree import ElementTree

import numpy as np
import pytest

from stablemask.evaluation import perplexity_of
from stablemask.evaluation.sinks import even_first_token
from stablemask.models.configuration import ATTENTION_KINDS
from stablemask.report import comparison_page
from stablemask.report.comparison_page import FIGURES, render_comparison
from stablemask.report.drawing import COLORS, svg_uri, visible_token
from stablemask.report.figures import (
    attention_by_layer,
    attention_map,
    attention_of_heads,
    draw_all,
    mask_ratio,
    perplexity_by_length,
)
from stablemask.report.page import PAPER
from stablemask.report.summary import (
    caveat,
    sinks,
    table,
    takeaway,
    text_table,
    what_differs,
)

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
        if ("td" in self.open or "th" in self.open) and "small" not in self.open:
            self.rows[-1][-1] += data
        if "pre" in self.open:
            self.pre += data


@pytest.fixture(scope="module")
def page(comparison) -> Reader:
    return Reader(render_comparison(comparison))


def without_drawings(comparison) -> str:
    """The page but for its figures, most of the work."""
    with patch.object(comparison_page, "draw_all", lambda _: dict.fromkeys(FIGURES, ())):
        return render_comparison(comparison)


def captions(comparison) -> dict[str, str]:
    text = html.unescape(without_drawings(comparison))
    found = re.findall("<figcaption>(.*?)</figcaption>", text, re.DOTALL)
    return dict(zip(FIGURES, (" ".join(caption.split()) for caption in found), strict=True))


def test_self_contained(page):
    assert page.open == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    outside = [target for target in page.references if not target.startswith("data:")]
    assert outside == [PAPER]


def test_every_figure_is_a_drawing_the_same_every_time(page, comparison):
    images = [target for target in page.references if target.startswith("data:")]
    assert page.tags.count("figure") == len(FIGURES)
    drawn = draw_all(comparison)
    assert list(drawn) == list(FIGURES)
    assert images == [uri for drawings in drawn.values() for _, uri in drawings]
    for image in images:
        header, data = image.split(",")
        assert header == "data:image/svg+xml;base64"
        root = ElementTree.fromstring(base64.b64decode(data))
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 20
        assert float(root.get("width").removesuffix("pt")) < 360  # legible on a telephone


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
    evil_one = replace(comparison, runs=runs, prompt="<i>", snippet=snippet, identical_token="<u>")
    page = Reader(without_drawings(evil_one))
    assert all(svg_uri(figure) for _, figure in attention_map(evil_one))
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

    for label, run in comparison.runs.items():
        told = f"In {label} it moves by at most {run.identical_spread:.2g}."
        assert told in captions(comparison)["identical"]
        start, end = (np.mean(np.array(run.mask_ratio)[..., place]) for place in (0, -1))
        told = (
            "has no pseudo mass"
            if label == "softmax"
            else f"from {start:.1%} at position 0 to {end:.1%}"
        )
        assert told in captions(comparison)["ratio"]


def test_a_mass_that_is_none_at_both_ends_is_told(comparison):
    """As with a finite horizon and a first row that is left alone."""
    run = comparison.runs["stablemask"]
    ratio = [[[0.0, *head[1:-1], 0.0] for head in layer] for layer in run.mask_ratio]
    runs = {**comparison.runs, "stablemask": replace(run, mask_ratio=ratio)}
    caption = captions(replace(comparison, runs=runs))["ratio"]
    assert "of stablemask, the mask ratio goes from 0.0% at position 0 to 0.0%" in caption
    assert "softmax has no pseudo mass" in caption


def test_a_caption_tells_how_the_losses_went(comparison):
    def with_validation(run, losses):
        return replace(
            run, validation=[{"step": 2 * i, "loss": loss} for i, loss in enumerate(losses)]
        )

    losses = {"softmax": [3.0, 3.0, 3.0], "stablemask": [3.5, 2.5, 2.75]}
    runs = {label: with_validation(run, losses[label]) for label, run in comparison.runs.items()}
    assert captions(replace(comparison, runs=runs))["loss"].endswith(
        "The validation loss of stablemask is below that of softmax at 2 of 3 evaluations; at the last, "
        "step 4, it is 0.250 nats a token lower."
    )


def test_a_length_that_was_not_scored(comparison):
    run = comparison.runs["stablemask"]
    missing = {**run.perplexity[2], "perplexity": None, "note": "too <little> text"}
    runs = {
        **comparison.runs,
        "stablemask": replace(run, perplexity=[*run.perplexity[:2], missing]),
    }
    page = without_drawings(replace(comparison, runs=runs))
    assert "Not scored by every run: 128 tokens" in page
    assert "stablemask, 128 tokens: too &lt;little&gt; text" in page
    assert table(replace(comparison, runs=runs))[2].text("stablemask") == "–"


def test_runs_that_differ_in_more_than_attention_are_not_said_to_be_alike(comparison):
    assert "and in nothing else" in what_differs(comparison)
    assert what_differs(replace(comparison, differences=["attention", "learning_rate"])) == (
        "Mind that the runs differ in attention and learning rate."
    )


def test_three_runs_of_one_kind(comparison):
    runs = {**comparison.runs, "stablemask, again": comparison.runs["stablemask"]}
    page = Reader(without_drawings(replace(comparison, runs=runs)))
    assert len([row for row in page.rows if len(row) == 4]) > 8
    # A terminal has it too, and no figures.
    assert "Figure" not in caveat(replace(comparison, runs=runs))


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
    [(_, figure)] = perplexity_by_length(comparison)
    drawn = base64.b64decode(svg_uri(figure).split(",")[1]).decode()
    assert f"<!-- {shown} -->" in drawn

    def refuse(constant):
        raise AssertionError(constant)

    plain = json.loads(comparison.to_json(), parse_constant=refuse)
    row = plain["runs"]["stablemask"]["perplexity"][0]
    assert row["nats"] == nats
    assert (row["perplexity"] is None) == (nats > 709.8)


@pytest.mark.parametrize(("layers", "heads"), [(1, 3), (5, 9)])
def test_every_figure_of_any_number_of_layers_and_heads(comparison, layers, heads):
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
    resized_comparison = replace(comparison, runs=runs, head=0)
    assert [title for title, _ in mask_ratio(resized_comparison)] == [
        f"layer {layer}" for layer in range(layers)
    ]
    for _, figure in attention_of_heads(resized_comparison):
        shown = [axes.get_title() for axes in figure.axes if axes.get_visible()]
        assert shown == [f"head {head}" for head in range(heads)]
    assert len(attention_by_layer(resized_comparison)) == 3


def with_first_token(comparison, shares):
    """The comparison with a share of the first token for each run, the same in all layers."""
    return replace(
        comparison,
        runs={
            label: replace(
                run, **dict.fromkeys(("first_token", "first_token_of_real"), [share] * 2)
            )
            for (label, run), share in zip(comparison.runs.items(), shares)
        },
    )


def test_it_opens_with_what_was_found_and_what_that_does_not_show(comparison):
    def told(softmax, stablemask, gaps):
        perplexities = {"softmax": softmax, "stablemask": stablemask}
        losses = {"softmax": [0.0] * 3, "stablemask": gaps}
        runs = {
            label: replace(
                run,
                perplexity=[{**row, "perplexity": perplexities[label]} for row in run.perplexity],
                validation=[
                    {"step": 2 * i, "loss": 3 + loss} for i, loss in enumerate(losses[label])
                ],
            )
            for label, run in comparison.runs.items()
        }
        return with_first_token(replace(comparison, runs=runs), [0.05, 0.05])

    found = told(50.0, 40.0, [0.0, -0.3, -0.125])
    assert takeaway(found) == (
        "At the training length of 32 tokens the validation perplexity is 50.00 with softmax and 40.00 "
        "with stablemask, 20.0% lower."
    )
    assert "largest at step 2, 0.300 nats a token, and is 0.125 at the end" in caveat(found)
    assert "gap is largest at the end, 0.400 nats" in caveat(told(50.0, 60.0, [0.1, 0.2, 0.4]))
    assert "60.00 with stablemask, 20.0% higher" in takeaway(told(50.0, 60.0, [0.1, 0.2, 0.4]))
    text = html.unescape(without_drawings(found))
    lead = re.findall("<p.*?>(.*?)</p>", text)[:2]
    assert lead == [takeaway(found), caveat(found)]


def test_a_sink_is_told_of_only_where_there_is_one(comparison):
    even = even_first_token(32)  # 0.099, of 1/2, 1/3, ... 1/32
    none = with_first_token(comparison, [even, 1.9 * even])
    assert sinks(none) == []
    told = " ".join(re.sub("<[^>]*>", " ", without_drawings(none)).split())
    assert re.findall(r"[^.]*\bsinks?\b[^.]*", told) == [
        " No layer of any run gives it more than twice as much, so none has made it a sink"
    ]
    one = with_first_token(comparison, [0.4, even])
    assert sinks(one) == ["softmax"]
    assert takeaway(one).endswith(
        f"the first token is a sink in softmax (40.0% of all attention) and not in stablemask ({even:.1%})."
    )
    assert "their sink" in without_drawings(one)


def test_every_number_says_what_it_means(comparison):
    assert all(row.meaning for row in table(comparison))
    assert without_drawings(comparison).count("<small>") == len(table(comparison))
