"""A site's images on a DICOMweb server: fetched once, followed from round to round, never kept of who opted out."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from conftest import ROOT, tiny, to_toml
from data_objects import SMALL, site_over
from dicomweb_archive import Archive, object_of, part, serving
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from starlette.responses import Response

from wardround.client.app import app
from wardround.client.kit import check_folders
from wardround.config import SiteConfig, read_site
from wardround.config.federation import CriteriaConfig, DataConfig
from wardround.data import Index, open_site
from wardround.data import dicomweb_server as http
from wardround.errors import ConfigError, DataError
from wardround.plan import resolve
from wardround.processes import free_port
from wardround.provision import provision
from wardround.update import Refusal, Task, pack
from wardround.wire import message_to_answer, task_to_records

OBJECTS = [
    object_of("anna", "1.1.1"),
    object_of("anna", "1.1.2"),
    object_of("ben", "2.1.1"),
    object_of("ben", "2.2.1", Modality="MR"),
    object_of("cleo", "3.1.1"),
]


@pytest.fixture
def archive() -> Archive:
    return Archive(*OBJECTS)


@pytest.fixture
def url(archive: Archive) -> Iterator[str]:
    with serving(archive) as address:
        yield address


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http.time, "sleep", lambda _: None)


def site(work: Path, url: str, **images: Any) -> SiteConfig:
    """Return a site whose images are a server's, as its file says it."""
    work.mkdir(exist_ok=True)
    own = {"format": 1, "name": "lyon", "work": "work", "images": {"kind": "dicomweb", "url": url, **images}}
    (work / "site.toml").write_text(to_toml(own))
    return read_site(work / "site.toml")


def index(own: SiteConfig, **criteria: Any) -> Index:
    return open_site(own, DataConfig(image_size=16, criteria=CriteriaConfig(**criteria))).index


def kept(own: SiteConfig) -> set[str]:
    """Return the objects that lie on the site's disk."""
    return {path.stem for path in own.images.folder.rglob("*.dcm")}


def names(*uids: str) -> set[str]:
    return {f"1.2.{uid}" for uid in uids}


ALL = names("1.1.1", "1.1.2", "2.1.1", "2.2.1", "3.1.1")


def test_a_servers_objects_are_the_same_images_as_files_in_a_folder(url: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, block in enumerate(OBJECTS):
        (tmp_path / "images" / f"{number}.dcm").write_bytes(block)
    here = open_site(site_over(tmp_path / "images", tmp_path / "files"), SMALL)
    there = open_site(site(tmp_path, url), SMALL)
    np.testing.assert_array_equal(here.images, there.images)
    np.testing.assert_array_equal(here.patients, there.patients)
    assert there.index.modalities == {"CR": 4, "MR": 1} and there.num_patients == 3


def test_a_second_listing_searches_once_and_fetches_nothing(archive: Archive, url: str, tmp_path: Path) -> None:
    own = site(tmp_path, url)
    first = index(own)
    assert set(archive.taken()) == ALL
    assert index(own) == first
    assert archive.asked == ["studies", "studies"], "a page, and the end"


def test_what_is_new_between_rounds_is_fetched_and_nothing_else(archive: Archive, url: str, tmp_path: Path) -> None:
    own = site(tmp_path, url)
    index(own)
    archive.taken()
    archive.objects += [object_of("anna", "1.1.3"), object_of("dora", "4.1.1")]
    assert index(own).read == 7
    assert set(archive.taken()) == names("1.1.3", "4.1.1")


def test_a_server_that_counts_nothing_is_looked_into_and_still_fetched_once(
    archive: Archive, url: str, tmp_path: Path
) -> None:
    archive.counts = False
    own = site(tmp_path, url)
    index(own)
    archive.taken()
    archive.objects.append(object_of("anna", "1.1.3"))
    index(own)
    assert archive.taken() == ["1.2.1.1.3"]


def test_pages_are_as_small_as_the_server_makes_them(
    archive: Archive, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.most = 1
    own = site(tmp_path / "one", url)
    index(own)
    assert kept(own) == ALL and archive.asked.count("studies") == 4
    archive.most = 1000
    monkeypatch.setattr(http, "_PAGE", 2)
    own = site(tmp_path / "two", url)
    index(own)
    assert kept(own) == ALL


# Opting out.


def test_who_opts_out_loses_the_files_at_once_even_where_the_server_is_away(archive: Archive, tmp_path: Path) -> None:
    with serving(archive) as url:
        (tmp_path / "opt_out.txt").write_text("cleo\n")
        own = site(tmp_path, url, opt_out="opt_out.txt")
        assert index(own).patients == 2
        assert kept(own) == ALL - names("3.1.1")
        assert not any(path.startswith("studies/1.2.3/") for path in archive.asked), "not even looked into"
    (tmp_path / "opt_out.txt").write_text("cleo\n Anna\n")
    with pytest.raises(DataError, match="cannot be used after"):
        index(own)
    assert kept(own) == names("2.1.1", "2.2.1")
    assert "anna" not in "".join(path.read_text() for path in own.images.folder.rglob("study.json"))


def test_who_opts_out_is_not_fetched_again_and_who_comes_back_is(archive: Archive, url: str, tmp_path: Path) -> None:
    (tmp_path / "opt_out.txt").write_text("anna")
    own = site(tmp_path, url, opt_out="opt_out.txt")
    index(own)
    assert names("1.1.1", "1.1.2").isdisjoint(archive.taken())
    (tmp_path / "opt_out.txt").write_text("")
    index(own)
    assert set(archive.taken()) == names("1.1.1", "1.1.2")


def test_an_object_that_names_another_patient_than_the_search_is_not_kept_where_that_one_opted_out(
    archive: Archive, url: str, tmp_path: Path
) -> None:
    archive.objects.append(object_of("dora", "3.1.2"))  # the search says cleo
    (tmp_path / "opt_out.txt").write_text("dora")
    own = site(tmp_path, url, opt_out="opt_out.txt")
    assert index(own).patients == 2
    assert kept(own) == ALL - names("3.1.1"), "of the whole study nothing: whose it is, is in doubt"
    archive.taken()
    index(own)
    assert archive.taken() == []


# What the server has no more, and what is not asked for.


def test_what_the_server_has_no_more_is_removed(archive: Archive, url: str, tmp_path: Path) -> None:
    own = site(tmp_path, url)
    index(own)
    archive.objects = [OBJECTS[0], *OBJECTS[2:4]]  # of anna one object is gone, of cleo all
    assert index(own).patients == 2
    assert kept(own) == names("1.1.1", "2.1.1", "2.2.1")


def test_a_study_that_a_page_misses_is_asked_for_by_name_before_it_is_removed(
    archive: Archive, url: str, tmp_path: Path
) -> None:
    own = site(tmp_path, url)
    index(own)
    archive.hidden = {"1.2.3"}
    index(own)
    assert kept(own) == ALL


def test_a_server_that_lists_nothing_removes_nothing(archive: Archive, url: str, tmp_path: Path) -> None:
    own = site(tmp_path, url)
    index(own)
    archive.objects = []
    with pytest.raises(DataError, match=r"lists no study; check \[images\] url and filters"):
        index(own)
    assert kept(own) == ALL


def test_what_the_federation_does_not_take_is_not_fetched(archive: Archive, url: str, tmp_path: Path) -> None:
    archive.objects.append(object_of("dora", "4.1.1", StudyDate="20190101"))
    own = site(tmp_path, url)
    found = index(own, modality=("CR",), date_from="2024-01-01")
    assert kept(own) == ALL - names("2.2.1") and not found.excluded
    archive.taken()
    index(own, modality=("MR",))
    assert archive.taken() == ["1.2.2.2.1"], "of another federation"
    index(own, modality=("CR",), date_from="2024-01-01")
    assert kept(own) == ALL and archive.taken() == [], "two federations take nothing from each other"


def test_the_sites_own_filters_say_what_is_looked_for(archive: Archive, url: str, tmp_path: Path) -> None:
    own = site(tmp_path, url, filters={"ModalitiesInStudy": "MR"})
    index(own)
    assert kept(own) == names("2.1.1", "2.2.1")


# Faults.


INSTANCE = "studies/1.2.1/series/1.2.1.1/instances/1.2.1.1.1"


@pytest.mark.parametrize("fault", [Response(status_code=503), part(OBJECTS[0], cut=500), part(OBJECTS[0], cut=60)])
def test_what_may_pass_is_tried_again(fault: Response, archive: Archive, url: str, tmp_path: Path) -> None:
    archive.faults = {INSTANCE: [fault], "studies": [Response(status_code=429)]}
    assert index(site(tmp_path, url)).read == 5
    assert archive.asked.count(INSTANCE) == 2


def test_pauses_grow_and_tries_end(archive: Archive, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(http.time, "sleep", pauses.append)
    archive.faults = {"studies": [Response(status_code=502)] * 9}
    host = url.split("/")[2]
    with pytest.raises(DataError) as caught:
        index(site(tmp_path, url))
    assert str(caught.value) == (
        f"site 'lyon': the DICOMweb server at {host} cannot be used after 6 tries: it answers 502; see to it; rounds "
        "go on once it is back."
    )
    assert [base / 2 <= pause <= base for pause, base in zip(pauses, (1, 2, 4, 8, 16), strict=True)] == [True] * 5


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Response(status_code=404), "the server answers 404"),
        (Response(b"<html>", media_type="text/html"), "the server answers with text/html, and no DICOM object"),
        (part(OBJECTS[2]), "the server gives another object than it was asked for"),
        (part(bytes(5000)), "the server gives another object than it was asked for"),
        (part(object_of("anna", "1.1.1", PixelData=bytes(70_000))), "too large: more than 0 MiB"),
    ],
)
def test_an_object_that_cannot_be_had_is_one_file_with_a_reason(
    answer: Response,
    reason: str,
    archive: Archive,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "LARGEST_OBJECT", 60_000)
    archive.faults = {INSTANCE: [answer]}
    own = site(tmp_path, url)
    found = index(own)
    ((name, why),) = found.quarantined
    assert (name, found.read, found.files) == ("1.2.1/1.2.1.1/1.2.1.1.1.dcm", 4, 5)
    assert why.startswith(reason)
    assert not list(own.images.folder.rglob("*.partial"))
    archive.taken()
    assert index(own).quarantined == found.quarantined and archive.taken() == [], "until its study changes"


def test_a_bare_object_is_taken_as_some_servers_give_it(archive: Archive, url: str, tmp_path: Path) -> None:
    archive.faults = {INSTANCE: [Response(OBJECTS[0], media_type="application/dicom")]}
    assert index(site(tmp_path, url)).read == 5


@pytest.mark.parametrize("uid", ["../../../../escaped", "1.2/3", "", "1" * 65, "1..2", "/etc/passwd"])
@pytest.mark.parametrize("level", ["0020000D", "0020000E", "00080018"])
def test_a_name_from_the_server_never_leaves_its_folder(
    uid: str, level: str, archive: Archive, url: str, tmp_path: Path
) -> None:
    path = {"0020000D": "studies", "0020000E": "studies/1.2.1/series", "00080018": INSTANCE.rpartition("/")[0]}[level]
    hostile = [{level: {"vr": "UI", "Value": [uid]}}, {"0020000D": {"vr": "UI", "Value": ["1.2.1"]}}]
    archive.faults = {
        path: [Response(json.dumps(hostile[: 1 + (path == "studies")]), media_type="application/dicom+json")]
    }
    own = site(tmp_path, url)
    quarantined = dict(index(own).quarantined)
    assert "the server names it by no valid UID" in quarantined.values()
    assert not list(tmp_path.rglob("*escaped*"))
    assert kept(own) <= ALL


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Response(status_code=401), r"answers 401; mend \[images\] credentials, or what that account may see"),
        (Response(status_code=400), r"answers 400 to a search; check \[images\] url and filters"),
        (Response(status_code=302, headers={"location": "http://127.0.0.1:9/"}), r"answers 302, to another address"),
        (Response(b"<html>"), r"answers a search with no DICOM JSON; check \[images\] url"),
        (Response(b'{"a": 1}'), r"answers a search with no DICOM JSON; check \[images\] url"),
    ],
)
def test_what_time_does_not_cure_is_said_at_once_in_one_line(
    answer: Response, said: str, archive: Archive, url: str, tmp_path: Path
) -> None:
    archive.faults = {"studies": [answer]}
    with pytest.raises(DataError, match=rf"^site 'lyon': the DICOMweb server at localhost:\d+ {said}") as caught:
        index(site(tmp_path, url))
    assert archive.asked == ["studies"] and "\n" not in str(caught.value)


def test_a_server_that_is_away_is_named(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(
        DataError, match=rf"at localhost:{port} cannot be used after 6 tries: it cannot be connected to"
    ):
        index(site(tmp_path, f"http://localhost:{port}/secret-path"))


def round_one(own: SiteConfig) -> Message:
    """Return a site's answer to the first round of a tiny federation, as it crosses."""
    plan = resolve(tiny())
    toml = own.work.parent / "site.toml"
    toml.write_text(f'approved = ["{plan.digest}"]\nthreads = 1\n{toml.read_text()}')
    task = Task(1, json.dumps(plan.protocol.model_dump(mode="json")), 0, pack(plan.state, {}))
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # without it, Message() raises
    asked = Message(task_to_records(task, "lyon", None), dst_node_id=1, message_type="train", group_id="1")
    asked.metadata.__dict__["_message_id"] = "asked"
    return app(asked, Context(1, 1, {"site-config": str(toml)}, RecordDict(), {}))


def test_a_round_is_trained_on_a_servers_images(archive: Archive, url: str, tmp_path: Path) -> None:
    archive.objects += [object_of("dora", f"4.1.{number}") for number in range(1, 9)]
    answer = message_to_answer(round_one(site(tmp_path, url)), "lyon", "1", None)
    assert isinstance(answer, bytes)


def test_of_a_server_that_fails_nothing_crosses_but_a_word(archive: Archive, url: str, tmp_path: Path) -> None:
    archive.faults = {INSTANCE: [Response(status_code=403, content=b"anna may not be seen")]}
    reply = round_one(site(tmp_path, url))
    answer = message_to_answer(reply, "lyon", "1", None)
    assert answer == Refusal("images", "the reason stands in the site's own log")
    for word in (url.split("/")[2], "dicom-web", "1.2.1", "anna"):
        assert word not in str(reply.content)


# Credentials and TLS.


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a server's certificate and key, and its CA's."""
    folder = tmp_path_factory.mktemp("tls")
    provision(tiny(), folder, ["lyon"])
    return folder / "coordinator"


@pytest.mark.parametrize(
    ("secret", "header"), [("lyon:s3cret", "Basic bHlvbjpzM2NyZXQ="), ("Bearer s3cret", "Bearer s3cret")]
)
def test_credentials_from_a_file_cross_by_tls_of_the_hospitals_own_ca(
    secret: str, header: str, archive: Archive, tls: Path, tmp_path: Path
) -> None:
    (tmp_path / "pacs.txt").write_text(secret + "\n")
    (tmp_path / "pacs.txt").chmod(0o600)
    with serving(archive, tls / "server.crt", tls / "server.key") as url:
        own = site(tmp_path, url, credentials="pacs.txt", ca_certificate=str(tls / "ca.crt"))
        assert index(own).read == 5
    assert {one.get("authorization") for one in archive.headers} == {header}
    assert {one["accept-encoding"] for one in archive.headers} == {"identity"}


def test_a_certificate_of_another_ca_is_refused_at_once(archive: Archive, tls: Path, tmp_path: Path) -> None:
    with serving(archive, tls / "server.crt", tls / "server.key") as url:
        with pytest.raises(DataError, match=r"shows a certificate that does not hold; set \[images\] ca_certificate"):
            index(site(tmp_path, url))
        with pytest.raises(DataError, match=r"there is no file .*absent\.crt"):
            index(site(tmp_path, url, ca_certificate="absent.crt"))
    assert archive.asked == []


def test_neither_the_environments_proxy_nor_netrc_is_asked(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert index(site(tmp_path, url)).read == 5


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ({"kind": "dicomweb"}, "kind = 'dicomweb' needs the key 'url'"),
        ({"kind": "dicomweb", "url": "http://pacs", "credentials": "x"}, "would cross in clear"),
        ({"kind": "dicomweb", "url": "https://pacs", "folder": "x"}, "lies below work; remove it"),
        ({"kind": "dicomweb", "url": "https://user:s3cret@pacs"}, r"\[images\.url\] is no https://host/path"),
        ({"folder": "x", "url": "https://pacs"}, "url is a key of kind = 'dicomweb'"),
        ({"kind": "dicomweb", "url": "https://pacs", "filters": {"0020000D": "1"}}, "filters"),
        ({}, "the key 'folder' is missing; add it"),
    ],
)
def test_what_does_not_go_together_is_one_line(images: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(to_toml({"format": 1, "name": "lyon", "work": "work", "images": images}))
    with pytest.raises(ConfigError, match=said) as caught:
        read_site(path)
    assert "s3cret" not in str(caught.value)


def test_a_site_of_a_server_needs_no_folder_to_start(tmp_path: Path) -> None:
    own = site(tmp_path, "http://localhost:9")
    check_folders(own, tmp_path / "site.toml")
    assert own.images.folder == tmp_path / "work" / "dicomweb"


def test_what_is_fetched_is_the_sites_accounts_alone(url: str, tmp_path: Path) -> None:
    own = site(tmp_path, url)
    index(own)
    for path in own.images.folder.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_fetch_that_was_killed_goes_on_and_leaves_no_part_behind(archive: Archive, url: str, tmp_path: Path) -> None:
    own = site(tmp_path, url)
    code = """
import os, signal, sys
from pathlib import Path
from wardround.config import read_site
from wardround.config.federation import DataConfig
from wardround.data import dicomweb_server, open_site
real, count = dicomweb_server.Server._object, 0
def deadly(self, path, file):
    global count
    count += 1
    real(self, path, file)
    if count == 3:
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
dicomweb_server.Server._object = deadly
open_site(read_site(Path(sys.argv[1])), DataConfig(image_size=16))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "site.toml")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(kept(own)) == 2 and len(list(own.images.folder.rglob("*.partial"))) == 1
    archive.taken()
    assert index(own).read == 5
    assert len(archive.taken()) == 3 and not list(own.images.folder.rglob("*.partial"))


# A server of others: Orthanc, by Debian's packages orthanc and orthanc-dicomweb.

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[str]:
    """Give the address of an Orthanc with an empty archive."""
    program = shutil.which("Orthanc")
    if program is None or not PLUGIN.is_file():
        pytest.skip("Orthanc is not installed (apt-get install orthanc orthanc-dicomweb)")
    port, home = free_port(), tmp_path / "orthanc"
    home.mkdir()
    settings = {
        "StorageDirectory": str(home), "IndexDirectory": str(home), "HttpPort": port, "DicomServerEnabled": False,
        "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }  # fmt: skip
    (home / "orthanc.json").write_text(json.dumps(settings))
    with (home / "log").open("wb") as log:
        process = subprocess.Popen([program, str(home / "orthanc.json")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while "Orthanc has started" not in (home / "log").read_text():
            assert time.monotonic() < deadline and process.poll() is None, (home / "log").read_text()
            threading.Event().wait(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def stored(address: str, block: bytes) -> str:
    """Put an object into Orthanc; return Orthanc's own name of it."""
    return str(requests.post(f"{address}/instances", data=block, timeout=30).json()["ID"])


def test_orthanc_is_followed_as_any_server(orthanc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_PAGE", 2)
    gone, *_ = [stored(orthanc, block) for block in OBJECTS]
    (tmp_path / "opt_out.txt").write_text("cleo\n")
    own = site(tmp_path, f"{orthanc}/dicom-web", opt_out="opt_out.txt", filters={"StudyDate": "20240101-20241231"})
    found = index(own, modality=("CR",))
    assert (found.read, found.patients, found.quarantined) == (3, 2, ())
    assert kept(own) == names("1.1.1", "1.1.2", "2.1.1")
    stored(orthanc, object_of("dora", "4.1.1"))
    requests.delete(f"{orthanc}/instances/{gone}", timeout=30)
    assert index(own, modality=("CR",)).read == 3
    assert kept(own) == names("1.1.2", "2.1.1", "4.1.1")
    (tmp_path / "opt_out.txt").write_text("cleo\nben\n")
    assert index(own, modality=("CR",)).patients == 2
    assert kept(own) == names("1.1.2", "4.1.1")
