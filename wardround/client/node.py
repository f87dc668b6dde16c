"""The process that answers a site's rounds: `python -m wardround.client.node SITE.toml`, started by supervisor.py.

It lives as long as the connection, so that torch, the images' index and the code are loaded once.
"""

import sys
import time
from datetime import datetime
from pathlib import Path

from flwr.app import Context, RecordDict

from wardround import logs
from wardround.client.app import app, keys
from wardround.config.site import SiteConfig, read_site
from wardround.connection.site import SiteConnection, connected, polite_pause
from wardround.processes import stopped_by_sigterm
from wardround.registry.durable import write_file
from wardround.wire import is_last_round

_LOOK = 5.0  # seconds


def answer_rounds(path: Path) -> None:
    """Answer the coordinator's messages until stopped; each line printed is one that supervisor.py knows."""
    site = read_site(path)
    coordinator, (own, _) = site.coordinator, keys(site)
    assert coordinator is not None and own is not None, "supervisor.py has looked"
    number = site.work / "flower" / "node"  # Flower's, of this site
    before = int(number.read_text()) if number.exists() else None
    number.unlink(missing_ok=True)  # who finds another process in its place asks for it once
    pulse = site.work / "flower" / "beat"
    while True:
        _wait_for_hours(site, pulse)
        with connected(coordinator, own, before, site.bandwidth, pulse) as connection:
            write_file(number, str(connection.node).encode())
            print(f"connected as node {connection.node}", flush=True)
            _answer_while_open(site, path, connection)
        before = None  # it has said good-bye


def _wait_for_hours(site: SiteConfig, pulse: Path) -> None:
    """Return once it is within a site's hours, in which alone it is there for the coordinator."""
    if not site.is_open(datetime.now().time()):
        print(f"site '{site.name}': not within its hours, {site.hours}; it is not connected until then", flush=True)
    while not site.is_open(datetime.now().time()):  # asked often: clocks are set, and machines sleep
        pulse.touch()  # a container that waits is well
        time.sleep(_LOOK)


def _answer_while_open(site: SiteConfig, path: Path, connection: SiteConnection) -> None:
    """Answer messages until the site's hours are over; a round that is being trained then is finished and sent."""
    last, before, first = time.monotonic(), 0.0, True
    while site.is_open(datetime.now().time()):
        message = connection.receive()
        if message is None:
            time.sleep(polite_pause(time.monotonic() - last, before))
            continue
        before, first = 0.0 if first else time.monotonic() - last, False  # at first others were waited for
        print(f"round {ascii(message.metadata.group_id)[1:-1]}", flush=True)  # on one line, whatever it is
        context = Context(message.metadata.run_id, connection.node, {"site-config": str(path)}, RecordDict(), {})
        sent = connection.answer(app(message, context))
        last_of = ", of the last round" if is_last_round(message.content) else ""
        print(f"answer sent{last_of}" if sent else "answer not wanted any more", flush=True)
        last = time.monotonic()


if __name__ == "__main__":
    logs.begin()
    with stopped_by_sigterm():  # so that the coordinator is told that the site leaves
        try:
            answer_rounds(Path(sys.argv[1]))
        except ConnectionRefusedError as error:  # by its key, or by another container in its place: no fault of ours
            print(f"ConnectionRefusedError: {error}", flush=True)
            sys.exit(1)
