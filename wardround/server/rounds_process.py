"""The process that runs a federation's rounds beside SuperLink, started again by superlink.py where it dies.

    python -m wardround.server.rounds_process RUN_FOLDER CA_CERTIFICATE HOST:PORT SECRET_FILE RUN_NUMBER

What a person should see it prints, line by line; an error of a user's is its last line, and exit 2.
"""

import logging
import sys
from pathlib import Path

from wardround.connection import coordinating
from wardround.errors import WardroundError
from wardround.server.app import run_federation
from wardround.server.run_folder import open_run

ERROR = "error: "  # before the one line of a user's error


def main(folder: str, ca: str, address: str, secret: str, number: str) -> None:
    """Run what is left of a run folder's rounds."""
    try:
        with coordinating(address, Path(ca).read_bytes(), Path(secret).read_bytes(), int(number)) as grid:
            run_federation(grid, open_run(Path(folder)))
    except WardroundError as error:
        print(f"{ERROR}{error}", flush=True)
        sys.exit(2)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    main(*sys.argv[1:])
