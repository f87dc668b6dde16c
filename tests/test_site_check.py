"""`wardround site check`: what a person reads before a site joins, and the exit code that says how grave it is."""

import contextlib
import json
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINY, merged, tiny, to_toml, write_labelled
from cryptography.x509 import load_pem_x509_certificate
from data_objects import some_pixels, write_dicom
from PIL import Image, ImageDraw, ImageFont
from typer.testing import CliRunner
from warm import program

from wardround.cli import cli
from wardround.client import check as checks
from wardround.client.audit import AuditLog, Crossing
from wardround.client.charge import charge, sealed
from wardround.client.check import Finding, check, worst
from wardround.client.reach import daily, ending, ends, reach
from wardround.config import FederationConfig, read_site
from wardround.config.site import CoordinatorConfig
from wardround.data.burnt import looks_burnt
from wardround.data.facts import Frame, ReadError
from wardround.data.phantom import FINDINGS, draw_anatomy, draw_image, resized
from wardround.data.readers import quiet, read_frames
from wardround.plan import resolve
from wardround.processes import free_port
from wardround.provision import certificates, provision, renew
from wardround.update import Task

PRIVACY = {"unit": "patient", "epsilon": 4.0, "delta": 1e-5, "clip": 0.5}
PRIVATE: dict[str, Any] = {"privacy": PRIVACY, "membership": {"units": {"lyon": 4}}, "training": {"rounds": 4}}


@contextlib.contextmanager
def answering(kits: Path, ahead: timedelta = timedelta(), date: str | None = None) -> Iterator[None]:
    """Answer at the coordinator's address, with its certificate, and a clock that far behind the site's, or a date."""

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return date or format_datetime(datetime.now(UTC) - ahead, usegmt=True)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trust.load_cert_chain(kits / "coordinator" / "server.crt", kits / "coordinator" / "server.key")
    port = int(known(kits).address.rpartition(":")[2])
    with ThreadingHTTPServer(("127.0.0.1", port), Nothing) as server:
        server.socket = trust.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    """Return a site's kit, filled in: twelve images of six patients, the federation approved."""
    folder = tmp_path / "kits"
    provision(tiny(), folder, ["lyon", "oslo"], f"localhost:{free_port()}")
    for number in range(12):
        pixels = some_pixels(number, (40, 40)) // 2
        write_dicom(folder / f"lyon/images/{number}.dcm", pixels, PatientID=f"p{number // 2}")
    path = folder / "lyon" / "site.toml"
    text = (
        path.read_text().replace('# folder = "/data/images"', 'folder = "images"').replace("threads = 0", "threads = 1")
    )
    path.write_text(text.replace("approved = []", f'approved = ["{resolve(tiny()).digest}"]'))
    return folder


def known(kits: Path) -> CoordinatorConfig:
    found = read_site(kits / "lyon" / "site.toml").coordinator
    assert found is not None
    return found


def checked(kits: Path, config: FederationConfig | None = None) -> dict[str, Finding]:
    """Return the findings by what they are of."""
    path = kits / "lyon" / "site.toml"
    return {one.what: one for one in check(read_site(path), path, config or tiny())[0]}


def change(kits: Path, old: str, new: str) -> None:
    path = kits / "lyon" / "site.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def arguments(kits: Path, *more: str) -> list[str]:
    (kits / "tiny.toml").write_text(to_toml(TINY))
    return ["site", "check", str(kits / "lyon/site.toml"), str(kits / "tiny.toml"), *more]


def test_where_all_is_well_every_line_says_so(kits: Path) -> None:
    with answering(kits):
        found = checked(kits)
    assert {one.severity for one in found.values()} == {"well"}, found
    assert found["kit"].remedy.startswith("the coordinator's key is SHA256:")
    assert found["images"].found == "12 images of 6 patients; modality CR 12"
    assert found["files"].found == "12 files: 12 read, 0 copies of others, 0 no images, 0 opted out, 0 excluded"
    assert found["connection"].found == f"{known(kits).address} answers, and its certificate holds"
    assert found["time"].found.startswith("about ") and " s a round on cpu" in found["time"].found
    assert set(found) >= {"clock", "certificates", "text in the pixels", "disk", "approval", "ledger", "audit log"}
    sheet = Path(found["contact sheet"].remedy.removeprefix("look at "))
    assert sheet.stat().st_mode & 0o777 == 0o600
    with Image.open(sheet) as picture:
        assert picture.size[0] > 500


def test_the_command_ends_with_0_3_and_2_by_the_gravest_finding(kits: Path) -> None:
    with answering(kits):
        well = CliRunner().invoke(cli, arguments(kits, "--json"))
        assert (well.exit_code, json.loads(well.stdout)["severity"]) == (0, "well")
        shown = CliRunner().invoke(cli, arguments(kits))
        assert shown.stdout.endswith(f"Next:\n  wardround site run {kits / 'lyon/site.toml'}\n")
        (kits / "lyon/images/cut.dcm").write_bytes((kits / "lyon/images/0.dcm").read_bytes()[:-50])
        warned = CliRunner().invoke(cli, arguments(kits), env={"COLUMNS": "200"})
        assert warned.exit_code == 3 and "│ warning │" in warned.stdout
        assert "unreadable: mend or remove them" in warned.stdout and "lyon: cut.dcm: cut off: " in warned.stdout
    (kits / "lyon/README.md").write_text("run this")
    command = [str(program() / "wardround"), *arguments(kits, "--json")]
    spoilt = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert spoilt.returncode == 2 and json.loads(spoilt.stdout)["severity"] == "problem"
    assert spoilt.stderr == "error: 1 problem at this site: kit; see above.\n"


def test_what_ails_the_images_is_counted_and_does_not_hide_the_rest(kits: Path) -> None:
    images = kits / "lyon" / "images"
    (images / "cut.dcm").write_bytes((images / "0.dcm").read_bytes()[:-50])
    (images / "copy.dcm").write_bytes((images / "1.dcm").read_bytes())
    write_dicom(images / "nobody.dcm", some_pixels(90), PatientID="")
    (images / "notes.txt").write_text("a hospital's folder has such, too")
    found = checked(kits)
    assert (found["unreadable"].found, found["unreadable"].severity) == ("1 of the files", "warning")
    assert "1 copies of others, 1 no images" in found["files"].found and found["nobody's"].severity == "warning"
    for path in images.iterdir():
        path.unlink()
    found = checked(kits)
    assert found["images"].severity == "problem" and "is empty" in found["images"].found
    assert found["approval"].severity == "well" and "text in the pixels" not in found


def test_an_opt_out_list_that_names_nobody_here_is_a_warning(kits: Path) -> None:
    change(kits, 'folder = "images"', 'folder = "images"\nopt_out = "out.txt"')
    listed = kits / "lyon" / "out.txt"
    listed.write_text("p1;Doe;2026-01-01\np2;Roe;2026-01-02\n")  # as a spreadsheet writes it
    found = checked(kits)["opt-outs"]
    assert (found.found, found.severity) == ("2 lines, and no file here is of any of them", "warning")
    assert "one PatientID a line" in found.remedy
    listed.write_text("p1\nanother hospital's\n")
    found = checked(kits)["opt-outs"]
    assert (found.found, found.severity) == ("2 lines, and 2 files are left out for them", "well")
    listed.write_text("# nobody\n")
    assert checked(kits)["opt-outs"].severity == "well"


def test_a_kit_that_was_changed_and_a_folder_that_is_gone_are_problems_with_their_remedy(kits: Path) -> None:
    (kits / "lyon/ca.crt").write_bytes((kits / "lyon/ca.crt").read_bytes() + b"\n")
    change(kits, 'folder = "images"', 'folder = "nowhere"')
    found = checked(kits)
    assert "ca.crt: is not as it came with the kit" in found["kit"].found and found["kit"].severity == "problem"
    assert "is no folder; mount it" in found["folders"].found and found["folders"].severity == "problem"


# The connection: address, TLS, clock, dates.


def test_a_coordinator_that_is_away_is_a_warning_for_it_may_not_have_begun(kits: Path) -> None:
    found = checked(kits)["connection"]
    assert found.severity == "warning" and found.found.startswith(f"{known(kits).address} does not answer: ")


def test_another_coordinators_certificate_is_a_problem_and_named(kits: Path, tmp_path: Path) -> None:
    provision(tiny(name="other"), tmp_path / "other", ["lyon"], known(kits).address)
    (kits / "coordinator").rename(kits / "right")
    (tmp_path / "other" / "coordinator").rename(kits / "coordinator")
    with answering(kits):
        found = checked(kits)["connection"]
    assert found.severity == "problem" and "is not signed by ca.crt" in found.found


@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_is_off_by_a_day_is_a_warning(days: int, kits: Path) -> None:
    with answering(kits, timedelta(days=days)):
        found = checked(kits)["clock"]
    way = "ahead of" if days > 0 else "behind"
    assert found.severity == "warning" and found.remedy.startswith("set this machine's clock")
    seconds = int(found.found.split(" ")[0].replace(",", ""))
    assert abs(seconds - 86_400) < 10 and f" s {way} the coordinator's" in found.found


def test_a_coordinator_that_says_no_date_ends_neither_the_check_nor_the_site(kits: Path) -> None:
    with answering(kits, date="soon"):
        found = checked(kits)
        assert found["connection"].severity == "well" and "clock" not in found
        assert next(daily(known(kits))) == []


def test_a_certificate_that_ends_within_30_days_is_a_warning_here_and_daily_while_a_site_runs(
    kits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(kits):
        seen = reach(known(kits))
        assert ending(ends(known(kits), seen.certificate)) == []
        assert next(daily(known(kits))) == []
    monkeypatch.setattr(certificates, "_DAYS_SERVER", 21)
    renew(kits)
    end = load_pem_x509_certificate((kits / "coordinator/server.crt").read_bytes()).not_valid_after_utc
    said = f"the coordinator's certificate ends on {end:%Y-%m-%d}; ask the coordinator to renew it"
    with answering(kits):
        assert checked(kits)["certificates"] == Finding("certificates", said, "warning")
        told = daily(known(kits))
        assert [next(told), next(told), next(told)] == [[said], [], []]
        now = datetime.now(UTC).timestamp()
        monkeypatch.setattr("wardround.client.reach.time.monotonic", lambda: now + 2 * 86_400)
        assert next(told) == [said]


# What a federation asks for: approval, time, disk, ledger, log.


def test_a_federation_that_nobody_approved_is_a_warning_that_says_how(kits: Path) -> None:
    found = checked(kits, tiny(seed=9))["approval"]
    assert (found.severity, found.remedy) == ("warning", "wardround site approve SITE_TOML FEDERATION_TOML")
    words = arguments(kits)
    site, federation = words[2:]
    Path(federation).write_text(to_toml(merged(TINY, {"seed": 9})))
    shown = CliRunner().invoke(cli, words)
    assert shown.stdout.endswith(f"Next:\n  wardround site approve {site} {federation}\n")
    approved = CliRunner().invoke(cli, ["site", "approve", site, federation, "--yes"])
    assert approved.stdout.endswith(f"Next:\n  wardround site run {site}\n")


def test_a_device_that_is_not_here_is_a_problem_and_does_not_hide_the_rest(
    kits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    change(kits, 'device = "auto"', 'device = "cuda"')
    found = checked(kits)
    assert found["time"].severity == "problem" and found["disk"].severity == "well"
    assert found["time"].found == "device 'cuda': no GPU is seen here; take cpu, or mend the driver."


def test_a_disk_without_room_for_a_round_is_a_problem(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "WRITTEN", 10**10)
    found = checked(kits)["disk"]
    assert found.severity == "problem" and found.remedy == "make room, or set 'work' to another disk"


def test_the_ledger_is_read_against_the_ceiling_and_the_federations_rounds(kits: Path) -> None:
    config = tiny(**PRIVATE)
    found = checked(kits, config)["ledger"]
    assert found.severity == "problem" and "no [privacy] with units" in found.found
    path = kits / "lyon" / "site.toml"
    path.write_text(path.read_text() + "\n[privacy]\nepsilon = 8.0\ndelta = 1e-5\nunits = 4\n")
    assert checked(kits, config)["ledger"].severity == "well"
    change(kits, "epsilon = 8.0", "epsilon = 2.5")
    found = checked(kits, config)["ledger"]
    assert found.severity == "warning" and " rounds of this federation fit below epsilon = 2.5, of its 4" in found.found


def test_a_ledger_that_lacks_what_left_is_a_problem(kits: Path) -> None:
    config, path = tiny(**PRIVATE), kits / "lyon" / "site.toml"
    path.write_text(path.read_text() + "\n[privacy]\nepsilon = 8.0\ndelta = 1e-5\nunits = 4\n")
    with pytest.raises(Exception, match="older than what left"):
        seen = sealed(read_site(path), f"3:{'a' * 64}")
        charge(read_site(path), resolve(config).protocol, Task(1, "", 0, b"", seen))
    found = checked(kits, config)["ledger"]
    assert (found.severity, found.remedy) == ("problem", "wardround site ledger recover SITE_TOML")


def test_a_broken_audit_log_is_a_problem(kits: Path) -> None:
    log = AuditLog(kits / "lyon" / "work")
    log.add(Crossing("in", "", "task", 1, "d", 3, "f" * 64))
    assert checked(kits)["audit log"].found == "1 messages, and the chain is whole"
    log.path.write_bytes(b"no database, " * 400)
    assert checked(kits)["audit log"].severity == "problem"


def test_the_gravest_finding_counts() -> None:
    assert worst([]) == worst([Finding("a", "")]) == "well"
    assert worst([Finding("a", "", "warning"), Finding("b", "")]) == "warning"


# Text in the pixels: a suspicion, by the header or by the looks.


def lettered(frame: Frame, size: int, where: tuple[int, int], text: str = "DOE^JANE 1963-04-12") -> Frame:
    """Return an image with white text on it."""
    picture = Image.fromarray((frame[:, :, 0] * 255).astype(np.uint8))
    ImageDraw.Draw(picture).text(where, text, fill=255, font=ImageFont.load_default(size))
    return (np.asarray(picture, np.float32) / np.float32(255))[:, :, None]


def phantom(seed: int) -> Frame:
    draw = np.random.default_rng(seed)
    image = draw_image(draw_anatomy(FINDINGS[seed % 4], draw), draw)
    return np.clip(resized(image, 512, 480), 0, 1)[:, :, None].astype(np.float32)


@pytest.mark.parametrize(("size", "where"), [(10, (4, 4)), (14, (300, 6)), (24, (5, 480))])
def test_white_text_near_an_edge_is_suspected_and_nothing_else_of_a_phantom(size: int, where: tuple[int, int]) -> None:
    frames = [phantom(seed) for seed in range(30)]
    assert not any(map(looks_burnt, frames))  # some have a cable, some a marker
    assert sum(looks_burnt(lettered(frame, size, where)) for frame in frames) >= 28


def test_a_marker_and_an_empty_image_are_no_text() -> None:
    assert not looks_burnt(lettered(phantom(1), 24, (10, 10), "R"))
    assert not looks_burnt(np.zeros((64, 64, 1), np.float32)) and not looks_burnt(np.ones((64, 64, 1), np.float32))


def test_of_real_files_those_with_text_are_suspected_and_no_others(shared_data: Callable[[str], Path]) -> None:
    suspects, read = set(), 0
    folder = shared_data("dicom")
    with quiet():
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with contextlib.suppress(ReadError):
                suspects |= {path.name} if looks_burnt(next(read_frames(path, [0], None))) else set()
                read += 1
    # Three ultrasound images with the hospital's name on them, and two test patterns with figures.
    texts = {"examples_jpeg2k.dcm", "examples_rgb_color.dcm", "examples_palette.dcm", "mlut_18.dcm", "vlut_04.dcm"}
    assert suspects == texts and read > 100


@pytest.mark.parametrize("name", ["cxr_pneumonia", "malaria_cells", "dsb2018_nuclei_seg", "mednist_mini", "bccd_cells"])
def test_fewer_than_one_in_a_hundred_real_images_is_suspected(name: str, shared_data: Callable[[str], Path]) -> None:
    paths = sorted(path for path in (shared_data(name) / "images").rglob("*") if path.is_file())
    chosen = paths[:: max(1, len(paths) // 150)]
    assert sum(looks_burnt(next(read_frames(path, [0], None))) for path in chosen) <= len(chosen) // 100


def test_text_is_a_warning_by_header_or_looks_and_the_first_file_is_named(kits: Path) -> None:
    images = kits / "lyon" / "images"
    write_dicom(images / "said.dcm", some_pixels(50, (40, 40)) // 2, BurnedInAnnotation="YES")
    found = checked(kits)["text in the pixels"]
    assert found.severity == "warning" and "by header in 1 files, by its looks in 0 of 13" in found.found
    assert found.remedy.endswith("First: said.dcm")
    (images / "said.dcm").unlink()
    shown = (lettered(phantom(3), 14, (8, 8))[:, :, 0] * 255).astype(np.uint8)
    write_dicom(images / "shown.dcm", shown)
    found = checked(kits)["text in the pixels"]
    assert found.found == "by header in 0 files, by its looks in 1 of 13" and "a suspicion" in found.remedy


def test_a_file_whose_header_says_so_is_drawn_with_the_suspects(kits: Path) -> None:
    def height() -> int:
        checked(kits)
        with Image.open(kits / "lyon/work/check/contact-sheet.png") as sheet:
            return sheet.height

    before = height()
    write_dicom(kits / "lyon/images/said.dcm", some_pixels(50, (40, 40)) // 2, BurnedInAnnotation="YES")
    assert height() > before, "a row below the others"


def test_what_the_sites_own_minimum_would_refuse_each_round_is_a_problem(kits: Path) -> None:
    change(kits, "[coordinator]", "[minimum]\nimages = 13\n\n[coordinator]")
    found = checked(kits)["minimum"]
    assert found.severity == "problem" and "fewer than 13 images" in found.found
    assert "minimum" not in checked(kits, tiny(**PRIVATE)), "with noise at the site it does not hold"


def test_labelled_images_that_are_not_there_are_a_problem_found_beside_site_toml(kits: Path) -> None:
    change(kits, "[coordinator]", '[evaluation]\nfolder = "lent"\n\n[coordinator]')
    found = checked(kits)["scores"]
    assert found.severity == "problem" and "LABELLED stands in .env" in found.remedy
    write_labelled(kits / "lyon" / "lent", {"lyon": 20})
    found = checked(kits)["scores"]
    assert (found.severity, found.found) == ("well", "20 labelled images to measure them on")


def test_labels_that_no_score_could_be_measured_on_are_a_problem(kits: Path) -> None:
    write_labelled(kits / "lyon" / "lent", {"lyon": 20})
    change(kits, "[coordinator]", '[evaluation]\nfolder = "lent"\nlabel = "finding"\n\n[coordinator]')
    found = checked(kits)["scores"]
    assert found.severity == "problem" and "lacks the column 'finding'" in found.found
    change(kits, 'label = "finding"', 'site = "nice"')
    assert "no row says site 'nice'" in checked(kits)["scores"].found


def test_initial_weights_that_are_elsewhere_are_a_warning(kits: Path) -> None:
    found = checked(kits, tiny(initial_weights="chest@candidate"))
    assert found["federation"].severity == "warning" and "approve by digest" in found["federation"].remedy
    assert found["images"].severity == "well" and "audit log" in found


def test_a_federation_that_cannot_be_resolved_is_a_problem(kits: Path) -> None:
    config = tiny(**merged(PRIVATE, {"membership": {"units": {"lyon": 2}}}))  # fewer patients than a batch
    found = checked(kits, config)
    assert found["federation"].severity == "problem" and found["images"].severity == "well"
