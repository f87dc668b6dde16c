"""What a running federation takes over from the signed membership: who is revoked at once, all else between rounds."""

import logging
from pathlib import Path

from wardround.errors import ConfigError, WardroundError
from wardround.server.membership import (
    FILE,
    Members,
    Membership,
    read_members,
    read_membership,
    taken_over,
    write_members,
)
from wardround.server.registration import admit

log = logging.getLogger(__name__)


class Roster:
    """A run's members, kept up with the coordinator's folder while SuperLink runs.

    The run's file is written first, and from then on holds; where a kill comes before SuperLink knows of it,
    the next start registers every key anew.
    """

    def __init__(self, kit: Path, run: Path) -> None:
        self.kit, self.file, self.home = kit, run / "members.json", run / "flower"
        self.read: bytes | None = None
        self.signed: Membership | None = None

    def cut_off(self) -> bool:
        """Take out, in the middle of a round, whose key was taken back since; return whether anyone's was."""
        signed, before = self._newer()
        if signed is None:
            return False
        after = taken_over(signed).keys
        kept = {site: key for site, key in before.keys.items() if after.get(site) == key}
        if kept == before.keys:
            return False
        self._hold(before, before.model_copy(update={"keys": kept}), signed.version)
        return True

    def take_over(self) -> None:
        """Take over, between two rounds, what was signed since: sites, keys, declared numbers, patience."""
        signed, before = self._newer()
        if signed is not None:
            self._hold(before, taken_over(signed), signed.version)

    def _newer(self) -> tuple[Membership | None, Members]:
        """Return what is signed, where it is newer than what holds; what is wrong with it is said once."""
        before, block = read_members(self.file), self._bytes()
        if block != self.read:
            self.read, self.signed = block, None
            try:
                self.signed = read_membership(self.kit)
                if self.signed.version < before.version:
                    raise ConfigError(f"{self.kit / FILE}: is version {self.signed.version}, older than what holds.")
            except ConfigError as error:
                self.signed = None
                log.warning("warning: %s The membership of before stays.", error)
        newer = self.signed is not None and self.signed.version > before.version
        return (self.signed if newer else None), before

    def _bytes(self) -> bytes | None:
        try:
            return (self.kit / FILE).read_bytes()
        except OSError:
            return None

    def _hold(self, before: Members, after: Members, version: int) -> None:
        write_members(self.file, after)
        for line in changes(before, after):
            log.warning("membership %d: %s", version, line)
        try:
            admit(self.home, after.keys)
        except WardroundError as error:  # no person's to mend: whoever watches this process starts all of it anew
            raise ConnectionError(str(error)) from error


def changes(before: Members, after: Members) -> list[str]:
    """Return what differs between two memberships, a line each."""
    old, new = before.keys, after.keys
    lines = [f"the key of site '{site}' is taken back" for site in sorted(old) if new.get(site) != old[site]]
    lines += [f"site '{site}' joins" for site in sorted(new) if new[site] != old.get(site)]
    was, now = before.settings.model_dump(), after.settings.model_dump()
    return lines + [f"{key} = {value}" for key, value in now.items() if was[key] != value]
