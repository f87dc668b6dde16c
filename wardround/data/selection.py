"""Which samples take part, and the account of every file. Pure: it looks at what is known, at no file."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from wardround.config.federation import DataConfig
from wardround.data.cache import Entry, Sample
from wardround.data.listing import Listed
from wardround.data.patients import pseudonym


class Origin(NamedTuple):
    """What an image was cut from."""

    key: str  # of the content: SHA-256 of a file, or of a series' keys
    side: int  # the shorter one of its frames, in pixels
    modality: str  # a DICOM code
    path: Path  # of the file, or of a series' first


@dataclass
class Selection:
    """Samples in content order, the number of each one's patient, and the files that give none."""

    order: list[Sample] = field(default_factory=list)
    patients: list[int] = field(default_factory=list)  # 0..P-1 by first appearance, so without the salt
    named: list[bool] = field(default_factory=list)  # whether a file or table says whose it is
    origins: list[Origin] = field(default_factory=list)
    modalities: Counter[str] = field(default_factory=Counter)
    burnt: list[str] = field(default_factory=list)
    read: int = 0
    duplicates: int = 0
    opted_out: int = 0
    excluded: Counter[str] = field(default_factory=Counter)
    skipped_frames: Counter[str] = field(default_factory=Counter)
    quarantined: list[tuple[str, str]] = field(default_factory=list)


def select(
    units: Mapping[str, Sequence[Sequence[Listed]]],
    entries: Mapping[str, Entry],
    data: DataConfig,
    salt: bytes,
    opt_outs: frozenset[str],
) -> Selection:
    """Return the samples of these units in content order.

    A unit is a file, or a series of them: its key -> for each content, the files that have it. Patients who
    share a file that is trained on count as one: else a privacy unit would leave part of itself in another.
    """
    result = Selection()
    numbers: dict[str, int] = {}
    taken: Counter[str] = Counter()
    tabled = {key: _tabled(units[key], salt) for key in units}
    unfit = {key: entries[key].excluded or _other_channels(entries[key], data) for key in units}
    fit = [key for key in units if not (entries[key].reason or unfit[key])]
    # The table's word counts before the file's, unless other files of that patient have no word but their own.
    headed = {entries[key].patient for key in fit if not tabled[key]} - {""}
    owners = {key: sorted(tabled[key] | ({entries[key].patient} & headed)) for key in fit}
    one = _joined(owners.values())
    for key in sorted(units):
        entry, contents = entries[key], units[key]
        result.duplicates += sum(len(files) - 1 for files in contents)
        if opt_outs & {entry.patient, *tabled[key]}:
            result.opted_out += len(contents)
        elif entry.reason:
            result.quarantined += [(files[0].name, entry.reason) for files in contents]
        elif unfit[key]:
            result.excluded[unfit[key]] += len(contents)
        else:
            result.read += len(contents)
            # Without any name a file is a patient of its own.
            patient = one[owners[key][0]] if owners[key] else key
            frames = _frames(entry, data, taken[patient], result.skipped_frames)
            taken[patient] += len(frames)
            origin = Origin(key, entry.side, entry.modality or "not stated", contents[0][0].path)
            result.origins += [origin] * len(frames)
            result.burnt += [files[0].name for files in contents] if entry.burnt else []
            for frame in frames:
                result.order.append((key, frame))
                result.patients.append(numbers.setdefault(patient, len(numbers)))
                result.named.append(bool(owners[key]))
            result.modalities[entry.modality or "not stated"] += len(frames)
    return result


def _other_channels(entry: Entry, data: DataConfig) -> str:
    """Return how a file's channels differ from the federation's, as it is counted; "" where they do not, or may.

    Left out and not refused: one patient's picture would else decide whether the site answers, which is seen outside.
    """
    if entry.channels == data.channels or data.convert_channels:
        return ""
    return f"{entry.channels} channel{'s' if entry.channels > 1 else ''}, without convert_channels"


def _tabled(contents: Sequence[Sequence[Listed]], salt: bytes) -> set[str]:
    """Return the pseudonyms of those whom a table lists a unit for."""
    return {pseudonym(salt, one.patient) for files in contents for one in files if one.patient}


def _joined(groups: Iterable[Sequence[str]]) -> dict[str, str]:
    """Return for each name the one that stands for all that are joined with it, by any chain of groups."""
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while above.setdefault(name, name) != name:
            name = above[name]
        return name

    for group in groups:
        for name in group:
            above[top(name)] = top(group[0])
    return {name: top(name) for name in above}


def _frames(entry: Entry, data: DataConfig, taken: int, skipped: Counter[str]) -> list[int]:
    """Return the frames of a file that take part, and count those that do not."""
    strided = range(0, entry.frames, data.slice_stride)
    shown = [frame for frame in strided if frame not in entry.blank]
    limit = data.criteria.max_images_per_patient
    kept = shown if limit is None else shown[: max(0, limit - taken)]
    skipped.update(
        {
            "between the strides": entry.frames - len(strided),
            "blank": len(strided) - len(shown),
            "beyond the patient's limit": len(shown) - len(kept),
        }
    )
    return kept
