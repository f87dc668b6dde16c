"""The cache: each file is decoded once, a crash costs nothing, and who opts out is gone from it."""

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from conftest import write_labelled
from data_objects import SMALL, site_over, some_pixels, write_dicom

from wardround.config import SiteConfig
from wardround.config.federation import CriteriaConfig, DataConfig
from wardround.data import SiteImages, index, open_site
from wardround.data.patients import read_salt
from wardround.data.readers import reasons
from wardround.errors import DataError

PATIENTS = ("anna", "ben", "cleo")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of six images of three patients and a file that is none."""
    for number in range(6):
        write_dicom(tmp_path / f"images/{number}.dcm", some_pixels(number), PatientID=PATIENTS[number % 3])
    (tmp_path / "images/notes.txt").write_text("no image")
    return tmp_path / "images"


@pytest.fixture
def site(folder: Path, tmp_path: Path) -> SiteConfig:
    """Return the site over that folder."""
    return site_over(folder, tmp_path / "work")


def cache_folder(site: SiteConfig) -> Path:
    """Return the one folder of a site's cache."""
    (found,) = [path for path in (site.work / "cache").iterdir() if path.is_dir()]
    return found


def overwrite(path: Path) -> None:
    """Fill a file with zeros in a way that leaves its size and time as they were."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def assert_same(one: SiteImages, other: SiteImages) -> None:
    """Assert that training sees the same."""
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.patients, other.patients)
    assert one.index == other.index


def test_a_second_call_reads_no_file_again(site: SiteConfig, folder: Path) -> None:
    first = open_site(site, SMALL)
    for path in folder.iterdir():
        overwrite(path)  # whoever reads a file now sees that it is none
    assert_same(open_site(site, SMALL), first)


def test_only_new_and_changed_files_are_decoded(site: SiteConfig, folder: Path, tmp_path: Path) -> None:
    open_site(site, SMALL)
    kept = [path for path in folder.iterdir() if path.name not in ("0.dcm", "1.dcm")]
    (folder / "0.dcm").unlink()
    write_dicom(folder / "1.dcm", some_pixels(77), PatientID="ben")
    write_dicom(folder / "new.dcm", some_pixels(99), PatientID="dora")
    shutil.copytree(folder, tmp_path / "aside")
    for path in kept:
        overwrite(path)
    grown = open_site(site, SMALL)
    assert (grown.index.samples, grown.index.patients) == (6, 4)
    afresh = open_site(site_over(tmp_path / "aside", tmp_path / "fresh"), SMALL)
    np.testing.assert_array_equal(grown.images, afresh.images)
    np.testing.assert_array_equal(grown.patients, afresh.patients)


def test_a_moved_or_touched_file_is_known_by_its_content(site: SiteConfig, folder: Path) -> None:
    first = open_site(site, SMALL)
    (folder / "0.dcm").rename(folder / "moved.dcm")
    os.utime(folder / "1.dcm")
    rows = cache_folder(site) / "rows-1.npy"
    assert rows.exists()
    assert_same(open_site(site, SMALL), first)
    assert rows.exists()  # nothing was decoded, so nothing was rewritten


def test_files_whose_names_differ_by_case_or_a_blank_are_two(tmp_path: Path) -> None:
    names = {"IM1.dcm": "anna", "im1.dcm": "ben", "im1.dcm ": "cleo"}
    for seed, (name, patient) in enumerate(names.items()):
        os.utime(write_dicom(tmp_path / "images" / name, some_pixels(seed), PatientID=f"{patient:4}"), (1e9, 1e9))
    index = open_site(site_over(tmp_path / "images", tmp_path / "work"), SMALL).index
    assert (index.read, index.duplicates, index.patients) == (3, 0, 3)


@pytest.mark.parametrize("reader", ["read_facts", "read_frames"])
def test_what_may_pass_is_tried_again_at_the_next_index(
    reader: str, site: SiteConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, real = open_site(site_over(folder, folder.parent / "aside"), SMALL), getattr(index, reader)

    def failing(path: Path, *given: Any) -> Any:
        with reasons("bytes"):
            if path.name == "0.dcm":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if path.name == "1.dcm":
                raise MemoryError
        return real(path, *given)

    monkeypatch.setattr(index, reader, failing)
    found = open_site(site, SMALL).index
    assert (found.files, found.read, len(found.quarantined)) == (7, 4, 3)
    assert dict(found.quarantined)["0.dcm"] == "cannot be opened: Input/output error"
    monkeypatch.undo()
    assert_same(open_site(site, SMALL), whole)


@pytest.mark.parametrize("reader", ["read_facts", "read_frames"])
def test_a_file_that_changes_while_it_is_indexed_gives_nothing_of_either_state(
    reader: str, site: SiteConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(index, reader)

    def overtaken(path: Path, *given: Any) -> Any:
        if path.name == "0.dcm":
            write_dicom(path, some_pixels(77), PatientID="another")
        return real(path, *given)

    monkeypatch.setattr(index, reader, overtaken)
    found = open_site(site, SMALL).index
    assert found.read == 5 and dict(found.quarantined)["0.dcm"].startswith("changed while it was read")
    monkeypatch.undo()
    assert_same(open_site(site, SMALL), open_site(site_over(folder, tmp_path / "aside"), SMALL))


def test_a_volume_is_read_once_its_name_says_what_it_is(site: SiteConfig, folder: Path) -> None:
    volume = nibabel.Nifti1Image(some_pixels(9, (20, 20, 3)), np.eye(4))
    nibabel.save(volume, folder / "part.nii.gz")
    (folder / "part.nii.gz").rename(folder / "part")
    assert dict(open_site(site, SMALL).index.quarantined)["part"].startswith("not an image")
    (folder / "part").rename(folder / "whole.nii.gz")
    assert open_site(site, SMALL).index.samples == 9
    shutil.copy(folder / "whole.nii.gz", folder / "another name")  # comes first in the listing
    for open_anew in (False, True):
        if open_anew:
            shutil.rmtree(site.work)
        found = open_site(site, SMALL).index
        assert (found.samples, found.duplicates, found.read) == (9, 1, 7)


def test_settings_that_change_pixels_have_a_cache_of_their_own(site: SiteConfig) -> None:
    small = open_site(site, SMALL)
    large = open_site(site, DataConfig(image_size=24))
    windowed = open_site(site, DataConfig(image_size=16, window=(100.0, 50.0)))
    assert large.images.shape[2:] == (24, 24) and not np.array_equal(windowed.images, small.images)
    assert len([path for path in (site.work / "cache").iterdir() if path.is_dir()]) == 3
    overwrite(next(site.images.folder.glob("*.dcm")))
    assert_same(open_site(site, SMALL), small)
    declared = SMALL.model_copy(update={"mean": (0.1,), "std": (0.9,)})
    assert_same(open_site(site, declared), small)  # constants are applied later


def test_another_installations_rows_are_not_taken(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    open_site(site, SMALL)
    before = cache_folder(site)
    monkeypatch.setattr("wardround.data.cache_folder.READER", 0)  # an older release
    open_site(site, SMALL)
    assert cache_folder(site) != before  # there is one folder: the other's is deleted


def test_who_opts_out_is_gone_from_index_and_disk(site: SiteConfig, tmp_path: Path) -> None:
    everyone = open_site(site, SMALL)
    open_site(site, DataConfig(image_size=24))
    opt_out = tmp_path / "opt-out.txt"
    opt_out.write_text("\ufeff# asked on Monday\n\n  BEN \n")
    strict = site_over(site.images.folder, site.work, opt_out=opt_out)
    without = open_site(strict, SMALL)
    assert (without.index.opted_out, without.index.samples, without.index.patients) == (2, 4, 2)
    assert b"".join(row.tobytes() for row in without.images) in cache_folder_bytes(cache_folder(site))
    gone = [image for image in everyone.images if not (without.images == image).all(axis=(1, 2, 3)).any()]
    assert len(gone) == 2
    for image in gone:  # the cache of the other settings is gone as a whole
        assert image.tobytes() not in cache_folder_bytes(site.work)
    opt_out.write_text("# nobody\n")
    assert_same(open_site(strict, SMALL), everyone)


def cache_folder_bytes(folder: Path) -> bytes:
    """Return all bytes of all files below a folder."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_opting_out_holds_for_the_patients_of_a_table(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "data", {"lyon": 10})
    opt_out = tmp_path / "opt-out.txt"
    opt_out.write_text("lyon-p1\n")
    found = open_site(site_over(folder, tmp_path / "work", opt_out=opt_out), SMALL)
    assert (found.index.opted_out, found.index.samples, found.num_patients) == (2, 4, 2)


def test_an_opt_out_list_that_cannot_be_read_stops_the_site(site: SiteConfig, tmp_path: Path) -> None:
    for name, content, reason in (("none", None, "No such file"), ("utf16", b"\xff\xfeA\0", "not UTF-8 text")):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"the opt-out list cannot be read: {reason}.*No image is used"):
            open_site(site_over(site.images.folder, site.work, opt_out=tmp_path / name), SMALL)


def test_no_identifier_is_kept(site: SiteConfig) -> None:
    found = open_site(site, SMALL)
    kept = cache_folder_bytes(site.work)
    for word in (b"anna", b"ben", b"cleo", b"Test^Person", b".dcm", b"notes"):
        assert word not in kept
    assert "anna" not in repr(found)


def test_only_the_sites_own_user_may_read_what_is_kept(site: SiteConfig) -> None:
    before = os.umask(0)
    try:
        open_site(site, SMALL)
    finally:
        os.umask(before)
    for path in [site.work, *site.work.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path.name
    assert len((site.work / "patients.salt").read_bytes()) == 32


def test_two_sites_have_two_salts(site: SiteConfig, tmp_path: Path) -> None:
    other = site_over(site.images.folder, tmp_path / "other")
    open_site(site, SMALL)
    open_site(other, SMALL)
    assert (site.work / "patients.salt").read_bytes() != (other.work / "patients.salt").read_bytes()
    mine, theirs = ({json.loads(line).get("patient") for line in index_of(one)} for one in (site, other))
    assert mine & theirs <= {"", None}


def index_of(site: SiteConfig) -> list[str]:
    """Return the lines of a cache's journal."""
    return (cache_folder(site) / "index.jsonl").read_text().splitlines()


def test_a_salt_that_was_cut_is_refused(site: SiteConfig) -> None:
    open_site(site, SMALL)
    (site.work / "patients.salt").write_bytes(b"short")
    with pytest.raises(DataError, match=r"patients\.salt in the work folder has 5 bytes, expected 32"):
        open_site(site, SMALL)


def test_with_another_salt_nobody_is_split_and_opt_outs_hold(site: SiteConfig, folder: Path, tmp_path: Path) -> None:
    open_site(site, SMALL)
    (site.work / "patients.salt").unlink()  # left out of a backup, perhaps
    write_dicom(folder / "new.dcm", some_pixels(99), PatientID="anna")
    assert open_site(site, SMALL).num_patients == 3
    (site.work / "patients.salt").unlink()
    (tmp_path / "opt-out.txt").write_text("anna\n")
    without = open_site(site_over(folder, site.work, opt_out=tmp_path / "opt-out.txt"), SMALL).index
    assert (without.opted_out, without.patients) == (3, 2)


def test_kill_9_in_the_middle_costs_only_what_was_not_decoded_yet(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for number in range(60):
        write_dicom(folder / f"{number:02}.dcm", some_pixels(number, (8, 96, 96)), PatientID=f"p{number}")
    site = site_over(folder, tmp_path / "work")
    script = (
        "from pathlib import Path; from data_objects import *; from wardround.data import open_site;"
        f"open_site(site_over(Path({str(folder)!r}), Path({str(site.work)!r})), SMALL)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent)
    while process.poll() is None and sum(map(size, site.work.glob("cache/*/fresh.bin"))) < 8 * 256 * 10:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    done = {line["fresh"] for line in map(json.loads, index_of(site)[:-1]) if "fresh" in line}
    assert 5 < len(done) < 60
    reference = open_site(site_over(folder, tmp_path / "reference"), SMALL)
    for path in folder.iterdir():
        if hashlib.sha256(path.read_bytes()).hexdigest() in done:
            overwrite(path)
    assert_same(open_site(site, SMALL), reference)


def size(path: Path) -> int:
    """Return the bytes of a file, 0 where it has just gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_a_journal_cut_at_any_byte_is_taken_up_again(site: SiteConfig, folder: Path) -> None:
    reference = open_site(site, SMALL)
    committed = (cache_folder(site) / "index.jsonl").read_bytes()
    for length in (0, 1, 20, len(committed) // 3, len(committed) // 2, len(committed) - 1):
        (cache_folder(site) / "index.jsonl").write_bytes(committed[:length])
        assert_same(open_site(site, SMALL), reference)


def test_rows_that_were_lost_or_altered_before_the_commit_are_decoded_again(site: SiteConfig, folder: Path) -> None:
    reference = open_site(site, SMALL)
    rows = next(cache_folder(site).glob("rows-*.npy"))
    content = rows.read_bytes()
    rows.unlink()  # the reference has it mapped
    rows.write_bytes(content[:-10])
    assert_same(open_site(site, SMALL), reference)
    next(cache_folder(site).glob("rows-*.npy")).unlink()
    assert_same(open_site(site, SMALL), reference)
    # A crash between decoding and commit, after which a block of fresh.bin is zeros: a power cut does that.
    entries = [line for line in index_of(site) if "rows" not in line]
    key = next(json.loads(line)["entry"] for line in entries if '"kept": [0]' in line)
    entries = [line.replace('"kept": [0]', '"kept": []') for line in entries]
    fresh = {"fresh": key, "numbers": [0], "first": 0, "crc": 12345}
    (cache_folder(site) / "index.jsonl").write_text("\n".join([*entries, json.dumps(fresh)]) + "\n")
    (cache_folder(site) / "fresh.bin").write_bytes(bytes(256))
    assert_same(open_site(site, SMALL), reference)
    assert not (cache_folder(site) / "fresh.bin").exists()


def test_a_full_disk_is_one_line_and_loses_nothing(site: SiteConfig) -> None:
    script = (
        "import resource, signal, sys; from pathlib import Path; from data_objects import *;"
        "from wardround.data import open_site; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500));"
        f"open_site(site_over(Path({str(site.images.folder)!r}), Path({str(site.work)!r})), SMALL)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith(
        "wardround.errors.DataError: site 'lyon': the work folder cannot be used: File too large. Free space there"
    )
    assert open_site(site, SMALL).index.samples == 6


def test_two_processes_at_once_index_one_after_the_other(site: SiteConfig) -> None:
    found: list[SiteImages] = []
    threads = [threading.Thread(target=lambda: found.append(open_site(site, SMALL))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(*found)


def test_writers_with_one_process_number_agree_on_the_salt(tmp_path: Path) -> None:
    """Two containers over one work folder are both process 1."""
    for number in range(20):
        with ThreadPoolExecutor(8) as writers:
            assert len(set(writers.map(read_salt, [tmp_path / str(number)] * 8))) == 1
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == ["patients.salt"]


def test_images_stay_readable_while_the_next_index_replaces_them(site: SiteConfig, folder: Path) -> None:
    first = open_site(site, SMALL)
    before = first.images.copy()
    write_dicom(folder / "new.dcm", some_pixels(99))
    assert open_site(site, SMALL).num_images == 7
    np.testing.assert_array_equal(first.images, before)


def test_criteria_are_part_of_what_a_cache_is_for(site: SiteConfig) -> None:
    open_site(site, SMALL)
    asked = DataConfig(image_size=16, criteria=CriteriaConfig(modality=("MR",)))
    with pytest.raises(DataError, match=r"6 excluded \(modality CR\)"):
        open_site(site, asked)
