"""Nothing that names a patient, a hospital or a file leaves a site: planted, and searched for in all that does.

Planted in folder and file names, in DICOM tags and in what is raised while images are read and the network is
trained; searched for, in many encodings, in every byte that crosses either way and in all that the coordinator
keeps: its run folder, MLflow's database and artifacts, its log and its screen.
"""

import base64
import hashlib
import hmac
import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import tiny
from data_objects import some_pixels, write_dicom
from flwr.app import ArrayRecord, Message
from flwr.common.serde import message_to_proto

from wardround import simulate as simulation
from wardround.client import app as client_app
from wardround.data.facts import ReadError
from wardround.errors import DataError, UpdateError, WardroundError
from wardround.server.run_folder import RunFolder
from wardround.simulate import InProcessGrid, simulate
from wardround.wire import crossing

TAGS = {
    "PatientID": "Planted-4711-Xq",
    "PatientName": "Plantedname^Xaveria",
    "InstitutionName": "Plantedklinik Sankt Vitus",
    "StudyDescription": "planted complaint of Ms Quodlibet",
    "ImageComments": "planted words, seen by Dr Zwiebelfisch",
    "AccessionNumber": "PLANTEDACC991",
}
FOLDER, FILE, BROKEN = "planted-folder-jones", "planted-file-miller", "planted-broken-baker"
SPOKEN = "planted exception about Plantedname^Xaveria"
NEEDLES = [*TAGS.values(), FOLDER, FILE, BROKEN, SPOKEN]

# What a site of the first round fails with; its second round is well.
FAULTS: dict[str, Exception] = {
    "lyon": ValueError(f"{SPOKEN}, {TAGS['PatientID']}"),
    "oslo": FileNotFoundError(2, "No such file", f"/{FOLDER}/{FILE}"),
    "pisa": DataError(f"{FOLDER}/{FILE}.dcm: {SPOKEN}"),
    "rome": KeyError(TAGS["PatientName"]),
    "wien": WardroundError(SPOKEN),
    "york": ReadError(TAGS["InstitutionName"]),
}
SITES = ("bern", *FAULTS)


def spellings(needle: str) -> Iterator[bytes]:
    """Yield a needle as it might stand somewhere: plain, in other encodings, and hashed, in whole or by its start."""
    for text in {needle, needle.lower(), needle.upper(), needle.replace("^", " "), needle.replace(" ", "_")}:
        plain = text.encode()
        for block in (plain, text.encode("utf-16-le"), text.encode("utf-16-be")):
            yield block
            yield block.hex().encode()
            yield block.hex().upper().encode()
            for before in range(3):  # base64 depends on where a text begins in its group of three
                coded = base64.b64encode(b"\0" * before + block)[4 if before else 0 :]
                yield coded[: len(coded) // 4 * 4 - 4]
        yield plain[::-1]
        for kind in ("sha256", "sha1", "md5", "sha512", "blake2b"):
            yield from digests(hashlib.new(kind, plain).digest())


def digests(digest: bytes) -> Iterator[bytes]:
    """Yield a hash as bytes, in hexadecimal by its first 16 digits, and in base64."""
    yield digest
    yield digest.hex()[:16].encode()
    yield digest.hex()[:16].upper().encode()
    yield base64.b64encode(digest)[:16]


def found(haystack: bytes, needles: Iterable[bytes]) -> set[bytes]:
    """Return the needles in a haystack, also where zstd has packed it."""
    layers = [haystack]
    for start in places(haystack, zstandard.FRAME_HEADER):
        try:
            layers.append(zstandard.ZstdDecompressor().decompressobj().decompress(haystack[start:]))
        except zstandard.ZstdError:  # these four bytes by chance
            continue
    # Thousands of needles in megabytes: those whose first eight bytes occur nowhere are passed over at once.
    by_start: dict[int, list[bytes]] = {}
    for needle in needles:
        by_start.setdefault(int(np.frombuffer(needle, np.uint64, 1)[0]), []).append(needle)
    starts = np.array(sorted(by_start), np.uint64)
    hits: set[bytes] = set()
    for layer in layers:
        for shift in range(min(8, len(layer) // 8)):
            words = np.frombuffer(layer, np.uint64, (len(layer) - shift) // 8, shift)
            near = starts[np.searchsorted(starts, words).clip(max=len(starts) - 1)]
            for word in set(words[near == words].tolist()):
                hits |= {needle for needle in by_start[word] if needle in layer}
    return hits


def places(haystack: bytes, part: bytes) -> Iterator[int]:
    place = haystack.find(part)
    while place >= 0:
        yield place
        place = haystack.find(part, place + 1)


@dataclass
class Seen:
    """All that came out of a federation's sites."""

    run: RunFolder
    crossed: list[bytes] = field(default_factory=list)
    logged: str = ""  # the coordinator's log and screen
    at_sites: str = ""  # the sites' own log
    needles: list[bytes] = field(default_factory=list)

    def leaks(self) -> dict[str, set[bytes]]:
        """Return what was found, by where."""
        kept = {
            str(path): path.read_bytes()
            for path in self.run.path.parent.rglob("*")
            if path.is_file() and not path.is_relative_to(self.run.path / "sites") and "data" not in path.parts
        }
        assert any("mlartifacts" in name for name in kept) and any(name.endswith("mlflow.db") for name in kept)
        stacks = {f"message {n}": block for n, block in enumerate(dict.fromkeys(self.crossed))} | kept
        stacks["the coordinator's log"] = self.logged.encode()
        return {name: hits for name, stack in stacks.items() if (hits := found(stack, self.needles))}


def plant(folder: Path, site: str) -> None:
    """Write a site's images: every name and tag holds what must not leave."""
    for number in range(6):
        path = folder / site / FOLDER / f"{FILE}-{number}.dcm"
        write_dicom(path, some_pixels(number), **{**TAGS, "PatientID": f"{TAGS['PatientID']}-{number // 2}"})
    write_dicom(folder / site / FOLDER / f"{BROKEN}.dcm", some_pixels(9), **TAGS)
    cut = folder / site / FOLDER / f"{BROKEN}.dcm"
    cut.write_bytes(cut.read_bytes()[:-200])


def federate(
    folder: Path, sites: Iterable[str], faults: dict[str, Exception], caplog: pytest.LogCaptureFixture, rounds: int
) -> Seen:
    """Run a federation in which sites fail with these errors in round 1; return all that left them."""
    crossed: list[bytes] = []

    class Tapped(InProcessGrid):
        def _answer(self, message: Message) -> Message:
            reply = super()._answer(message)
            for one in (message, reply):
                crossed.extend(tapped(one))
            return reply

    real = client_app.local_round

    def failing(protocol: object, site: str, round: int, *rest: object) -> object:
        if round == 1 and site in faults:
            raise faults[site]
        return real(protocol, site, round, *rest)  # type: ignore[arg-type]

    for site in sites:
        plant(folder / "data", site)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(simulation, "InProcessGrid", Tapped)
        patch.setattr(client_app, "local_round", failing)
        config = tiny(training={"rounds": rounds, "local_steps": 2}, membership={"min_sites": 1})
        run = simulate(config, folder / "data", folder / "run", f"sqlite:///{folder / 'mlflow.db'}", threads=1)
    seen = Seen(run, crossed)
    own = [record for record in caplog.records if record.name.startswith("wardround.client")]
    others = [record for record in caplog.records if not record.name.startswith("wardround.client")]
    formatter = logging.Formatter()
    seen.at_sites, seen.logged = ("\n".join(map(formatter.format, some)) for some in (own, others))
    seen.needles = [*{s for needle in [*NEEDLES, str(folder / "data")] for s in spellings(needle)}]
    for site in sites:  # the site's own pseudonyms, too: keyed, and still a name to whoever sees two of them
        salt = (run.path / "sites" / site / "patients.salt").read_bytes()
        for number in range(3):
            name = f"{TAGS['PatientID']}-{number}".casefold().encode()
            seen.needles += digests(hmac.new(salt, name, hashlib.sha256).digest())
            seen.needles += digests(hashlib.sha256(f"{TAGS['PatientID']}-{number}".encode()).digest())
    return seen


def tapped(message: Message) -> Iterator[bytes]:
    """Yield a message's bytes as Flower sends them, and its blocks as our own ends take them out of it."""
    yield message_to_proto(message).SerializeToString()
    yield from crossing(message.content)
    for record in message.content.array_records.values():
        assert isinstance(record, ArrayRecord)
        for array in record.values():
            block = array.numpy()
            assert block.dtype == np.uint8
            yield block.tobytes()


def test_nothing_that_was_planted_leaves_a_site(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = federate(tmp_path, SITES, FAULTS, caplog, rounds=2)
    seen.logged += "".join(capfd.readouterr())
    assert seen.run.committed() == [0, 1, 2]
    assert list(seen.run.record(1)["sites"]) == ["bern"] and sorted(seen.run.record(2)["sites"]) == sorted(SITES)
    refused = seen.run.record(1)["refused"]
    assert sorted(refused) == sorted(FAULTS) and "round 1 of 2" in seen.logged
    for words in (SPOKEN, TAGS["PatientID"], f"/{FOLDER}/{FILE}", TAGS["InstitutionName"]):
        assert words in seen.at_sites  # it was raised, and the site's own people can read it
    assert len(seen.crossed) > 4 * len(SITES)  # the parts of a task and an answer, of each site and round
    assert seen.leaks() == {}


# The same search, where something does leave: else it might find nothing whatever is there.


def test_what_does_leave_is_found_on_the_wire_in_the_run_folder_and_on_the_screen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wardround.client.local_round.__version__", TAGS["PatientName"])
    words = hashlib.sha256(TAGS["AccessionNumber"].encode()).hexdigest()
    seen = federate(tmp_path, ("bern", "lyon"), {"lyon": UpdateError(f"by {words}")}, caplog, rounds=1)
    seen.logged += "".join(capfd.readouterr())
    leaks = seen.leaks()
    name, hashed = TAGS["PatientName"].encode(), words[:16].encode()
    assert any(name in hits for where, hits in leaks.items() if where.startswith("message"))
    assert any(hashed in hits for where, hits in leaks.items() if where.startswith("message"))
    assert any(name in hits for where, hits in leaks.items() if where.endswith("manifest.json"))
    assert hashed in leaks["the coordinator's log"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("offset", range(3))
@pytest.mark.parametrize(
    "spelled",
    [
        lambda text: text.encode(),
        lambda text: text.upper().encode("utf-16-le"),
        lambda text: text.encode("utf-16-be"),
        lambda text: text.encode().hex().encode(),
        lambda text: text.encode()[::-1],
        lambda text: hashlib.sha256(text.encode()).digest(),
        lambda text: hashlib.sha256(text.encode()).hexdigest()[:20].encode(),
        lambda text: hashlib.md5(text.encode()).hexdigest().upper().encode(),
        lambda text: base64.b64encode(hashlib.sha1(text.encode()).digest()),
    ],
)
def test_every_spelling_is_found_wherever_it_stands(spelled: object, offset: int, packed: bool) -> None:
    noise = random.Random(offset).randbytes(300 + offset)
    assert callable(spelled)
    hidden = noise + spelled(TAGS["PatientID"]) + noise
    stack = noise + zstandard.compress(hidden) if packed else hidden
    assert found(stack, spellings(TAGS["PatientID"]))
    assert found(base64.b64encode(noise + TAGS["PatientID"].encode() + noise), spellings(TAGS["PatientID"]))
    assert not found(noise + zstandard.compress(noise + b"innocent" + noise), spellings(TAGS["PatientID"]))
