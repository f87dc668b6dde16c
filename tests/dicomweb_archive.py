"""A DICOMweb server over objects in memory: real HTTP, real paging, real multipart bodies, and faults on demand.

Starlette and pydicom make it; no well-kept Python server is in the registries. tests/test_data_dicomweb.py asks
Orthanc the same where it is installed.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from conftest import serving_in_a_thread
from data_objects import image_object, some_pixels
from pydicom import Dataset, dcmread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from wardround.processes import free_port

LEVELS = {"StudyInstanceUID": "0020000D", "SeriesInstanceUID": "0020000E", "SOPInstanceUID": "00080018"}


def object_of(patient: str, uid: str, **elements: Any) -> bytes:
    """Return an image object; its UID is STUDY.SERIES.OBJECT below 1.2."""
    study, series, _ = uid.split(".")
    names = {
        "StudyInstanceUID": f"1.2.{study}",
        "SeriesInstanceUID": f"1.2.{study}.{series}",
        "SOPInstanceUID": f"1.2.{uid}",
    }
    seed = int(uid.replace(".", ""))
    made = image_object(some_pixels(seed), **{"PatientID": patient, "StudyDate": "20240501", **names, **elements})
    block = io.BytesIO()
    made.save_as(block, enforce_file_format=True)
    return block.getvalue()


class Archive:
    """What a server holds, what it was asked, and how it misbehaves."""

    def __init__(self, *objects: bytes) -> None:
        self.objects: list[bytes] = list(objects)
        self.asked: list[str] = []  # paths, without the prefix
        self.headers: list[dict[str, str]] = []
        self.most = 1000  # results a page, whatever is asked for
        self.faults: dict[str, list[Response]] = {}  # path -> what it answers first
        self.hidden: set[str] = set()  # studies that a search without their UID misses
        self.counts = True

    def taken(self) -> list[str]:
        """Return the objects that were fetched, and forget all that was asked."""
        found = [path.rpartition("/")[2] for path in self.asked if path.rpartition("/")[0].endswith("/instances")]
        self.asked.clear()
        return found

    async def search(self, request: Request) -> Response:
        if (fault := self._fault(request)) is not None:
            return fault
        level = list(LEVELS)[len(request.path_params)]
        chosen: dict[str, list[Dataset]] = {}
        for block in self.objects:
            one = dcmread(io.BytesIO(block))
            if all(one[key].value == value for key, value in request.path_params.items()):
                chosen.setdefault(one[level].value, []).append(one)
        query = dict(request.query_params)
        begin, most = int(query.get("offset", 0)), min(int(query.get("limit", 1000)), self.most)
        fitting = [members for uid, members in sorted(chosen.items()) if self._fits(uid, members, query)]
        page = [self._result(level, members) for members in fitting[begin : begin + most]]
        return JSONResponse(page, media_type="application/dicom+json") if page else Response(status_code=204)

    async def retrieve(self, request: Request) -> Response:
        if (fault := self._fault(request)) is not None:
            return fault
        uid = request.path_params["SOPInstanceUID"]
        (block,) = [one for one in self.objects if dcmread(io.BytesIO(one)).SOPInstanceUID == uid]
        return part(block)

    def _fault(self, request: Request) -> Response | None:
        path = request.url.path.removeprefix("/dicom-web/")
        self.asked.append(path)
        self.headers.append(dict(request.headers))
        waiting = self.faults.get(path)
        return waiting.pop(0) if waiting else None

    def _fits(self, uid: str, members: list[Dataset], query: dict[str, str]) -> bool:
        wanted = query.get("ModalitiesInStudy")
        named = query.get("StudyInstanceUID")
        return (
            (wanted is None or wanted in {one.Modality for one in members})
            and (named == uid if named is not None else uid not in self.hidden)
        )  # fmt: skip

    def _result(self, level: str, members: list[Dataset]) -> dict[str, Any]:
        one = members[0]
        told = {LEVELS[level]: one[level].value, "00100020": one.PatientID}
        if level == "StudyInstanceUID":
            told["00080020"] = one.StudyDate
            if self.counts:
                told["00201208"] = len(members)
        elif level == "SeriesInstanceUID":
            told["00080060"] = one.Modality
        found: dict[str, Any] = {tag: {"vr": "UI", "Value": [value]} for tag, value in told.items()}
        if level == "StudyInstanceUID":
            found["00080061"] = {"vr": "CS", "Value": sorted({member.Modality for member in members})}
        return found


def part(block: bytes, cut: int | None = None, boundary: str = "a-b:c") -> Response:
    """Return a WADO-RS answer, in pieces and without its length; or no more than so many bytes of it."""
    head = f"--{boundary}\r\nContent-Type: application/dicom\r\nMIME-Version: 1.0\r\n\r\n".encode()
    body = (head + block + f"\r\n--{boundary}--\r\n".encode())[:cut]
    pieces = (body[start : start + 100] for start in range(0, len(body), 100))
    return StreamingResponse(pieces, media_type=f'multipart/related; type="application/dicom"; boundary="{boundary}"')


@contextlib.contextmanager
def serving(archive: Archive, certificate: Path | None = None, key: Path | None = None) -> Iterator[str]:
    """Serve an archive in a thread; give its address."""
    study = "/dicom-web/studies/{StudyInstanceUID}"
    series = f"{study}/series/{{SeriesInstanceUID}}"
    searches = ("/dicom-web/studies", f"{study}/series", f"{series}/instances")
    routes = [Route(path, archive.search) for path in searches]
    routes.append(Route(f"{series}/instances/{{SOPInstanceUID}}", archive.retrieve))
    port = free_port()
    tls = {"ssl_certfile": certificate, "ssl_keyfile": str(key)} if certificate else {}
    config = uvicorn.Config(Starlette(routes=routes), port=port, ws="none", log_config=None, **tls)  # type: ignore[arg-type]
    with serving_in_a_thread(config):
        yield f"{'https' if certificate else 'http'}://localhost:{port}/dicom-web"
