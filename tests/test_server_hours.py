"""Deadlines count the hours that sites agreed to alone, and whoever is there is asked while others are waited for."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from conftest import tiny
from flwr.app import Message

import wardround.simulate
from wardround.config.hours import after
from wardround.errors import ConfigError, UpdateError
from wardround.server import app
from wardround.simulate import InProcessGrid, simulate

HOUR = 3600.0


def at(text: str, zone: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.mark.parametrize(
    ("hours", "start", "counted", "expected"),
    [
        ("20:00-06:00 UTC", "2026-11-22T21:00", 2 * HOUR, "2026-11-22T23:00"),  # within one night
        ("20:00-06:00 UTC", "2026-11-22T03:00", 3 * HOUR, "2026-11-22T06:00"),  # to its very end
        ("20:00-06:00 UTC", "2026-11-22T03:00", 4 * HOUR, "2026-11-22T21:00"),  # the rest in the next
        ("20:00-06:00 UTC", "2026-11-22T12:00", 24 * HOUR, "2026-11-25T00:00"),  # two nights of ten hours, and four
        ("09:00-17:00 UTC", "2026-11-22T18:00", 1.0, "2026-11-23T09:00:01"),
        ("09:00-09:00 UTC", "2026-11-22T18:00", 30 * HOUR, "2026-11-24T00:00"),  # all day
        ("20:00-06:00 Europe/Paris", "2026-10-24T20:00", 11 * HOUR, "2026-10-25T06:00"),  # the clock is set back
        ("20:00-06:00 Europe/Paris", "2027-03-27T20:00", 9 * HOUR, "2027-03-28T06:00"),  # and forward
    ],
)
def test_time_is_counted_within_hours(hours: str, start: str, counted: float, expected: str) -> None:
    zone = hours.split()[1]
    assert after(hours, at(start, zone), counted) == at(expected, zone)


@pytest.mark.parametrize(
    ("hours", "reason"),
    [
        ({"oslo": "20:00-06:00"}, "expected hours and their time zone"),
        ({"oslo": "20:00-06:00 Mars/Olympus"}, "'Mars/Olympus' is no time zone"),
        ({"oslo": "20:00-06:00 ../passwd"}, "'../passwd' is no time zone"),
        ({"oslo": "20-6 UTC"}, "expected hours and their time zone"),
        ({"rome": "20:00-06:00 UTC"}, "'rome' is not listed in sites"),
    ],
)
def test_hours_that_mean_nothing_are_refused(hours: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        tiny(membership={"sites": {"lyon": 1.0, "oslo": 1.0}, "hours": hours})


class Absent(InProcessGrid):
    """Oslo comes some looks after lyon has answered; who was asked, in order."""

    asked: list[str]
    looks = 0

    def get_nodes(self) -> Any:
        self.looks += bool(self.asked) and not self.waiting
        there = self.looks > 3
        return [node for node in super().get_nodes() if there or self.files[node.node_id][0] != "oslo"]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.asked += [self.files[message.metadata.dst_node_id][0] for message in messages]
        return super().push_messages(messages)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> type[Absent]:
    monkeypatch.setattr(wardround.simulate, "InProcessGrid", Absent)
    monkeypatch.setattr(app, "POLL_SECONDS", 0.0)
    Absent.asked = []
    return Absent


def test_who_is_there_is_asked_while_others_are_waited_for(
    data: Path, store: str, tmp_path: Path, absent: type[Absent], caplog: pytest.LogCaptureFixture
) -> None:
    run = simulate(tiny(training={"rounds": 1}), data, tmp_path / "run", store, threads=1)
    assert absent.asked == ["lyon", "oslo"] and run.record(1)["sites"].keys() == {"lyon", "oslo"}
    assert caplog.text.count("waiting for oslo") == 1


def test_a_site_outside_its_hours_is_waited_for_and_one_within_them_is_not(
    data: Path, store: str, tmp_path: Path, absent: type[Absent]
) -> None:
    """Patience is shorter than any wait here, so that only the hours make a difference."""
    soon = datetime.now(UTC) + timedelta(hours=2)
    closed = f"{soon:%H:%M}-{soon + timedelta(hours=1):%H:%M} UTC"
    for hours, counts in ((closed, True), ("00:00-00:00 UTC", False)):
        sites, absent.asked = {"lyon": 1.0, "oslo": 1.0}, []
        membership = {"sites": sites, "wait_seconds": 1e-9, "round_seconds": 60.0, "hours": {"oslo": hours}}
        config, folder = tiny(training={"rounds": 1}, membership=membership), tmp_path / str(counts)
        if counts:
            simulate(config, data, folder, store, threads=1)
            assert absent.asked == ["lyon", "oslo"]
        else:
            with pytest.raises(UpdateError, match="'oslo' silent: was not connected after 0 s"):
                simulate(config, data, folder, store, threads=1)


def test_how_long_is_left_is_said_of_those_who_are_not_there_too(
    data: Path, store: str, tmp_path: Path, absent: type[Absent], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(app.Live, "tell", lambda live, now: told.append(now))
    begin = time.time()
    config = tiny(training={"rounds": 1}, membership={"wait_seconds": 5000.0, "round_seconds": 100.0})
    simulate(config, data, tmp_path / "run", store, threads=1)
    waited = next(now for now in told if "lyon" in now.asked)
    assert "oslo" not in waited.asked and waited.until is not None
    assert waited.until - begin == pytest.approx(5000.0, abs=60.0)
    assert all(now.until is None for now in told if "oslo" in now.asked)
