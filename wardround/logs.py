"""One line, one JSON object: what collectors of logs read, instead of lines for a person.

The switch is `wardround --log-json`, or WARDROUND_LOG_JSON=1, which child processes inherit. It takes in
what is printed, too: what a person should see is printed, and a collector wants all of it.
"""

import io
import json
import logging
import os
import sys
import time
from typing import TextIO

SWITCH = "WARDROUND_LOG_JSON"
_LEVELS = {"warning": "WARNING", "error": "ERROR", "Traceback (most recent call last)": "ERROR"}


def as_json() -> bool:
    """Return whether lines are to be JSON."""
    return os.environ.get(SWITCH, "") not in ("", "0")


class JsonFormatter(logging.Formatter):
    """Makes a record one line: time (UTC), level, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON, its trace within the message."""
        return _line(record.created, record.levelname, record.name, super().format(record))


class JsonLines(io.TextIOBase):
    """A stream that makes each line that is printed on it an object, unless it is one of a logger's."""

    def __init__(self, to: TextIO) -> None:
        self.to, self._begun = to, ""

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Write the lines that are whole by now."""
        *whole, self._begun = (self._begun + text).split("\n")
        for line in filter(str.strip, whole):
            known = line.startswith('{"time": ')
            level = _LEVELS.get(line.partition(":")[0], "INFO")
            self.to.write(f"{line if known else _line(time.time(), level, 'wardround', line)}\n")
        return len(text)

    def fileno(self) -> int:
        """Return the file's number, which rich asks for where its reader has hung up."""
        return self.to.fileno()

    def flush(self) -> None:
        """Flush what is written."""
        self.to.flush()


def begin() -> None:
    """Set up the lines of a process that works in the background: as JSON where the switch is on, else plain."""
    if as_json():
        begin_prints()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for every time that we ask
    if as_json():
        logging.getLogger().handlers[0].setFormatter(JsonFormatter())


def begin_prints() -> None:
    """Turn the switch on, for this process's prints and for its children."""
    os.environ[SWITCH] = "1"
    sys.stdout, sys.stderr = JsonLines(sys.stdout), JsonLines(sys.stderr)


def message(line: str) -> str:
    """Return what a line of either kind says.

    >>> message('{"time": "", "level": "INFO", "logger": "wardround", "message": "round 1"}'), message("round 1")
    ('round 1', 'round 1')
    """
    if not line.startswith('{"time": '):
        return line
    try:
        return str(json.loads(line)["message"])
    except (ValueError, KeyError):
        return line


def _line(created: float, level: str, logger: str, text: str) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created))
    moment = f"{stamp}.{int(created % 1 * 1000):03d}Z"
    return json.dumps({"time": moment, "level": level, "logger": logger, "message": text})
