"""Which files a site has: all below its folder, or the rows of its labels.csv."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from wardround.config.federation import CriteriaConfig
from wardround.config.site import SiteConfig
from wardround.data.dicomweb import fetched
from wardround.data.labels import chosen, read_rows
from wardround.errors import DataError


@dataclass(frozen=True)
class Listed:
    """One file of a site, by its path relative to the images folder."""

    name: str
    path: Path
    patient: str = field(default="", repr=False)  # from labels.csv
    problem: str = ""  # why it is not even opened


def list_files(site: SiteConfig, criteria: CriteriaConfig) -> list[Listed]:
    """Return every file of a site, sorted by name. Raises DataError where there is no folder or no file.

    The criteria spare a site what a search says it need not fetch; no file in a folder is left out for them.
    """
    folder = site.images.folder
    if site.images.kind == "dicomweb":
        listed = [Listed(name, path, problem=problem) for name, path, problem in fetched(site, criteria)]
        if not listed:
            raise DataError(
                f"site '{site.name}': the DICOMweb server has no object that takes part; see [images] filters."
            )
        return sorted(listed, key=lambda one: one.name)
    try:
        found = _in_folder(site, folder)
    except OSError as error:
        raise DataError(
            f"site '{site.name}': the images folder {folder} cannot be looked into: {error.strerror}. Let the account "
            "that runs Wardround read it."
        ) from error
    if not found:
        raise DataError(f"site '{site.name}': the images folder {folder} is empty. Set [images] folder.")
    return sorted(found, key=lambda one: one.name)


def shown(name: str) -> str:
    r"""Return a file's name as one line that any terminal shows.

    >>> print(shown("two\nlines"), shown("not UTF-8: \udce9"))
    two\nlines not UTF-8: \udce9
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def _in_folder(site: SiteConfig, folder: Path) -> list[Listed]:
    """Return every file of a site that has a folder, unsorted."""
    if not folder.is_dir():
        raise DataError(f"site '{site.name}': the images folder {folder} does not exist. Set [images] folder.")
    if site.work.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"site '{site.name}': the work folder lies inside the images folder, so the cache would be read as "
            "images. Set 'work' to a folder of its own."
        )
    labelled = (folder / "labels.csv").is_file() if site.images.kind == "auto" else site.images.kind == "labelled"
    if not labelled:
        return _walk(folder)
    rows = chosen(read_rows(folder), folder, site.images.site, site.images.splits)
    return [Listed(row.file, row.path, row.patient) for row in rows]


def _walk(folder: Path) -> list[Listed]:
    """Return every file below a folder. Links to files are followed, links to folders are not: they may loop."""
    found: list[Listed] = []

    def unreadable(error: OSError) -> None:
        found.append(_listed(folder, Path(error.filename), f"a folder that cannot be opened: {error.strerror}"))

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        found += [_listed(folder, path, _unfit(path)) for path in (Path(parent, name) for name in files)]
        links = [Path(parent, name) for name in folders if _is_link(Path(parent, name))]
        found += [_listed(folder, path, "a link to a folder; mount or copy that folder inside") for path in links]
    return found


def _unfit(path: Path) -> str:
    """Return why a file is not even opened; "" where it may be."""
    try:
        return "" if path.is_file() else "no regular file, or a broken link"
    except OSError as error:  # in a folder that may be listed and not entered, or on a disk that fails
        return f"cannot be opened: {error.strerror}"


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except OSError:  # the walk says why
        return False


def _listed(folder: Path, path: Path, problem: str) -> Listed:
    return Listed(path.relative_to(folder).as_posix(), path, problem=problem)
