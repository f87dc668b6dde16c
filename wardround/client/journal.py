"""What a site remembers of its rounds, so that each is done once.

A finished round lies on disk before it is sent: the update as it crosses, and the site memory after
it. Asked again for the same round from the same state, the site replays the bytes. Site memory
advances only on what the server folded: the next round continues from the memory of the one that the
server names, which is kept beside the newest, however many in between were dropped.

Where states cross as steps, the last state that it trained from is kept too, for the next step to be added to:
in memory, and on disk as the last one that was written whole and the steps since.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wardround.config.federation import Encoding
from wardround.encoding import stepped
from wardround.errors import PolicyRefusal, UpdateError, WardroundError
from wardround.registry.durable import write_file, write_tensors
from wardround.registry.tensors import TensorFile
from wardround.update import Start, State, Update

WRITTEN = 8  # times the state, of a round: update, moments and residual, and as much on the way there
STEPS = 8  # kept beside a whole state, which is read and added to after a restart; eight of int8 are two states
# What `hold` was given last, by its journal's folder: one, so that a process of many sites holds no more than one's.
_held: dict[Path, Start] = {}


class Journal:
    """The rounds of one protocol at one site: a folder for each."""

    def __init__(self, work: Path, digest: str, max_trainings: int) -> None:
        self.folder = work / "journal" / digest[:16]
        self.max_trainings = max_trainings

    def replay(self, round: int, state: str) -> bytes | None:
        """Return the finished update of a round from a state, or None where there is none.

        Raises PolicyRefusal for a round that lies behind the newest finished one, unless its update is kept: a
        coordinator that lost its newest checkpoint goes back by a round, and the same bytes tell nothing new.
        """
        block, newest = self._kept(round, state), max(self._finished(), default=0)
        if block is None and round < newest:
            raise PolicyRefusal(
                f"round {round} lies behind round {newest}, which is done here; rounds only go forward. A federation "
                "that begins anew needs another seed in its file, and so another approval."
            )
        return block

    def _kept(self, round: int, state: str) -> bytes | None:
        """Return the update of a round from a state, or None where this disk does not have it, or has it damaged."""
        path = self._round(round) / "update.safetensors"
        if not path.exists():
            return None
        block = path.read_bytes()
        try:
            return block if Update.from_bytes(block).state == state else None
        except UpdateError:  # the newest round is then trained again, which is counted
            return None

    def released(self, round: int) -> bool:
        """Return whether a round has a finished update, from whatever state."""
        return round in self._finished()

    def check_room(self, needed: int) -> None:
        """Raise WardroundError where the disk has fewer free bytes than a round writes: before one is counted."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise WardroundError(
                f"{self.folder}: {free / 1e6:,.0f} MB are free, and a round may write {needed / 1e6:,.0f} MB; make "
                "room, and the coordinator asks again."
            )

    @contextmanager
    def training(self, round: int) -> Iterator[None]:
        """Count a training of a round, on disk, before what is inside; take it back where that refuses.

        Raises PolicyRefusal past the limit. It is counted before privacy is charged, so that a crash in
        between cannot be used to charge the same round for ever.
        """
        path = self._round(round) / "trainings.json"
        begun = json.loads(path.read_bytes()) if path.exists() else 0
        if begun >= self.max_trainings:
            raise PolicyRefusal(
                f"round {round} was trained {begun} times already; this site's limit is max_trainings_per_round = "
                f"{self.max_trainings}."
            )
        write_file(path, json.dumps(begun + 1).encode())
        try:
            yield
        except WardroundError:
            write_file(path, json.dumps(begun).encode())
            raise

    def finish(self, round: int, update: bytes, memory: State, last_folded: int) -> None:
        """Keep a round's update and the site memory after it; the update's name on disk means done.

        Beside it, only the last folded round is kept: the server names one of the two next. What was cut in a round
        before, and never finished, goes too: rounds only go forward.
        """
        write_tensors(self._round(round) / "memory.safetensors", memory)
        write_file(self._round(round) / "update.safetensors", update)
        self.midway(round).unlink(missing_ok=True)
        for folder in self.folder.glob("round-*"):
            if (number := int(folder.name.removeprefix("round-"))) < round and number != last_folded:
                shutil.rmtree(folder)

    def midway(self, round: int) -> Path:
        """Return the file in which it is kept how far the training of a round has come."""
        return self._round(round) / "midway.safetensors"

    def memory(self, round: int) -> State | None:
        """Return the site memory after a round that the server folded; empty before the first.

        None where it is lost: the caller says so and starts anew.
        """
        if round == 0:
            return {}
        try:
            return dict(TensorFile(self._round(round) / "memory.safetensors"))
        except (OSError, UpdateError, ValueError):  # a tensor that is cut is a ValueError
            return None

    def held(self, kind: Encoding) -> Start | None:
        """Return what `hold` was given last, or None where it is lost or there was none.

        What is read is not hashed: what the next step makes of it is.
        """
        if self.folder in _held:
            return _held[self.folder]
        try:
            file = TensorFile(self.folder / "state.safetensors")
            state, reached = dict(file), str(file.header["hash"])
            for path in self._steps():
                step = TensorFile(path)
                if step.header["from"] == reached:  # else a kill came before it went, after the next whole state
                    state, reached = stepped(state, step, kind), str(step.header["to"])
            return Start(state, reached)
        except (OSError, UpdateError, KeyError, ValueError):
            return None

    def hold(self, start: Start) -> None:
        """Keep the state that a round trains from, in place of the one before.

        Where it came as a step to what this process holds, the step alone is written, until there are STEPS of them.
        """
        before, steps = _held.pop(self.folder, None), self._steps()
        if before is not None and start.step is not None and len(steps) < STEPS:
            number = int(steps[-1].stem.removeprefix("step-")) + 1 if steps else 1
            path = self.folder / f"step-{number:05d}.safetensors"
            write_tensors(path, start.step, {"from": before.hash, "to": start.hash})
        else:
            write_tensors(self.folder / "state.safetensors", start.state, {"hash": start.hash})
            for path in steps:
                path.unlink()
        _held.clear()
        _held[self.folder] = start._replace(step=None)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))

    def _round(self, round: int) -> Path:
        return self.folder / f"round-{round:05d}"

    def _finished(self) -> list[int]:
        return [int(path.parent.name.removeprefix("round-")) for path in self.folder.glob("round-*/update.safetensors")]
