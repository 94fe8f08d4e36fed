"""Who is advised what, and the page that says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fl_lightning.evaluation import svg
from fl_lightning.evaluation.uncertainty import Interval
from fl_lightning.personalization.decision import decide
from fl_lightning.personalization.evidence import Evidence
from fl_lightning.personalization.page import reliability_bins
from fl_lightning.personalization.selection import Choice, Selection
from tests.personalization.test_evidence import CLIENTS, SIZES
from tests.personalization.test_selection import groups

Run = Callable[..., tuple[Any, Path]]


def fill(made: Any, right: dict[str, Callable[[int, int], Any]]) -> None:
    """Say which examples of whom each strategy's models get right."""
    for name, by_client in right.items():
        for client in (0, 1, 3):
            found = {}
            for data in (0, 1, 3):
                zero = torch.zeros(SIZES[data], dtype=torch.uint8)
                share = torch.as_tensor(1.0 - np.asarray(by_client(client, data), dtype=float))
                sure = torch.full((SIZES[data],), 0.75)
                found[data] = {
                    "target": zero,
                    "prediction": share.to(torch.uint8),
                    "confidence": sure,
                    "loss": zero.float(),
                }
            made[name][0][client].measures.examples = found


def half(client: int, data: int) -> np.ndarray:
    return np.arange(SIZES[data]) % 2 == 0


def everything(client: int, data: int) -> np.ndarray:
    return np.ones(SIZES[data]) if client == data else np.zeros(SIZES[data])


def nothing(client: int, data: int) -> np.ndarray:
    return np.zeros(SIZES[data])


def test_the_candidate_is_chosen_by_validation_and_judged_by_test() -> None:
    """Client 0 validates ft best, which is right at home; client 1 lp, which is wrong; client 3 one that is alike."""
    values = {"none": [[0.9] * 4], "ft": [[0.8, 0.1, 0.1, 0.1]], "lp": [[0.2, 0.6, 0.1, 0.1]]}
    values["same"] = [[0.1, 0.1, 0.1, 0.5]]
    made = groups(values)
    fill(made, {"none": half, "ft": everything, "lp": nothing, "same": half})
    made["none"][0][0].strategy.train = False
    evidence = Evidence(made, CLIENTS, "accuracy")
    found = decide(made, list(made), {"ft": Choice(["ft"], [["ft lr=1"] * 4])}, Selection(), evidence)
    assert [one.verdict for one in found] == ["personal", "global", "undecided", "undecided"]
    assert [one.candidate for one in found] == ["ft", "lp", "ft", "same"]
    assert found[0].setting == "lr=1"
    assert found[0].change.interval.mean == pytest.approx(0.5)
    assert found[0].elsewhere.mean == pytest.approx(-(0.5 + 4 / 7) / 2), "of 50 and of 7"
    assert found[0].certain
    assert found[3].examples is None, "of no difference no number of examples tells"


def test_a_gain_within_chance_is_undecided_and_says_how_many_examples_would_tell() -> None:
    made = groups({"none": [[0.1] * 4], "ft": [[0.5] * 4]})
    fill(made, {"none": half, "ft": lambda client, data: np.maximum(half(client, data), np.arange(SIZES[data]) == 1)})
    made["none"][0][0].strategy.train = False
    found = decide(made, list(made), {}, Selection(), Evidence(made, CLIENTS, "accuracy"))
    assert found[0].change.interval.mean == pytest.approx(1 / 30)
    assert found[0].verdict == "undecided"
    assert found[0].examples is not None
    assert found[0].examples > 30


def test_without_validation_data_nobody_is_advised() -> None:
    made = groups({"none": [[float("nan")] * 4], "ft": [[float("nan")] * 4]})
    fill(made, {"none": half, "ft": everything})
    made["none"][0][0].strategy.train = False
    found = decide(made, list(made), {}, Selection(), Evidence(made, CLIENTS, "accuracy"))
    assert {one.verdict for one in found} == {"undecided"}
    assert found[0].candidate is None


def test_reliability_by_hand() -> None:
    made = groups({"ft": [[0.0] * 4]})
    fill(made, {"ft": half})
    assert reliability_bins(made, "ft") == [(0.75, pytest.approx((15 + 25 + 4) / 87), 87)]


class Outline(HTMLParser):
    """Checks that elements which must be closed are, and collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag in ("div", "table", "svg", "ul", "dl", "figure", "text", "small", "b", "span", "pre", "tbody"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


@pytest.mark.every
def test_the_page_stands_alone_and_says_what_the_results_say(personalized: Run) -> None:
    results, folder = personalized("personalization=[ft,lp_ft]", "epochs=4", "seeds=2")
    text = (folder / "report.html").read_text()
    outline = Outline()
    outline.feed(text)
    assert not outline.open
    assert not outline.fetched
    assert "script" not in outline.tags
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.S)
    for title in ("Each client", "Who gains", "At home and elsewhere", "Fairness", "Calibration", "How to reproduce"):
        assert title in text
    for name, decision in results["decisions"].items():
        assert name in text
        low, high = decision["change"]["low"], decision["change"]["high"]
        expected = "personal" if low > 0 else "global" if high < 0 else "undecided"
        assert decision["verdict"] == expected
        assert f"[{low:+.3f}, {high:+.3f}]" in text
    alone = [one["verdict"] for one in results["decisions"].values() if one["candidate"] == "local"]
    assert text.count("local (trained alone, without the federation)") == len(alone)
    assert ("of them by a model that the client trained alone" in text) == ("personal" in alone)
    assert results["source"]["partition_hash"] in text


def test_names_are_text_and_not_html() -> None:
    drawn = svg.scatter({"<b>": (Interval(0.1, 0.0, 0.2), Interval(0.5, 0.4, 0.6))}, "x & y", "z")
    assert "<b>" not in drawn
    assert "x &amp; y" in drawn


def test_scales_hold_their_values_and_have_few_round_ticks() -> None:
    for values in ([0.1, 0.9], [-0.003, 0.004], [12.0, 250.0], [0.5]):
        scale = svg.around(values, 0, 100, zero=True)
        assert all(0 < scale(value) < 100 for value in [*values, 0.0])
        assert 2 <= len(scale.ticks()) <= 7
        assert all(scale.low <= tick <= scale.high for tick in scale.ticks())
