"""A site's images as training sees them, and the account of every file: read, or left out and why."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wardround.config.federation import DataConfig
from wardround.config.site import SiteConfig
from wardround.data.cache import Cache, Entry, Rows, Seen
from wardround.data.cache_folder import opened_cache
from wardround.data.criteria import unmet
from wardround.data.facts import PassingError, ReadError
from wardround.data.intensities import to_square
from wardround.data.listing import Listed, list_files, shown
from wardround.data.patients import keyed_hash, pseudonym, read_opt_outs, read_salt
from wardround.data.readers import BY_NAME, is_named_volume, quiet, read_facts, read_frames, reasons
from wardround.data.selection import Origin, Selection, select
from wardround.errors import DataError


@dataclass(frozen=True)
class Index:
    """What was found. A file is in exactly one of read, duplicates, opted_out, excluded and quarantined."""

    files: int
    read: int  # distinct files that take part
    duplicates: int  # files whose bytes are those of another
    opted_out: int  # files of patients on the site's opt-out list
    excluded: Mapping[str, int]  # files by the criterion that they do not meet
    quarantined: tuple[tuple[str, str], ...]  # path relative to the images folder, on one line, and the reason
    samples: int  # images that training sees: frames of the files read, or cubes of the volumes
    skipped_frames: Mapping[str, int]  # frames of the files read that training does not see, by reason
    patients: int
    unnamed: int  # samples of which nothing says whose they are
    modalities: Mapping[str, int]  # samples by DICOM modality
    burnt: tuple[str, ...] = ()  # paths of the files read whose header says that text is burnt into their pixels


@dataclass(frozen=True)
class SiteImages:
    """What training sees of a site. The same files give the same arrays, on any machine and in any folder."""

    images: NDArray[np.uint8]  # [N, C, S, S] or [N, C, S, S, S], memory-mapped; 0..255 means [0, 1]
    patients: NDArray[np.int32]  # [N], 0..P-1: which images belong together
    named: NDArray[np.bool_]  # [N], whether anything says whose an image is; a nameless file is its own patient
    index: Index
    origins: tuple[Origin, ...] = ()  # [N], what each one was cut from; none of it leaves the site

    @property
    def num_images(self) -> int:
        return self.index.samples

    @property
    def num_patients(self) -> int:
        return self.index.patients


def open_site(site: SiteConfig, data: DataConfig) -> SiteImages:
    """Return a site's images; decodes only what no earlier call decoded with the same settings.

    Samples are in the order of their file's SHA-256, then of their frame. Raises DataError where no
    image is left.
    """
    try:
        listed = list_files(site, data.criteria)
        salt = read_salt(site.work)
        opt_outs = read_opt_outs(site.images.opt_out, site.name, salt)
        with quiet(), opened_cache(site.work, data, salt, opt_outs) as cache:
            contents, paths, unopened = _look(site.name, listed, data, salt, cache)
            units = _units(contents, cache, data)
            passing: dict[str, Entry] = {}  # not learnt: what cannot be read now may be read at the next index
            while True:
                selection = select(units, cache.entries | passing, data, salt, opt_outs)
                lacking = sorted({sample[0] for sample in selection.order if not cache.has(sample)})
                if not lacking:
                    break
                for key in tqdm(lacking, f"{site.name}: decoding", unit="file", disable=None, delay=2, leave=False):
                    files = {same[0].path: cache.seen[paths[same[0].name]] for same in units[key]}
                    try:
                        _decode(key, files, data, cache)
                    except PassingError as error:
                        passing[key] = replace(cache.entries[key], reason=str(error))
            images = cache.commit(selection.order, paths.values(), units)
    except OSError as error:
        raise DataError(
            f"site '{site.name}': the work folder cannot be used: {error.strerror}. Free space there, or set 'work' "
            "to another disk; what is decoded so far is kept."
        ) from error
    index = _index(len(listed), selection, unopened)
    if not index.samples:
        raise DataError(f"site '{site.name}': {_nothing_left(index)}")
    patients, named = np.array(selection.patients, np.int32), np.array(selection.named, bool)
    return SiteImages(images, patients, named, index, tuple(selection.origins))


def _look(
    who: str, listed: Sequence[Listed], data: DataConfig, salt: bytes, cache: Cache
) -> tuple[dict[str, list[Listed]], dict[str, str], list[tuple[str, str]]]:
    """Find each file's content, and read the header of what was never seen.

    Returns content key -> its files, name -> the keyed hash of each path seen, and the files that cannot be opened.
    """
    contents: dict[str, list[Listed]] = {}
    paths: dict[str, str] = {}
    unopened = []
    for one in tqdm(listed, f"{who}: looking", unit="file", disable=None, delay=2, leave=False):
        path_hash = keyed_hash(salt, f"name {one.name}")
        try:
            key = _content(one, path_hash, cache)
            if key not in cache.entries or _is_named_at_last(cache.entries[key], one.path):
                with _unchanged({one.path: cache.seen[path_hash]}):
                    entry = _entry(one.path, data, salt)
                cache.learn(key, entry)
        except ReadError as error:
            unopened.append((one.name, str(error)))
            continue
        contents.setdefault(key, []).append(one)
        paths[one.name] = path_hash
    for files in contents.values():
        files.sort(key=lambda one: not is_named_volume(one.path))  # the first is decoded, by what its name says
    return contents, paths, unopened


def _is_named_at_last(entry: Entry, path: Path) -> bool:
    """Return whether a content was known by no name that says what it is, and has one now."""
    return entry.reason.startswith(BY_NAME) and is_named_volume(path)


@contextmanager
def _unchanged(files: Mapping[Path, Seen]) -> Iterator[None]:
    """Raise PassingError where a file is not as it was when its content was hashed, whatever was read of it."""
    try:
        yield
    finally:
        with reasons("state"):
            for path, seen in files.items():
                status = path.stat()
                if (seen.size, seen.mtime_ns) != (status.st_size, status.st_mtime_ns):
                    raise PassingError("changed while it was read; the next index looks at it again")


def _content(one: Listed, path_hash: str, cache: Cache) -> str:
    """Return the SHA-256 of a file's bytes, from the cache while its size and time are as they were."""
    if one.problem:
        raise ReadError(one.problem)
    try:
        status = one.path.stat()
        seen = cache.seen.get(path_hash)
        if seen is None or (seen.size, seen.mtime_ns) != (status.st_size, status.st_mtime_ns):
            with one.path.open("rb") as file:
                seen = Seen(status.st_size, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest())
            cache.see(path_hash, seen)
    except OSError as error:
        raise ReadError(f"cannot be opened: {error.strerror}") from error
    return seen.key


def _entry(path: Path, data: DataConfig, salt: bytes) -> Entry:
    """Return what a file's header says of it. Raises PassingError where it cannot be read now."""
    try:
        facts = read_facts(path, data.dimensions)
    except PassingError:
        raise
    except ReadError as error:
        return Entry(reason=str(error))
    return Entry(
        frames=facts.frames if data.dimensions == 2 else data.cubes_per_volume,
        channels=facts.channels,
        patient=pseudonym(salt, facts.patient),
        modality=facts.modality,
        side=min(facts.height, facts.width),
        burnt=facts.burnt,
        series="" if data.dimensions == 2 else pseudonym(salt, facts.series),
        excluded=unmet(facts, data.criteria),
    )


def _units(
    contents: Mapping[str, Sequence[Listed]], cache: Cache, data: DataConfig
) -> dict[str, list[Sequence[Listed]]]:
    """Return what gives samples: each content by itself, or all contents that are slices of one series.

    A unit's key is that of its content; a series' key is a hash over those of its slices, so that a
    slice more or less makes it another volume.
    """
    series: dict[str, list[str]] = {}
    for key in sorted(contents):
        series.setdefault(cache.entries[key].series or key, []).append(key)
    units: dict[str, list[Sequence[Listed]]] = {}
    for keys in series.values():
        unit = keys[0] if len(keys) == 1 else hashlib.sha256("".join(keys).encode()).hexdigest()
        if unit not in cache.entries:
            cache.learn(unit, _joined([cache.entries[key] for key in keys]))
        units[unit] = [contents[key] for key in keys]
    return units


def _joined(slices: Sequence[Entry]) -> Entry:
    """Return what is known of a series whose slices are known."""
    several = len({one.patient for one in slices}) > 1
    return replace(
        slices[0],
        reason="the slices of its series name different patients" if several else "",
        excluded=next((one.excluded for one in slices if one.excluded), ""),
        blank=(),
        kept=(),
    )


def _decode(key: str, files: Mapping[Path, Seen], data: DataConfig, cache: Cache) -> None:
    """Put a unit's frames or cubes into the cache, or the reason why it has none.

    Raises PassingError where they cannot be read now.
    """
    entry = cache.entries[key]
    numbers = range(0, entry.frames, data.slice_stride)
    try:
        with _unchanged(files):
            rows = _rows(key, list(files), numbers, data)
    except PassingError:
        raise
    except ReadError as error:
        cache.learn(key, replace(entry, reason=str(error)))
        return
    flat = rows.reshape(len(rows), -1)
    blank = tuple(number for number, row in zip(numbers, flat, strict=True) if row.min() == row.max())
    if len(blank) == len(rows):
        cache.learn(key, replace(entry, reason="blank: all its pixels show the same value"))
        return
    if blank != entry.blank:
        cache.learn(key, replace(entry, blank=blank))
    cache.add(key, numbers, rows)


def _rows(key: str, paths: Sequence[Path], numbers: Sequence[int], data: DataConfig) -> Rows:
    """Return a unit's rows, one a number. Raises ReadError."""
    if data.dimensions == 3:
        from wardround.data.volumes import random_cubes  # MONAI takes seconds to import, and pictures need none of it

        return random_cubes(paths, key, data)
    (path,) = paths
    frames = read_frames(path, numbers, data.window)
    return np.stack([to_square(frame, data.image_size, data.channels) for frame in frames])


def _index(files: int, selection: Selection, unopened: Sequence[tuple[str, str]]) -> Index:
    return Index(
        files=files,
        read=selection.read,
        duplicates=selection.duplicates,
        opted_out=selection.opted_out,
        excluded=dict(sorted(selection.excluded.items())),
        quarantined=tuple(sorted((shown(name), why) for name, why in [*selection.quarantined, *unopened])),
        samples=len(selection.order),
        skipped_frames={reason: count for reason, count in selection.skipped_frames.items() if count},
        patients=max(selection.patients, default=-1) + 1,
        unnamed=selection.named.count(False),
        modalities={name: count for name, count in sorted(selection.modalities.items()) if count},
        burnt=tuple(sorted(selection.burnt)),
    )


def _nothing_left(index: Index) -> str:
    """Return why no image is left, and what to do."""
    parts = [f"{len(index.quarantined)} cannot be read"] if index.quarantined else []
    parts += [f"{count} excluded ({reason})" for reason, count in index.excluded.items()]
    parts += [f"{index.opted_out} opted out"] if index.opted_out else []
    first = "first: '{}': {}".format(*index.quarantined[0]) if index.quarantined else "all were excluded"
    return f"no image among {index.files} files: {', '.join(parts)}; {first}. Set [images] folder, or mend these files."
