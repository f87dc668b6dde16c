"""Images of a DICOMweb server, fetched once into a folder below `work`, from where they are read as any others.

    work/dicomweb/STUDY/SERIES/OBJECT.dcm   DICOM Part 10, as the server has it
    work/dicomweb/STUDY/study.json          how far the study is fetched, and whose it is, as a keyed hash

A study is looked into only where the server counts other objects in it than before, so a listing costs a
search and what is new. Who opts out loses the files at once, before the server is asked; what the server
has no more is removed, too. The folder holds whole objects, with their names: it is for the site's account alone.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from wardround.config.federation import CriteriaConfig
from wardround.config.site import SiteConfig
from wardround.data import dicom
from wardround.data.cache import private
from wardround.data.dicomweb_server import Found, Server, Unavailable, first, values
from wardround.data.facts import ReadError
from wardround.data.patients import pseudonym, read_opt_outs, read_salt
from wardround.data.readers import quiet, reasons
from wardround.errors import DataError

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")  # what may become a name on disk
_STUDY, _SERIES, _OBJECT = "0020000D", "0020000E", "00080018"
_PATIENT, _DATE, _MODALITY, _MODALITIES, _COUNT = "00100020", "00080020", "00080060", "00080061", "00201208"
_SHOWN = 4096  # bytes of an element that a header is read with


@dataclass
class Mark:
    """What is known of a study that was fetched."""

    patients: list[str] = field(default_factory=list)  # keyed hashes: by the search, and by the objects themselves
    count: str = ""  # the server's, of all its objects; "" while it is not fetched whole
    modalities: list[str] | None = field(default_factory=list)  # what is fetched of it; None: all
    refused: dict[str, str] = field(default_factory=dict)  # SERIES/OBJECT.dcm -> why it could not be had


def fetched(site: SiteConfig, criteria: CriteriaConfig) -> Iterator[tuple[str, Path, str]]:
    """Yield each object that a site has of its server: name, path, and why it could not be had ("" where it could).

    Fetches what is new and fits the criteria, as far as a search tells. Raises DataError where the server
    cannot be used, OSError where the disk refuses.
    """
    folder = site.images.folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with private(folder / "lock", "ab") as lock, quiet():
        fcntl.flock(lock, fcntl.LOCK_EX)
        store = Store(site, folder)
        store.drop_opted_out()
        store.update(criteria)
        yield from store.listed()


class Store:
    """The folder, and the server that it follows."""

    def __init__(self, site: SiteConfig, folder: Path) -> None:
        self.site, self.folder = site, folder
        self.salt = read_salt(site.work)
        self.opt_outs = read_opt_outs(site.images.opt_out, site.name, self.salt)
        self.unnamed = 0  # what the server names by no UID
        for left in folder.rglob("*.partial"):
            left.unlink()

    def drop_opted_out(self) -> None:
        """Remove the objects of every patient who has opted out since."""
        for study in self._studies():
            if self.opt_outs.intersection(self._mark(study).patients):
                self._drop(study)

    def update(self, criteria: CriteriaConfig) -> None:
        """Fetch what is new, remove what the server has no more."""
        server, filters = Server(self.site), self.site.images.filters
        asked = {**filters, "includefield": [_MODALITIES, _COUNT]}
        found = {first(one, _STUDY): one for one in server.search("studies", _STUDY, asked)}
        if not found:
            raise DataError(
                f"site '{self.site.name}': the DICOMweb server at {server.host} lists no study; check [images] url and "
                "filters."
            )
        for study in self._studies():  # pages may miss what moves between them: what seems gone is asked for by name
            one = {**filters, "StudyInstanceUID": study}
            if study not in found and not any(server.search("studies", _STUDY, one)):
                shutil.rmtree(self.folder / study)
        name = f"{self.site.name}: fetching"
        for study, one in tqdm(found.items(), name, unit="study", disable=None, delay=2, leave=False):
            if self._is_name(study) and _fits(one, criteria):
                self._follow(server, study, one, criteria)

    def listed(self) -> Iterator[tuple[str, Path, str]]:
        """Yield all that is here, and all that could not be had."""
        for study in self._studies():
            home = self.folder / study
            for path in home.glob("*/*.dcm"):
                yield path.relative_to(self.folder).as_posix(), path, ""
            for name, reason in self._mark(study).refused.items():
                yield f"{study}/{name}", home / name, reason
        for number in range(self.unnamed):
            yield f"unnamed-{number}", self.folder / f"unnamed-{number}", "the server names it by no valid UID"

    def _follow(self, server: Server, study: str, one: Found, criteria: CriteriaConfig) -> None:
        """Fetch a study as far as it is asked for and not here yet."""
        mark, count = self._mark(study), first(one, _COUNT)
        patient = pseudonym(self.salt, first(one, _PATIENT))
        if patient and patient not in mark.patients:
            mark.patients.append(patient)
        if self.opt_outs.intersection(mark.patients):
            return
        wanted = sorted(_codes(criteria.modality)) or None
        had = mark.modalities is None or (wanted is not None and set(wanted) <= set(mark.modalities))
        if count and mark.count == count and had:
            return
        self._write(study, Mark(mark.patients))  # before the first object: so that it is known whose they are
        fetched = Mark(mark.patients, count, wanted)
        if self._look_into(server, study, fetched):
            self._write(study, fetched)

    def _look_into(self, server: Server, study: str, mark: Mark) -> bool:
        """Make a study's folder what the server has of it; return False where its patient proves to have opted out."""
        home, kept = self.folder / study, set()
        for series in server.search(f"studies/{study}/series", _SERIES, {}):
            name, modality = first(series, _SERIES), first(series, _MODALITY)
            if not self._is_name(name):
                continue
            if mark.modalities is not None and modality and modality not in mark.modalities:
                kept |= set((home / name).glob("*.dcm"))  # fetched for another federation, perhaps
                continue
            path = f"studies/{study}/series/{name}/instances"
            for one in server.search(path, _OBJECT, {}):
                if not self._is_name(uid := first(one, _OBJECT)):
                    continue
                file = home / name / f"{uid}.dcm"
                kept.add(file)
                if not file.exists() and not self._fetch(server, f"{path}/{uid}", file, mark):
                    self._drop(study, mark)
                    return False
        for file in set(home.glob("*/*.dcm")) - kept:
            file.unlink()
        return True

    def _fetch(self, server: Server, path: str, file: Path, mark: Mark) -> bool:
        """Fetch one object; return False where it is of somebody who has opted out."""
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".partial", dir=file.parent)  # mode 0600
        aside = Path(name)
        try:
            with os.fdopen(handle, "wb") as block:
                server.retrieve(path, block)
            patient = self._patient_of(aside, file.stem)
            if patient and patient not in mark.patients:
                mark.patients.append(patient)
            if patient in self.opt_outs:
                return False
            aside.replace(file)
        except (Unavailable, ReadError) as error:
            mark.refused[f"{file.parent.name}/{file.name}"] = str(error)
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _patient_of(self, path: Path, uid: str) -> str:
        """Return the pseudonym in an object. Raises ReadError where it is none, or another than was asked for."""
        with reasons("header"):
            dataset = dicom.read(path, defer_size=_SHOWN)
            if dicom.text(dataset, "SOPInstanceUID") != uid:
                raise ReadError("the server gives another object than it was asked for")
            return pseudonym(self.salt, dicom.text(dataset, "PatientID"))

    def _is_name(self, uid: str) -> bool:
        """Return whether a UID may become a name on disk, and count those that may not."""
        sound = len(uid) <= 64 and _UID.fullmatch(uid) is not None
        self.unnamed += not sound
        return sound

    def _drop(self, study: str, mark: Mark | None = None) -> None:
        """Remove a study's objects, and remember whose it is, so that it is not fetched again."""
        patients = (mark or self._mark(study)).patients
        for series in [path for path in (self.folder / study).iterdir() if path.is_dir()]:
            shutil.rmtree(series)
        self._write(study, Mark(patients))

    def _studies(self) -> Sequence[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir())

    def _mark(self, study: str) -> Mark:
        with suppress(OSError, ValueError, TypeError):
            return Mark(**json.loads((self.folder / study / "study.json").read_bytes()))
        return Mark()

    def _write(self, study: str, mark: Mark) -> None:
        home = self.folder / study
        home.mkdir(mode=0o700, exist_ok=True)
        aside = home / "study.partial"
        with private(aside, "wb") as file:
            file.write(json.dumps(asdict(mark)).encode())
        aside.replace(home / "study.json")


def _fits(study: Found, criteria: CriteriaConfig) -> bool:
    """Return whether a study may hold what is asked for; where the search does not tell, the objects' headers will."""
    modalities, wanted = values(study, _MODALITIES), _codes(criteria.modality)
    if modalities and wanted and not wanted.intersection(modalities):
        return False
    day = first(study, _DATE)
    begin, end = (f"{edge:%Y%m%d}" if edge else "" for edge in (criteria.date_from, criteria.date_to))
    return not day or (day >= begin and (not end or day <= end))


def _codes(asked: Sequence[str] | None) -> set[str]:
    return {code.strip().upper() for code in asked or ()}
