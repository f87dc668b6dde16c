"""A hospital's DICOMweb server: studies looked for (QIDO-RS), objects fetched (WADO-RS), DICOM PS3.18.

What is transient is tried again, ever more slowly; what is not is one line of DataError, which stays at
the site. An answer has a largest size, and an object goes to disk piece by piece, never whole into memory.
"""

import email.message
import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import requests
from requests.auth import HTTPBasicAuth

from wardround.config.site import SiteConfig, read_secret
from wardround.errors import DataError

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")
Found = dict[str, Any]  # DICOM JSON: tag -> {"vr", "Value"}

LARGEST_OBJECT = 2**30  # bytes; a tomosynthesis of some hundred slices, compressed, has half of it
_LARGEST_PAGE = 2**26
_LARGEST_HEAD = 2**16  # of a part
_PAGE = 500  # results; a server may give fewer
_TRIES = 6
_LONGEST_PAUSE = 30.0  # seconds
_TIMEOUT = (10.0, 120.0)  # seconds to connect, and between two bytes
_PIECE = 2**20
_OBJECT = 'multipart/related; type="application/dicom"; transfer-syntax=*'  # as it is stored


class Unavailable(Exception):  # noqa: N818  # of one object; no error of the site's
    """One object cannot be had; the text says why, and holds no identifier."""


class _Passing(Exception):  # noqa: N818
    """What a new try may mend."""


class Server:
    """One server, as a site's file names it. Raises DataError where it cannot be used."""

    def __init__(self, site: SiteConfig) -> None:
        images = site.images
        assert images.url is not None, "the config sees to it"
        self.who, self.url = site.name, images.url.rstrip("/")
        self.host = urlsplit(self.url).netloc
        self.session = requests.Session()
        self.session.trust_env = False  # neither proxies nor .netrc: the file alone says how it is reached
        self.session.verify = str(images.ca_certificate) if images.ca_certificate else True
        self.session.headers["Accept-Encoding"] = "identity"  # a kilobyte could become a gigabyte
        if images.ca_certificate is not None and not images.ca_certificate.is_file():
            raise self._error("has no CA certificate to be known by", f"there is no file {images.ca_certificate}")
        if images.credentials is not None:
            self._log_in(read_secret(images.credentials))

    def search(self, path: str, key: str, filters: dict[str, Any]) -> Iterator[Found]:
        """Yield what is found below a path, page by page, each UID (tag `key`) once."""
        seen: set[str] = set()
        offset = 0
        while True:
            params = {**filters, "limit": _PAGE, "offset": offset}
            page = self._patiently(partial(self._page, path, params))
            offset += len(page)
            news = {uid: one for one in page if (uid := first(one, key)) not in seen}
            if not news:  # the end, or a server that has no pages
                return
            seen |= news.keys()
            yield from news.values()

    def retrieve(self, path: str, file: IO[bytes]) -> None:
        """Write one object (DICOM Part 10) to a file. Raises Unavailable where the server does not give it."""
        self._patiently(partial(self._object, path, file))

    def _log_in(self, secret: str) -> None:
        kind, _, token = secret.partition(" ")
        user, colon, password = secret.partition(":")
        if kind == "Bearer" and token:
            self.session.headers["Authorization"] = secret
        elif colon:
            self.session.auth = HTTPBasicAuth(user.encode(), password.encode())
        else:
            raise self._error("cannot be asked", "[images] credentials holds neither USER:PASSWORD nor Bearer TOKEN")

    def _page(self, path: str, params: dict[str, Any]) -> list[Found]:
        with self._get(path, params, "application/dicom+json") as answer:
            if answer.status_code == requests.codes.no_content:
                return []
            if answer.status_code != requests.codes.ok:
                raise self._error(f"answers {answer.status_code} to a search", "check [images] url and filters")
            body = b"".join(self._pieces(answer, _LARGEST_PAGE))
        try:
            found = json.loads(body) if body.strip() else []
        except ValueError:
            found = None
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise self._error("answers a search with no DICOM JSON", "check [images] url")
        return found

    def _object(self, path: str, file: IO[bytes]) -> None:
        file.seek(0)
        file.truncate()
        with self._get(path, {}, _OBJECT) as answer:
            if answer.status_code != requests.codes.ok:
                raise Unavailable(f"the server answers {answer.status_code}")
            kind = email.message.Message()
            kind["content-type"] = answer.headers.get("content-type", "")
            pieces = self._pieces(answer, LARGEST_OBJECT)
            if kind.get_content_type() == "multipart/related":
                pieces = first_part(pieces, str(kind.get_param("boundary", "")).encode())
            elif kind.get_content_type() != "application/dicom":  # some servers give it bare
                raise Unavailable(f"the server answers with {kind.get_content_type()}, and no DICOM object")
            for piece in pieces:
                file.write(piece)

    def _get(self, path: str, params: dict[str, Any], accept: str) -> requests.Response:
        """Return an answer whose body is not read yet. Raises _Passing, or DataError."""
        try:
            answer = self.session.get(
                f"{self.url}/{path}",
                params=params,
                headers={"Accept": accept},
                stream=True,
                timeout=_TIMEOUT,
                allow_redirects=False,
            )
        except requests.exceptions.SSLError as error:
            if "certificate" not in str(error):
                raise _Passing("its TLS broke off") from error
            raise self._error(
                "shows a certificate that does not hold", "set [images] ca_certificate to its CA's"
            ) from error
        except requests.RequestException as error:
            raise _Passing(_plain(error)) from error
        status = answer.status_code
        if status in (requests.codes.request_timeout, requests.codes.too_many_requests) or status >= 500:
            answer.close()
            raise _Passing(f"it answers {status}")
        if status in (requests.codes.unauthorized, requests.codes.forbidden):
            answer.close()
            raise self._error(f"answers {status}", "mend [images] credentials, or what that account may see")
        if 300 <= status < 400:
            answer.close()
            raise self._error(f"answers {status}, to another address", "set [images] url to that")
        return answer

    def _pieces(self, answer: requests.Response, most: int) -> Iterator[bytes]:
        """Yield a body. Raises Unavailable past the most bytes, _Passing where it breaks off."""
        count = 0
        try:
            for piece in answer.iter_content(_PIECE):
                count += len(piece)
                if count > most:
                    raise Unavailable(f"too large: more than {most // 2**20} MiB")
                yield piece
        except requests.RequestException as error:
            raise _Passing(_plain(error)) from error

    def _patiently(self, call: Callable[[], Answer]) -> Answer:
        """Return what a call does, tried again while what ails it may pass."""
        pause = 1.0
        for left in reversed(range(_TRIES)):
            try:
                return call()
            except _Passing as passing:
                if left == 0:
                    raise self._error(
                        f"cannot be used after {_TRIES} tries: {passing}", "see to it; rounds go on once it is back"
                    ) from passing
                log.warning("the DICOMweb server is asked again: %s", passing)
            time.sleep(random.uniform(0.5, 1.0) * pause)  # noqa: S311  # not all sites of a hospital at once
            pause = min(_LONGEST_PAUSE, 2 * pause)
        raise AssertionError

    def _error(self, found: str, remedy: str) -> DataError:
        return DataError(f"site '{self.who}': the DICOMweb server at {self.host} {found}; {remedy}.")


def first_part(pieces: Iterator[bytes], boundary: bytes) -> Iterator[bytes]:
    r"""Yield what the first part of a multipart body holds (RFC 2046, 5.1), never more of it than two pieces at once.

    Raises _Passing where the body ends before the part does.

    >>> body = b"--x\r\nContent-Type: application/dicom\r\n\r\nDICM\r\n--x--"
    >>> b"".join(first_part(iter([body[:9], body[9:45], body[45:]]), b"x"))
    b'DICM'
    """
    end = b"\r\n--" + boundary
    held, begun = b"\r\n", False  # the first boundary has no line before it
    for piece in pieces:
        held += piece
        if not begun:
            head = held.find(b"\r\n\r\n", max(0, held.find(end)))
            if head < 0:
                if len(held) > _LARGEST_HEAD:
                    raise Unavailable("the server answers with no multipart body")
                continue
            held, begun = held[head + 4 :], True
        if (at := held.find(end)) >= 0:
            yield held[:at]
            return
        yield held[: -len(end)]
        held = held[-len(end) :]
    raise _Passing("an object broke off")


def values(found: Found, tag: str) -> Sequence[str]:
    """Return an element's values as text; none where it is absent.

    >>> values({"00080061": {"vr": "CS", "Value": ["CR", "SR"]}}, "00080061")
    ['CR', 'SR']
    """
    element = found.get(tag)
    held = element.get("Value") if isinstance(element, dict) else None
    return [str(value) for value in held] if isinstance(held, list) else []


def first(found: Found, tag: str) -> str:
    """Return an element's first value as text; "" where it is absent."""
    return next(iter(values(found, tag)), "")


def _plain(error: requests.RequestException) -> str:
    """Return what went wrong without the address, which may name a patient."""
    if isinstance(error, requests.Timeout):
        return "it does not answer in time"
    if isinstance(error, requests.ConnectionError) and "NameResolution" in str(error):
        return "its host name is not known"
    return "it cannot be connected to" if isinstance(error, requests.ConnectionError) else "its answer broke off"
