"""A site's side of the network: the process that answers rounds, started, watched, and started again.

    WORK/flower/   Flower's own state (FLWR_HOME)        WORK/logs/   node.log

It only calls out, and listens on nothing.
"""

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from wardround.client.kit import check_folders, check_kit, why_untrusted
from wardround.client.reach import daily
from wardround.config import SiteConfig
from wardround.config.site import read_site
from wardround.processes import NewLines, alone, running, stopped_by_sigterm

_POLL = 0.5  # seconds
_SOON, _LATER = 5.0, 65.0  # seconds: after a connection that was cut; doubled up to this while none is made

_UNTRUSTED = "the coordinator's certificate does not hold"

# What of the node's log a person at the site is told; all else stays in the log.
_SAYINGS = (
    (r"^connected as node ", "is connected"),
    (r"^the coordinator cannot be reached \((by the proxy .*)\)$", r"cannot reach the coordinator \1; keeps trying"),
    (r"Name or service not known|nodename nor servname", "does not know the coordinator's host name; keeps trying"),
    (r"^the coordinator cannot be reached", "cannot reach the coordinator; keeps trying"),
    (r"^the coordinator is reached again", "reaches the coordinator again"),
    (r"^(this machine's clock is .*)", r"\1"),
    (r"^(round \d+)$", r"\1"),
    (r"^answer sent, of the last round", "its answer is sent; the federation has no more rounds: wait, or stop it"),
    (r"^answer sent", "its answer is sent"),
    (r"^answer not wanted", "its answer came too late for this run; it is kept for the next"),
    (r"^site '[^']+'[,:]? (.*)", r"\1"),  # what our own ClientApp logs
)
_REASONS = (
    (r"ConnectionRefusedError: (.*)", r"\1"),
    (r"CheckpointError: (.*)", r"\1"),
    (r"OSError: \[Errno \d+\] (No space left on device|Disk quota exceeded)", r"\1"),
    (r"certificate verify failed", _UNTRUSTED),
)


def run_site(config_path: Path) -> None:
    """Answer the coordinator's rounds until stopped by Ctrl-C or SIGTERM, whatever the network does.

    Raises ConfigError where the site's file, key or certificate cannot be used.
    """
    path = config_path.resolve()
    site = read_site(path)
    check_kit(site, path)
    check_folders(site, path)
    assert site.coordinator is not None, "check_kit has looked"
    work, ending = site.work.resolve(), daily(site.coordinator)
    with stopped_by_sigterm(), alone(work / "flower", "wardround site run"):
        pause = _SOON
        while True:
            connected, reason = _connect_once(site, path, work, ending)
            pause = _SOON if connected else min(_LATER, 2 * pause)
            print(f"site '{site.name}': {reason}; tries again in {pause:.0f} s", flush=True)
            time.sleep(pause)


def _connect_once(site: SiteConfig, path: Path, work: Path, ending: Iterator[list[str]]) -> tuple[bool, str]:
    """Run a node until it ends by itself; return whether it was connected, and why it ended.

    Meanwhile say what `ending` says of certificates.
    """
    log, connected, reason, said = work / "logs" / "node.log", False, "its process ended", ""
    lines = NewLines(log)
    node = [sys.executable, "-m", "wardround.client.node", str(path)]
    with running(node, work / "flower", log, path.parent) as process:
        ended = False
        while not ended:
            ended = process.poll() is not None
            for line in lines.read():
                reason = _first(_REASONS, line) or reason
                saying = _first(_SAYINGS, line)
                if saying and saying != said:  # an outage is said once, not at each attempt
                    where = f" (see {log})" if saying.endswith("keeps trying") else ""
                    print(f"site '{site.name}': {saying}{where}", flush=True)
                    said = saying
                connected |= line.startswith("connected as node ")
            for line in next(ending):
                print(f"site '{site.name}': {line}", flush=True)
            time.sleep(_POLL)
    if reason == _UNTRUSTED and site.coordinator is not None:
        reason = f"the coordinator's certificate {why_untrusted(site.coordinator)}"
    return connected, f"{reason} (see {log})"


def _first(table: tuple[tuple[str, str], ...], line: str) -> str | None:
    for pattern, text in table:
        if found := re.search(pattern, line):
            return found.expand(text)
    return None
