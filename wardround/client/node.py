"""The process that answers a site's rounds: `python -m wardround.client.node SITE.toml`, started by supervisor.py.

It lives as long as the connection, so that torch, the images' index and the code are loaded once.
"""

import logging
import sys
import time
from pathlib import Path

from flwr.app import Context, RecordDict

from wardround.client.app import app, keys
from wardround.config.site import read_site
from wardround.connection import connected, polite_pause
from wardround.processes import stopped_by_sigterm
from wardround.registry.durable import write_file


def answer_rounds(path: Path) -> None:
    """Answer the coordinator's messages until stopped; each line printed is one that supervisor.py knows."""
    site = read_site(path)
    coordinator, (own, _) = site.coordinator, keys(site)
    assert coordinator is not None and own is not None, "supervisor.py has looked"
    number = site.work / "flower" / "node"  # Flower's, of this site
    before = int(number.read_text()) if number.exists() else None
    number.unlink(missing_ok=True)  # who finds another process in its place asks for it once
    with connected(coordinator.address, coordinator.ca_certificate.read_bytes(), own, before) as connection:
        write_file(number, str(connection.node).encode())
        print(f"connected as node {connection.node}", flush=True)
        last = time.monotonic()
        while True:
            message = connection.receive()
            if message is None:
                time.sleep(polite_pause(last))
                continue
            print(f"round {message.metadata.group_id}", flush=True)
            started = time.monotonic()
            context = Context(message.metadata.run_id, connection.node, {"site-config": str(path)}, RecordDict(), {})
            reply = app(message, context)
            sent = connection.answer(reply, time.monotonic() - started)
            print("answer sent" if sent else "answer not wanted any more", flush=True)
            last = time.monotonic()


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for every time that we ask
    with stopped_by_sigterm():  # so that the coordinator is told that the site leaves
        answer_rounds(Path(sys.argv[1]))
