"""Which keys SuperLink admits: told to it, and taken back, by Flower's own command.

RUN/flower/registered.json   site -> its public key and Flower's number of its node, as SuperLink's database has them
"""

import json
import subprocess
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from tqdm import tqdm

from wardround.errors import WardroundError
from wardround.processes import command, environment
from wardround.registry.durable import write_file

CONNECTION = "coordinator"  # the name of our SuperLink in the Flower CLI's own config
PATIENCE = 120.0  # seconds; a cold start on a slow disk takes about ten


def flwr(home: Path, *arguments: str | Path) -> dict[str, Any]:
    """Return the Flower CLI's answer. Raises WardroundError with what it says where it fails."""
    call = command("flwr", *arguments, "--format", "json")
    try:
        done = subprocess.run(
            call, env=environment(home), cwd=home, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        answer = {"error-message": f"no answer after {PATIENCE:.0f} s"}
    except ValueError:
        answer = {"error-message": done.stderr or done.stdout}
    if not answer.get("success"):  # its exit status is 0 even so
        reason = " ".join(str(answer.get("error-message")).split())
        raise WardroundError(f"Flower refused '{' '.join(map(str, arguments[:2]))}': {reason[-300:]}.")
    return answer


def is_registered(home: Path, members: dict[str, str]) -> bool:
    """Return whether SuperLink's database knows exactly these keys."""
    return {site: key for site, (key, _) in _book(home).items()} == members and _file(home).exists()


def forget(home: Path) -> None:
    """Begin SuperLink's database anew; sites that are connected come back by themselves."""
    for path in (_file(home), *home.glob("state.db*")):
        path.unlink(missing_ok=True)


def admit(home: Path, members: dict[str, str]) -> None:
    """Make a SuperLink that runs admit exactly these keys (PEM); whose key is taken back is cut off at once.

    Flower never admits a key again that was taken back. The book is written last: what a kill leaves undone shows.
    """
    book = _book(home)
    for site in [site for site, (key, _) in book.items() if members.get(site) != key]:
        flwr(home, "supernode", "unregister", str(book.pop(site)[1]), CONNECTION)
    for site in tqdm(sorted(members.keys() - book.keys()), "keys", unit="site", disable=None, delay=2, leave=False):
        path = home / "keys" / f"{site}.pub"
        key = load_pem_public_key(members[site].encode())
        write_file(path, key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
        node = flwr(home, "supernode", "register", path, CONNECTION, "--name", site)["node-id"]
        book[site] = (members[site], int(node))
    write_file(_file(home), json.dumps(book).encode())


def _file(home: Path) -> Path:
    return home / "registered.json"


def _book(home: Path) -> dict[str, tuple[str, int]]:
    try:
        found: dict[str, tuple[str, int]] = {
            site: (key, int(node)) for site, (key, node) in json.loads(_file(home).read_bytes()).items()
        }
    except (OSError, ValueError):  # of an earlier release, or cut off: it is begun anew
        return {}
    return found
