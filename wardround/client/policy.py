"""What a site enforces by itself, whatever the coordinator asks."""

import json

import numpy as np

from wardround.config import Protocol, SiteConfig, parse
from wardround.errors import ConfigError, PolicyRefusal, UpdateError
from wardround.plan import architecture, refuse_unsound
from wardround.update import State, Task, check_tensors, state_hash, unpack


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


def checked_state(protocol: Protocol, task: Task) -> State:
    """Return the task's state, if it has the architecture that this site builds itself, all numbers finite."""
    expected = architecture(protocol)
    numbers = sum(int(np.prod(shape)) for shape, _ in expected.values())
    if len(task.state) > 4 * numbers + 1_000_000:  # float32 and a generous header
        raise PolicyRefusal(f"the state has {len(task.state)} bytes; this architecture has {4 * numbers}.")
    try:
        state, _ = unpack(task.state)
        check_tensors("the coordinator's state", state, expected)
    except UpdateError as error:
        raise PolicyRefusal(str(error)) from error
    if task.round == 1 and state_hash(state) != protocol.initial_state:
        raise PolicyRefusal("round 1 does not start from the initial weights that the approved protocol names.")
    return state
