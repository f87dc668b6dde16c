"""A status as Prometheus reads it, on loopback and on request: the only door to prometheus_client.

It serves this machine alone, so it asks for no password; whoever scrapes from elsewhere goes through a
tunnel or a proxy of their own.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client import start_http_server
from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from wardround.errors import ConfigError, WardroundError
from wardround.report.status import Status
from wardround.server.status import Watch

HOST = "127.0.0.1"


@contextlib.contextmanager
def serving(run: Path, port: int | None) -> Iterator[None]:
    """Serve a run folder's metrics on a port of loopback while the block runs; without a port, nothing.

    Raises ConfigError where the port is taken.
    """
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    registry.register(RunCollector(run))
    try:
        server, thread = start_http_server(port, HOST, registry)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"--metrics {port}: {HOST}:{port} cannot be listened on: {reason}; give another.") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class RunCollector(Collector):
    """Reads the run folder at each scrape."""

    def __init__(self, run: Path) -> None:
        self.watch = Watch(run)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the run folder may not be there yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment; none before the run folder is made."""
        try:
            status = self.watch.look()
        except WardroundError:
            return
        yield from metrics_of(status, time.time())


def metrics_of(status: Status, now: float) -> Iterator[Metric]:
    """Yield a status's numbers; those of sites bear the site's name."""
    name = status.federation
    gauges = {
        "rounds": ("Rounds of the federation.", status.rounds),
        "sites": ("Sites that take part.", len(status.sites)),
        "sites_online": ("Sites that are connected.", sum(site.online is True for site in status.sites.values())),
        "seconds_left": ("Time to the last round, as the recent ones went.", status.seconds_left),
    }
    if status.open is not None:
        gauges["round_awaited"] = ("Sites that the open round waits for.", len(status.open.awaited))
        deadline = status.open.deadline
        gauges["round_deadline_seconds"] = ("Time to the open round's deadline.", deadline and deadline - now)
    for key, (text, value) in gauges.items():
        if value is not None:
            yield _one(GaugeMetricFamily(f"wardround_{key}", text, labels=["federation"]), [name], value)
    counters = {
        "rounds_committed": ("Committed rounds.", status.committed),
        "updates_folded": ("Updates that counted.", status.updates),
        "bytes_received": ("Bytes of updates, as they crossed.", status.bytes_in),
        "bytes_sent": ("Bytes of states, as they crossed.", status.bytes_out),
        "round_seconds": ("Seconds that committed rounds took.", status.seconds),
    }
    for key, (text, number) in counters.items():
        yield _one(CounterMetricFamily(f"wardround_{key}", text, labels=["federation"]), [name], number)
    refused = CounterMetricFamily(
        "wardround_refused", "Updates that did not come, by reason.", labels=["federation", "reason"]
    )
    for code, count in status.refusals.items():
        refused.add_metric([name, code], count)
    yield refused
    online = GaugeMetricFamily("wardround_site_online", "Whether a site is connected.", labels=["federation", "site"])
    for site, one in status.sites.items():
        if one.online is not None:
            online.add_metric([name, site], one.online)
    yield online


def _one(
    family: GaugeMetricFamily | CounterMetricFamily, labels: list[str], value: float
) -> GaugeMetricFamily | CounterMetricFamily:
    family.add_metric(labels, value)
    return family
