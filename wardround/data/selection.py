"""Which samples take part, and the account of every file. Pure: it looks at what is known, at no file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wardround.config.federation import DataConfig
from wardround.data.cache import Entry, Sample
from wardround.data.listing import Listed
from wardround.data.patients import pseudonym


@dataclass
class Selection:
    """Samples in content order, the number of each one's patient, and the files that give none."""

    order: list[Sample] = field(default_factory=list)
    patients: list[int] = field(default_factory=list)  # 0..P-1 by first appearance, so without the salt
    modalities: Counter[str] = field(default_factory=Counter)
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

    A unit is a file, or a series of them: its key -> for each content, the files that have it.
    """
    result = Selection()
    numbers: dict[str, int] = {}
    taken: Counter[str] = Counter()
    for key in sorted(units):
        entry, contents = entries[key], units[key]
        listed = sorted(one.patient for files in contents for one in files if one.patient)
        result.duplicates += sum(len(files) - 1 for files in contents)
        if opt_outs & {entry.patient, *(pseudonym(salt, patient) for patient in listed)}:
            result.opted_out += len(contents)
        elif entry.reason:
            result.quarantined += [(files[0].name, entry.reason) for files in contents]
        elif entry.excluded:
            result.excluded[entry.excluded] += len(contents)
        else:
            result.read += len(contents)
            # The table's word counts before the file's; without either a file is a patient of its own.
            patient = pseudonym(salt, listed[0]) if listed else entry.patient or key
            frames = _frames(entry, data, taken[patient], result.skipped_frames)
            taken[patient] += len(frames)
            for frame in frames:
                result.order.append((key, frame))
                result.patients.append(numbers.setdefault(patient, len(numbers)))
            result.modalities[entry.modality or "not stated"] += len(frames)
    return result


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
