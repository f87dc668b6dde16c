"""A site's side of the network: the process that answers rounds, started, watched, and started again.

    WORK/flower/   Flower's own state (FLWR_HOME)        WORK/logs/   node.log

It only calls out, and listens on nothing.
"""

import re
import stat
import sys
import time
from pathlib import Path

from wardround.config import SiteConfig
from wardround.config.site import read_site
from wardround.errors import ConfigError
from wardround.processes import NewLines, alone, running, stopped_by_sigterm

_POLL = 0.5  # seconds
_SOON = 5.0  # seconds, for a connection that was cut
# A SuperNode that was killed counts as online for up to a minute, and for so long its key is refused.
_LATER = 65.0  # seconds

# What of the node's log a person at the site is told; all else stays in the log.
_SAYINGS = (
    (r"^connected as node ", "is connected"),
    (r"Connection attempt failed", "cannot reach the coordinator; keeps trying"),
    (r"Connection successful", "reaches the coordinator again"),
    (r"^(round \d+)$", r"\1"),
    (r"^answer sent", "its answer is sent"),
    (r"^answer not wanted", "its answer came too late for this run; it is kept for the next"),
    (r"^site '[^']+'[,:]? (.*)", r"\1"),  # what our own ClientApp logs
)
_REASONS = (
    # Told that it is not known, Flower's connection stops its process as if by Ctrl-C.
    (r"KeyboardInterrupt", "the coordinator was started anew, or this site's clock is wrong"),
    (
        r"Failed to initialize the connection|Failed to activate",
        "the coordinator does not know its key, or still counts it as online",
    ),
    (r"certificate verify failed", "the coordinator's certificate is not signed by ca.crt, or is for another address"),
    (r"Name or service not known|nodename nor servname", "the coordinator's host name is not known"),
)


def run_site(config_path: Path) -> None:
    """Answer the coordinator's rounds until stopped by Ctrl-C or SIGTERM, whatever the network does.

    Raises ConfigError where the site's file, key or certificate cannot be used.
    """
    path = config_path.resolve()
    site = read_site(path)
    _check_kit(site, path)
    work = site.work.resolve()
    with stopped_by_sigterm(), alone(work / "flower", "wardround site run"):
        while True:
            pause, reason = _connect_once(site, path, work)
            print(f"site '{site.name}': {reason}; tries again in {pause:.0f} s", flush=True)
            time.sleep(pause)


def _connect_once(site: SiteConfig, path: Path, work: Path) -> tuple[float, str]:
    """Run a node until it ends by itself; return how long to wait before the next, and why it ended."""
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
                    print(f"site '{site.name}': {saying}", flush=True)
                    said = saying
                connected |= line.startswith("connected as node ")
            time.sleep(_POLL)
    return (_SOON if connected else _LATER), f"{reason} (see {log})"


def _check_kit(site: SiteConfig, path: Path) -> None:
    """Raise ConfigError where the kit's files are not as they came."""
    found = site.coordinator
    if found is None:
        raise ConfigError(f"{path}: has no [coordinator]; take that section from the kit.")
    for file in (found.ca_certificate, found.private_key, found.signing_key):
        if not file.is_file():
            raise ConfigError(f"{path}: there is no file '{file.name}'; put the kit's where it says.")
    key = found.private_key
    if stat.S_IMODE(key.stat().st_mode) & 0o077:
        raise ConfigError(f"{key}: other accounts can read it; 'chmod 600' it, and ask for a new kit if it was seen.")


def _first(table: tuple[tuple[str, str], ...], line: str) -> str | None:
    for pattern, text in table:
        if found := re.search(pattern, line):
            return found.expand(text)
    return None
