import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from forwarder.exposition import Statistics
from forwarder.observer import look
from tests.forwarder.statistics import Pages
from workers.shm.stats import Past

DEPLOY = Path(__file__).parents[2] / "deploy"
LABELS = {"tunnel", "worker", "kind", "reason", "le"}


def registry_of(pages: Pages) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Statistics(lambda: look(pages.memory)))
    return registry


def filled(pages: Pages) -> CollectorRegistry:
    pages.instance()
    for slot in (0, 1):
        pages.worker(slot, beat=slot + 1)
    return registry_of(pages)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"forwarder_{name}", labels)


def test_tunnels_are_sums_over_the_workers() -> None:
    with Pages() as pages:
        registry = filled(pages)
        assert value(registry, "received_bytes_total", tunnel="web") == 3000
        assert value(registry, "sent_bytes_total", tunnel="kcp") == 30
        assert value(registry, "flows_open", tunnel="web") == 2
        assert value(registry, "carriers_up", tunnel="web", kind="stripe") == 4
        assert value(registry, "carriers_wanted", tunnel="kcp", kind="udp") == 10
        assert value(registry, "carrier_rtt_seconds", tunnel="web", kind="stripe") == pytest.approx(0.03)
        assert value(registry, "carrier_rtt_max_seconds", tunnel="web", kind="stripe") == 0.04
        assert value(registry, "carrier_loss_ratio", tunnel="web", kind="stripe") == pytest.approx(0.02)
        assert value(registry, "datagrams_dropped_total", tunnel="kcp", reason="no_port") == 8
        assert value(registry, "records_rejected_total", tunnel="kcp", reason="forged") == 4
        assert value(registry, "records_rejected_total", tunnel="web", reason="forged") is None


def test_workers_stand_for_themselves() -> None:
    with Pages() as pages:
        registry = filled(pages)
        assert value(registry, "worker_cpu_seconds_total", worker="1") == 0.5
        assert value(registry, "worker_restarts_total", worker="1") == 1
        assert value(registry, "worker_loop_lag_seconds_bucket", worker="1", le="0.001") == 8
        assert value(registry, "worker_loop_lag_seconds_count", worker="1") == 8
        assert value(registry, "worker_fragments_dropped_total", worker="0", reason="expired") == 3
        assert value(registry, "build_info", role="client", version="1.2.3") == 1
        assert value(registry, "ready") == 1
        assert (value(registry, "supervisor_process_cpu_seconds_total") or 0) > 0


def test_worker_that_is_gone_leaves_its_sums_and_nothing_of_its_own() -> None:
    with Pages() as pages:
        registry = filled(pages)
        Past(pages.memory).fold(1)
        pages.instance(("up", "down"))
        assert value(registry, "received_bytes_total", tunnel="web") == 3000
        assert value(registry, "flows_open", tunnel="web") == 1
        assert value(registry, "worker_cpu_seconds_total", worker="1") is None
        assert value(registry, "worker_up", worker="1") == 0
        assert value(registry, "ready") == 0


def test_instance_without_workers_has_its_tunnels_at_zero() -> None:
    with Pages() as pages:
        pages.instance(("starting", "starting"), "starting")
        registry = registry_of(pages)
        assert value(registry, "received_bytes_total", tunnel="web") == 0
        assert value(registry, "worker_up", worker="0") == 0


def test_empty_pages_are_no_error() -> None:
    with Pages() as pages:
        assert b"forwarder_ready" not in generate_latest(registry_of(pages))


def families(pages: Pages) -> list[list[Metric]]:
    registry = filled(pages)
    texts = generate_latest(registry).decode(), generate_openmetrics(registry).decode()
    return [list(parse_text(texts[0])), list(parse_openmetrics(texts[1]))]


def test_names_and_labels_are_those_agreed() -> None:
    with Pages() as pages:
        for family in (each for found in families(pages) for each in found):
            assert family.name.startswith("forwarder_") and family.documentation.endswith("."), family
            for sample in family.samples:
                assert set(sample.labels) <= LABELS or family.name.startswith("forwarder_build"), sample
                assert family.type != "counter" or sample.name.endswith("_total"), sample


def test_promtool_has_nothing_to_say() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool (Debian: prometheus)")
    with Pages() as pages:
        text = generate_latest(filled(pages))
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("file", ["grafana/forwarder.json", "prometheus/alerts.yml"])
def test_dashboard_and_alerts_ask_for_metrics_that_exist(file: str) -> None:
    """As far as the text tells; tests/system/test_metrics.py asks a real Prometheus."""
    with Pages() as pages:
        names = {sample.name for family in families(pages)[0] for sample in family.samples}
    asked = set(re.findall(r"\bforwarder_\w+", (DEPLOY / file).read_text()))
    assert len(asked) > 10 and not asked - names
