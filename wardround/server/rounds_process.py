"""The process that runs a federation's rounds beside SuperLink, started again by superlink.py where it dies.

    python -m wardround.server.rounds_process RUN_FOLDER KIT HOST:PORT SECRET_FILE RUN_NUMBER [--ask]

What a person should see it prints, line by line; an error of a user's is its last line, and exit 2.
"""

import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from wardround import logs
from wardround.connection.coordinator import coordinating
from wardround.errors import WardroundError
from wardround.registry.signing import kit_key
from wardround.server.app import Fleet, run_federation
from wardround.server.roster import Roster
from wardround.server.run_folder import open_run
from wardround.server.scoring import ask_sites
from wardround.server.superlink import ASK, ERROR


def main(folder: str, kit: str, address: str, secret: str, number: str, *options: str) -> None:
    """Run what is left of a run folder's rounds; with --ask, ask its sites for their scores of the newest state."""
    try:
        key = load_pem_private_key((Path(kit) / "signing.key").read_bytes(), None)
        assert isinstance(key, EllipticCurvePrivateKey), "provision makes no other"
        ca = (Path(kit) / "ca.crt").read_bytes()
        with coordinating(address, ca, Path(secret).read_bytes(), int(number)) as grid:
            run = open_run(Path(folder))
            roster = Roster(Path(kit), run.path)
            if ASK in options:
                fleet = Fleet(grid, run, key, roster)
                fleet.take_over()
                ask_sites(fleet.run, fleet.ask)
            else:
                run_federation(grid, run, key, roster, kit_key(Path(kit)))
    except WardroundError as error:
        print(f"{ERROR}{error}", flush=True)
        sys.exit(2)


if __name__ == "__main__":
    logs.begin()
    main(*sys.argv[1:])
