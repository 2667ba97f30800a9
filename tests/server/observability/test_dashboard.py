"""The Grafana dashboard: every query parses, and asks for metrics and labels that there are."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parent))

from test_metrics import INFO, counters, output

from dougong.server.metrics import Metrics

DASHBOARD = json.loads((Path(__file__).resolve().parents[3] / "docs" / "grafana" / "dougong.json").read_text())


def queries() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for note in DASHBOARD["annotations"]["list"]:
        yield note["name"], note["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            inner = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert inner is not None
            yield variable["name"], inner.group(1)


def selectors(expression: Any) -> Iterator[promql_parser.VectorSelector]:
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        inner = getattr(expression, name, None)
        if inner is not None and not isinstance(inner, str):
            yield from selectors(inner)
    for argument in getattr(expression, "args", None) or ():
        yield from selectors(argument)


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """Sample name to its labels; ``instance`` and ``job`` come from the scrape."""
    metrics = Metrics("tiny", INFO)
    metrics.step(counters())
    metrics.finished(output())
    metrics.http.add("POST", "/v1/completions", 200, 0.5)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {"instance", "job"}).update(sample.labels)
    return found


@pytest.mark.parametrize(("title", "query"), list(queries()))
def test_a_query_parses_and_finds_its_metrics(title: str, query: str, labels: dict[str, set[str]]) -> None:
    plain = query.replace("$__rate_interval", "1m").replace("$__interval", "1m")
    asked = list(selectors(promql_parser.parse(plain)))
    assert asked, "no metric in it"
    for selector in asked:
        assert selector.name in labels, f"{title}: there is no metric {selector.name}"
        names = {matcher.name for matcher in selector.matchers.matchers}
        assert names <= labels[selector.name], f"{title}: {selector.name} has no label {names - labels[selector.name]}"
    for grouping in re.findall(r"by \(([^)]*)\)", plain):
        wanted = {name.strip() for name in grouping.split(",")}
        assert any(wanted <= labels[selector.name] for selector in asked), f"{title}: {wanted}"


def test_panels_lie_side_by_side_and_have_ids_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_panel_asks_the_chosen_source_for_the_chosen_model() -> None:
    for title, query in queries():
        if title in ("model", "instance"):
            continue
        for selector in selectors(
            promql_parser.parse(query.replace("$__rate_interval", "1m").replace("$__interval", "1m"))
        ):
            names = {matcher.name for matcher in selector.matchers.matchers}
            whole_server = selector.name.startswith(("http_", "process_"))
            assert "instance" in names and ("model_name" in names or whole_server), title
