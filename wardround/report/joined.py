"""What joining brought each site: its own backbone beside the federation's, on the same images, as evaluated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from wardround.errors import ConfigError
from wardround.probe.evaluation import Evaluation, Row, Subgroup
from wardround.probe.scores import Scores

PROBE, FEDERATED = "linear", "backbone"
COLUMN = "site"  # of labels.csv: whose a test image is, told apart by `wardround evaluate --by site`
ALL, OWN = "all test patients", "its own test patients"


@dataclass(frozen=True)
class Score:
    """A score with its 95 % interval, where there is one."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Joined:
    """One site on one set of test images."""

    site: str
    where: str  # ALL or OWN
    images: int
    patients: int
    local: Score
    federated: Score
    random: Score | None  # the untrained network: the floor

    @property
    def gain(self) -> float:
        """What joining brought; below 0 where it took."""
        return self.federated.mean - self.local.mean

    @property
    def sure(self) -> bool:
        """Whether the two intervals do not overlap."""
        ends = (self.local.low, self.local.high, self.federated.low, self.federated.high)
        low, high, least, most = (float("nan") if end is None else end for end in ends)
        return least > high or most < low


@dataclass(frozen=True)
class Compared:
    """What some files of scores say of a federation's backbone."""

    metric: str
    joined: tuple[Joined, ...]
    arms: tuple[tuple[str, str, Score], ...]  # file, arm, score: everything that was measured on all test images
    labels: float  # share of the labels that the probe had

    @property
    def shown(self) -> tuple[Joined, ...]:
        """One comparison a site and file: on its own test patients, where they were told apart."""
        return tuple(one for one in self.joined if one.where == OWN) or self.joined


def read_compared(paths: Sequence[Path], sites: Sequence[str], released: Sequence[str]) -> Compared | None:
    """Return what files of `wardround evaluate --out` say of a run's backbone; None of no file.

    A site's own backbone is the arm that has the site's name: `--against lyon=runs/lyon`. With `--by site` its own
    test patients are told apart, too. `released` are the SHA-256 of the run's released weights.
    Raises ConfigError for another kind of file, and for scores of other weights.
    """
    if not paths:
        return None
    found = {path: _read(path, released) for path in paths}
    metrics = {one.headline[0] for one in found.values()}
    if len(metrics) > 1:
        raise ConfigError(f"--scores: the files score by {' and '.join(sorted(metrics))}; give those of one kind.")
    joined = [one for evaluation in found.values() for one in _joined(evaluation, sites)]
    arms = [
        (path.name, row.arm, _score(row)) for path, evaluation in found.items() for row in _rows(evaluation).values()
    ]
    fraction = max(row.fraction for one in found.values() for row in one.rows)
    return Compared(metrics.pop(), tuple(sorted(joined, key=lambda one: (one.site, one.where))), tuple(arms), fraction)


def _read(path: Path, released: Sequence[str]) -> Evaluation:
    try:
        found = Evaluation.from_json(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: is not what 'wardround evaluate --out' writes; evaluate the backbone anew."
        ) from error
    if found.weights not in released:
        known = ", ".join(one[:12] for one in released) or "none yet"
        raise ConfigError(
            f"{path}: is of other weights ({str(found.weights)[:12]}) than the run has released ({known}); evaluate "
            "this run."
        )
    if FEDERATED not in _rows(found):
        raise ConfigError(f"{path}: has no linear probe of the backbone; evaluate it anew.")
    return found


def _rows(found: Evaluation) -> dict[str, Row]:
    """Return each arm's linear probe at the most labels."""
    most = max(row.fraction for row in found.rows)
    return {row.arm: row for row in found.rows if row.probe == PROBE and row.fraction == most}


def _joined(found: Evaluation, sites: Sequence[str]) -> Iterator[Joined]:
    rows, floor = _rows(found), "random"
    sizes = (found.images["test"], found.patients["test"])
    groups = {
        (group.arm, group.value): group for group in found.subgroups if (group.column, group.probe) == (COLUMN, PROBE)
    }
    for site in sites:
        if site not in rows:
            continue
        yield _pair(site, ALL, sizes, rows[site], rows[FEDERATED], rows.get(floor))
        local, federated = (groups.get((arm, site)) for arm in (site, FEDERATED))
        if local is not None and federated is not None and local.mean is not None:  # it has two classes
            yield _pair(site, OWN, (local.images, local.patients), local, federated, groups.get((floor, site)))


def _pair(
    site: str,
    where: str,
    sizes: tuple[int, int],
    local: Row | Subgroup,
    federated: Row | Subgroup,
    random: Row | Subgroup | None,
) -> Joined:
    return Joined(site, where, *sizes, _score(local), _score(federated), None if random is None else _score(random))


def _score(row: Row | Subgroup) -> Score:
    assert row.mean is not None, "the caller has looked"
    ends: list[Scores | None] = [row.low, row.high]
    low, high = (None if end is None else end.headline[0] for end in ends)
    return Score(row.mean.headline[0], low, high)
