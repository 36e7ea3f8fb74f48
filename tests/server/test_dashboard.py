"""The dashboard in `examples/grafana.json`: it asks for metrics that a server has, and for all of ours."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana.json"

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def shown(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels that show something; rows are headings."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_it_asks_for_metrics_that_a_server_has_and_for_all_of_ours(dashboard: dict[str, Any], http: httpx.Client):
    families = text_string_to_metric_families(http.get("/metrics").raise_for_status().text)
    samples = {sample.name for family in families for sample in family.samples}
    queries = [target["expr"] for panel in shown(dashboard) for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"vllm:\w+", query)}
    assert asked <= samples
    ours = {name for name in samples if name.startswith("vllm:armt_") and not name.endswith("_created")}
    assert ours <= asked


def test_it_is_what_grafana_loads(dashboard: dict[str, Any]):
    assert {"title", "uid", "schemaVersion", "templating", "panels"} <= dashboard.keys()
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
    # nothing lies over anything else
    places = [tuple(panel["gridPos"][side] for side in "yxhw") for panel in dashboard["panels"]]
    for (y, x, h, w), (below, beside, _, _) in pairwise(sorted(places)):
        assert (beside >= x + w) if below == y else (below >= y + h)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text())) - {"__rate_interval", "__all"}
    assert used == variables
    for panel in shown(dashboard):
        assert panel["datasource"]["type"] == "prometheus"
        assert panel["title"]
        assert panel["description"]
