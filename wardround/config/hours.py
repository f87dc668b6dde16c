"""Hours of the day that a site agreed to, and time that is counted within them alone."""

import re
from datetime import datetime, time, timedelta
from typing import Annotated
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, StringConstraints

_SPAN = r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d"


def _zoned(text: str) -> str:
    """Raise ValueError for what is no hours, or for a zone that the IANA database does not have."""
    span, _, zone = text.partition(" ")
    if not re.fullmatch(_SPAN, span) or not zone:
        raise ValueError(f"'{text}': expected hours and their time zone, such as 20:00-06:00 Europe/Paris")
    try:
        ZoneInfo(zone)
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"'{zone}' is no time zone; expected a name such as Europe/Paris or UTC") from error
    return text


LocalHours = Annotated[str, StringConstraints(pattern=rf"^{_SPAN}$")]  # of the machine that reads it
ZonedHours = Annotated[str, AfterValidator(_zoned)]


def within(hours: LocalHours, now: time) -> bool:
    """Return whether a moment of the day lies within hours, their end not in them; they may pass midnight.

    >>> [within("20:00-06:00", time(hour)) for hour in (19, 20, 0, 6)]
    [False, True, True, False]
    """
    begin, end = _span(hours)
    return begin <= now < end if begin < end else now >= begin or now < end


def after(hours: ZonedHours, start: float, seconds: float) -> float:
    """Return when so many seconds within the hours have gone by since `start`; in seconds since 1970.

    Where a clock is set back or forward in between, the hours are as long as that clock makes them.

    >>> noon = datetime(2026, 11, 22, 12, tzinfo=ZoneInfo("UTC")).timestamp()
    >>> [(after("20:00-21:00 UTC", noon, seconds) - noon) / 3600 for seconds in (1800, 3600, 5400)]
    [8.5, 9.0, 32.5]
    """
    span, _, name = hours.partition(" ")
    zone, (begin, end) = ZoneInfo(name), _span(span)
    day = datetime.fromtimestamp(start, zone).date() - timedelta(days=1)  # the evening before may last until today
    while True:
        opens = datetime.combine(day, begin, zone).timestamp()
        closes = datetime.combine(day + timedelta(days=end <= begin), end, zone).timestamp()
        passed = max(0.0, closes - max(opens, start))
        if passed >= seconds:
            return max(opens, start) + seconds
        seconds -= passed
        day += timedelta(days=1)


def _span(hours: str) -> tuple[time, time]:
    begin, end = (time.fromisoformat(part) for part in hours.split("-"))
    return begin, end
