"""What a site enforces by itself, whatever the coordinator asks."""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import lru_cache

from wardround.client import approval
from wardround.config import Protocol, SiteConfig, parse
from wardround.config.correction import VARIATE
from wardround.encoding import check_encoded, inflate, stepped
from wardround.errors import ConfigError, PolicyRefusal, UpdateError
from wardround.plan import architecture, refuse_unsound
from wardround.update import Layout, Start, State, Task, check_size, check_tensors, state_hash, unpack, withholds


def agreed_protocol(site: SiteConfig, task: Task) -> Protocol:
    """Return the protocol of a task, if it is one that this site approved.

    The digest is computed here, from the very text that the round is then run by.
    """
    try:
        protocol = parse(json.loads(task.protocol), Protocol, "the coordinator's protocol")
    except (ValueError, ConfigError) as error:
        raise PolicyRefusal(f"the protocol cannot be read: {error}") from error
    why = approval.unapproved(site, protocol)
    if why is not None:
        approval.keep_waiting(site, protocol)
        digest = protocol.digest()[:12]
        raise PolicyRefusal(
            f"protocol {digest} {why}. At the site, 'wardround site approve SITE_TOML {digest}' shows it."
        )
    if not site.is_open(datetime.now().time()):  # local time, as a person writes it
        raise PolicyRefusal(f"it is not within this site's hours, {site.hours}; ask again then.")
    if (objection := next(objections(site, protocol), None)) is not None:
        raise PolicyRefusal(objection)
    if not 1 <= task.round <= protocol.training.rounds:
        raise PolicyRefusal(f"round {task.round}: the approved protocol has rounds 1 to {protocol.training.rounds}.")
    approval.note_rule(site, protocol)
    return protocol


def objections(site: SiteConfig, protocol: Protocol) -> Iterator[str]:
    """Yield why a protocol is refused though a person approved it; of the images, `refuse_few` says the same."""
    try:
        refuse_unsound(protocol)
    except ConfigError as error:
        yield str(error)
    for key in ("local_steps", "batch_size") if not withholds(protocol.privacy) else ():
        least, found = getattr(site.minimum, key), getattr(protocol.training, key)
        if found < least:
            yield (
                f"[training] {key} = {found}: expected at least {least}, for the coordinator sees updates without "
                f"noise ([minimum] {key} in site.toml)."
            )


def refuse_few(site: SiteConfig, protocol: Protocol, images: int) -> None:
    """Raise PolicyRefusal where an update without noise would tell of fewer images than this site allows."""
    if images < site.minimum.images and not withholds(protocol.privacy):
        raise PolicyRefusal(
            f"this site has fewer than {site.minimum.images} images for this, and the coordinator sees updates without "
            "noise ([minimum] images in site.toml)."
        )


def checked_state(protocol: Protocol, task: Task, held: Start | None = None) -> Start | None:
    """Return the task's state, if it has the architecture that this site builds itself, all numbers finite and bounded.

    Where the task holds a step, `held` is what it is added to; None comes back where that does not lead
    to the state that the coordinator names.
    """
    expected = received(protocol)
    try:
        tensors, header = unpack(inflate(task.state, expected, "float32", "the coordinator's state"))
        if "from" not in header:
            check_tensors("the coordinator's state", tensors, expected)
            start: Start | None = Start(tensors, state_hash(tensors))
        else:
            start = _from_held(protocol, tensors, header, expected, held)
    except UpdateError as error:
        raise PolicyRefusal(str(error)) from error
    if start is None:
        return None
    initial = {name: array for name, array in start.state.items() if not name.startswith(VARIATE)}
    if task.round == 1 and task.kind == "task" and state_hash(initial) != protocol.initial_state:
        raise PolicyRefusal("round 1 does not start from the initial weights that the approved protocol names.")
    return start


@lru_cache(maxsize=8)  # asked with every task, and a network is built for it
def received(protocol: Protocol) -> Layout:
    """Return what a site takes from the coordinator: its own architecture, with SCAFFOLD a control variate for each."""
    layout = architecture(protocol)
    if protocol.training.correction.name != "scaffold":
        return layout
    return layout | {f"{VARIATE}{name}": spec for name, spec in layout.items()}


def _from_held(
    protocol: Protocol, step: State, header: Mapping[str, object], expected: Layout, held: Start | None
) -> Start | None:
    """Return the state that a step leads to, or None where the one held is neither its beginning nor its end.

    What the one held is said to be is not looked at again: what comes of it is, by its own hash.
    """
    check_encoded("the coordinator's step", step, expected, protocol.encoding)
    if held is None or held.hash not in (header["from"], header.get("to")):
        return None
    begun = held.hash == header.get("to")  # this round, before
    state = held.state if begun else stepped(held.state, step, protocol.encoding)
    for name, array in state.items():
        check_size("the coordinator's state", name, array)
    found = state_hash(state)
    return (held if begun else Start(state, found, step)) if found == header.get("to") else None
