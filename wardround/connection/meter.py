"""What passes over a site's connection: no more at once than Flower sends, and no faster than the site allows."""

import threading
import time
from collections.abc import Iterator

import httpx

LARGEST_ANSWER = 6 * 2**20  # bytes; what is larger Flower cuts into objects of 5 MiB
_PIECE = 2**16  # bytes that go at once where the bandwidth is limited
_OBJECTS = ("/pull-object", "/push-object")


class Meter:
    """Takes no answer that is longer than Flower's are, or compressed, and paces objects where that is asked for.

    Only objects: polls and heartbeats are small, and must not wait.
    """

    def __init__(self, megabits: float | None) -> None:
        self.up, self.down = Pace(megabits), Pace(megabits)

    def on_request(self, request: httpx.Request) -> None:
        """See to what is sent; a hook of httpx's."""
        request.headers["accept-encoding"] = "identity"  # a kilobyte could become a gigabyte
        if request.url.path.endswith(_OBJECTS):
            request.stream = Metered(request.stream, self.up)

    def on_response(self, response: httpx.Response) -> None:
        """See to what comes; a hook of httpx's, before the body is read."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise httpx.DecodingError("it answers compressed, unasked")
        pace = self.down if response.request.url.path.endswith(_OBJECTS) else Pace(None)
        response.stream = Metered(response.stream, pace, LARGEST_ANSWER)


class Metered(httpx.SyncByteStream):
    """A body in pieces, each at its time. Raises httpx.DecodingError past the most bytes."""

    def __init__(self, body: object, pace: "Pace", most: float = float("inf")) -> None:
        assert isinstance(body, httpx.SyncByteStream)
        self._body, self._pace, self._most = body, pace, most

    def __iter__(self) -> Iterator[bytes]:
        """Yield the body."""
        seen = 0
        for block in self._body:
            seen += len(block)
            if seen > self._most:
                raise httpx.DecodingError(f"it answers with more than {self._most:,} bytes")
            for start in range(0, len(block), _PIECE):
                piece = block[start : start + _PIECE]
                self._pace.wait(len(piece))
                yield piece

    def close(self) -> None:
        """Close what it reads."""
        self._body.close()


class Pace:
    """So many megabits a second, however many threads send; None: as fast as it goes."""

    def __init__(self, megabits: float | None) -> None:
        self._rate = megabits and megabits * 1e6 / 8  # bytes a second
        self._free, self._lock = 0.0, threading.Lock()

    def wait(self, count: int) -> None:
        """Return as soon as so many bytes may go."""
        if self._rate is None:
            return
        with self._lock:
            begin = max(self._free, time.monotonic())
            self._free = begin + count / self._rate
        time.sleep(max(0.0, begin - time.monotonic()))
