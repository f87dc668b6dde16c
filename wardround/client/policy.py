"""What a site enforces by itself, whatever the coordinator asks."""

import json
from collections.abc import Mapping

from wardround.config import Protocol, SiteConfig, parse
from wardround.config.correction import VARIATE
from wardround.encoding import check_encoded, inflate, stepped
from wardround.errors import ConfigError, PolicyRefusal, UpdateError
from wardround.plan import architecture, refuse_unsound
from wardround.update import Layout, State, Task, check_tensors, state_hash, unpack


def agreed_protocol(site: SiteConfig, task: Task) -> Protocol:
    """Return the protocol of a task, if it is one that this site approved.

    The digest is computed here, from the very text that the round is then run by.
    """
    try:
        protocol = parse(json.loads(task.protocol), Protocol, "the coordinator's protocol")
    except (ValueError, ConfigError) as error:
        raise PolicyRefusal(f"the protocol cannot be read: {error}") from error
    digest = protocol.digest()
    if digest not in site.approved:
        approved = ", ".join(known[:12] for known in site.approved) or "none"
        raise PolicyRefusal(
            f"protocol {digest[:12]} is not approved here (approved: {approved}). "
            "Read it with 'wardround check', then add its digest to `approved` in site.toml."
        )
    try:
        refuse_unsound(protocol)
    except ConfigError as error:
        raise PolicyRefusal(str(error)) from error
    if not 1 <= task.round <= protocol.training.rounds:
        raise PolicyRefusal(f"round {task.round}: the approved protocol has rounds 1 to {protocol.training.rounds}.")
    return protocol


def checked_state(protocol: Protocol, task: Task, held: State | None = None) -> State | None:
    """Return the task's state, if it has the architecture that this site builds itself, all numbers finite.

    Where the task holds a step, `held` is what it is added to; None comes back where that does not lead
    to the state that the coordinator names.
    """
    expected = received(protocol)
    try:
        tensors, header = unpack(inflate(task.state, expected, "float32", "the coordinator's state"))
        if "from" not in header:
            check_tensors("the coordinator's state", tensors, expected)
            state: State | None = tensors
        else:
            state = _from_held(protocol, tensors, header, expected, held)
    except UpdateError as error:
        raise PolicyRefusal(str(error)) from error
    if state is None:
        return None
    initial = {name: array for name, array in state.items() if not name.startswith(VARIATE)}
    if task.round == 1 and state_hash(initial) != protocol.initial_state:
        raise PolicyRefusal("round 1 does not start from the initial weights that the approved protocol names.")
    return state


def received(protocol: Protocol) -> Layout:
    """Return what a site takes from the coordinator: its own architecture, with SCAFFOLD a control variate for each."""
    layout = architecture(protocol)
    if protocol.training.correction.name != "scaffold":
        return layout
    return layout | {f"{VARIATE}{name}": spec for name, spec in layout.items()}


def _from_held(
    protocol: Protocol, step: State, header: Mapping[str, object], expected: Layout, held: State | None
) -> State | None:
    """Return the state that a step leads to, or None where the one held is neither its beginning nor its end."""
    check_encoded("the coordinator's step", step, expected, protocol.encoding)
    if held is None:
        return None
    found = state_hash(held)
    if found == header.get("to"):  # this round was begun before
        return held
    if found != header["from"]:
        return None
    state = stepped(held, step, protocol.encoding)
    return state if state_hash(state) == header.get("to") else None
