"""The durable loop over rounds. It knows nothing of Flower: how sites are asked is handed in.

Every step is on disk before the next one begins, so the loop may be killed anywhere and started
again: a committed round is never repeated, an open one keeps what has arrived, a closed one is
folded as it was decided.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from wardround.config.privacy import SitePrivacyConfig, UnitPrivacyConfig
from wardround.errors import UpdateError
from wardround.privacy import site_level
from wardround.registry import checkpoint
from wardround.registry.checkpoint import Checkpoint
from wardround.registry.versions import versions
from wardround.server import cohort
from wardround.server.aggregate import Read, fold, weighted_mean
from wardround.server.run_folder import RunFolder
from wardround.server.spool import Closed, Spool
from wardround.update import (
    Declared,
    Refusal,
    State,
    Task,
    Update,
    check_tensors,
    layout,
    pack,
    state_hash,
    withholds,
)

# Sends each site its task and yields answers as they come, at most one a site, until all answered
# or the patience is over.
Ask = Callable[[Mapping[str, Task]], Iterator[tuple[str, bytes | Refusal]]]


def run_rounds(run: RunFolder, ask: Ask, committed: Callable[[int], None]) -> None:
    """Train until the last round is committed; `committed` is called after each commit."""
    done = run.committed()[-1]
    last = run.checkpoint(done)
    todo = range(done + 1, run.config.training.rounds + 1)
    for number in tqdm(todo, "rounds", initial=done, total=run.config.training.rounds, unit="round", disable=None):
        last = run_round(run, last, number, ask)
        committed(number)


def run_round(run: RunFolder, last: Checkpoint, number: int, ask: Ask) -> Checkpoint:
    """Ask, close, fold and commit one round, from wherever an earlier try left it."""
    started = time.time()
    spool = Spool(run.round(number))
    closed = spool.closed() or collect(run, last, spool, number, ask)
    weights = cohort.weights(run.config, closed.declared)
    with spool.reader(closed) as read:
        state, server = next_state(run, last, read, weights)
    record = _record(run, closed, weights, last, time.time() - started)
    new = Checkpoint(number, run.digest, state, server, record)
    checkpoint.write(run.round(number) / "checkpoint", new)
    spool.drop_updates()
    return new


def next_state(run: RunFolder, last: Checkpoint, read: Read, weights: dict[str, float]) -> tuple[State, State]:
    """Return the state and the server optimiser's tensors after a round.

    Where a site is the privacy unit and the server adds the noise, it is fresh at every call: only what
    the commit's rename publishes may be seen.
    """
    privacy, rounds = run.config.privacy, run.config.training.rounds
    mean = partial(weighted_mean, read, weights)
    if not isinstance(privacy, SitePrivacyConfig):
        return fold(last.state, last.server, mean, run.config.aggregation)
    if privacy.noise == "site":
        present = len(weights) / privacy.cohort  # the mean over the declared cohort
        return fold(last.state, last.server, lambda name: present * mean(name), run.config.aggregation)
    clip = float(last.server.get(site_level.CLIP, np.float64(privacy.clip)))
    noisy, clip = site_level.noisy_mean(read, weights, last.state, privacy, rounds, clip)
    state, server = fold(last.state, last.server, noisy, run.config.aggregation)
    return state, {**server, site_level.CLIP: np.array(clip)}


def collect(run: RunFolder, last: Checkpoint, spool: Spool, number: int, ask: Ask) -> Closed:
    """Return the decision on a round: ask whoever has not answered, check and keep what comes, close."""
    asked = spool.cohort()
    if asked is None:
        asked = cohort.choose(run.config, list(run.members))
        spool.open(asked)
    missing = sorted(set(asked) - set(spool.arrived()))
    refused: dict[str, Refusal] = {}
    ledgers: dict[str, str] = {}
    tasks = _tasks(run, last, number, missing)
    for site, answer in ask(tasks) if tasks else ():
        if isinstance(answer, Refusal):
            refused[site] = answer
            continue
        try:
            check_update(run, site, number, last.state, answer)
            spool.add(site, answer)
        except UpdateError as error:
            refused[site] = Refusal("invalid", str(error))
            ledgers |= _ledger_of(site, answer)
    exhausted = sum(refusal.code == "budget" for refusal in refused.values())  # they will not come back
    arrived, needed = len(spool.arrived()), cohort.enough(run.config, asked, exhausted)
    if arrived < needed:
        reasons = "; ".join(f"'{site}' {refused[site].code}: {refused[site].text}" for site in sorted(refused))
        raise UpdateError(
            f"round {number}: {arrived} of {len(asked)} sites gave an update, {needed} are needed. "
            f"{reasons.rstrip('.')}. What arrived is kept; start the same command again to ask the others anew."
        )
    return spool.close(refused, ledgers)


def check_update(run: RunFolder, site: str, number: int, state: State, block: bytes) -> None:
    """Raise UpdateError unless a block is this site's update, of this round, from this state, and sound."""
    limit = sum(array.nbytes for array in state.values()) + 1_000_000
    if len(block) > limit:
        raise UpdateError(f"site '{site}': its update has {len(block)} bytes, expected at most {limit}.")
    update = Update.from_bytes(block)
    expected = {"site": site, "protocol": run.digest, "round": number, "state": state_hash(state)}
    for field, value in expected.items():
        if (found := getattr(update, field)) != value:
            raise UpdateError(
                f"site '{site}': its update says {field} {str(found)[:16]}, expected {str(value)[:16]}. "
                "Compare its protocol digest with 'wardround check'."
            )
    _check_declared(run, site, update.declared)
    check_tensors(f"site '{site}'", update.delta, layout(state))


def _check_declared(run: RunFolder, site: str, declared: Declared) -> None:
    """Raise UpdateError unless a site declares what its federation's privacy lets it, and all of that."""
    privacy, who = run.config.privacy, f"site '{site}'"
    if withholds(privacy) and not declared.private:
        raise UpdateError(f"{who}: declares figures that [privacy] unit = '{privacy.unit}' withholds.")
    if isinstance(privacy, UnitPrivacyConfig):
        expected = run.config.membership.units.get(site)
        if expected is None or declared.units != expected:
            raise UpdateError(f"{who}: declares {declared.units} units, [membership] units says {expected}; agree.")
        if declared.epsilon is None or declared.ledger is None:
            raise UpdateError(f"{who}: does not declare its epsilon and its ledger's head; it runs another release.")
    if not withholds(privacy) and declared.lacking:
        raise UpdateError(f"{who}: does not declare '{declared.lacking[0]}', which nothing withholds here.")
    if declared.steps == 0 or declared.images == 0:
        raise UpdateError(f"{who}: declares {declared.images} images and {declared.steps} steps.")


def _ledger_of(site: str, block: bytes) -> dict[str, str]:
    """Return the ledger's head in a refused update by its site; empty where none can be read."""
    try:
        head = Update.from_bytes(block).declared.ledger
    except UpdateError:
        return {}
    return {} if head is None else {site: head}


def _tasks(run: RunFolder, last: Checkpoint, number: int, sites: list[str]) -> dict[str, Task]:
    """Return each site's task; they share one block of bytes."""
    state = pack(last.state, {})
    protocol = json.dumps(run.protocol.model_dump(mode="json"), sort_keys=True)
    folded, ledgers = last.record.get("last_folded", {}), last.record.get("ledgers", {})
    return {site: Task(number, protocol, folded.get(site, 0), state, ledgers.get(site, "")) for site in sites}


def _newest(seen: Mapping[str, str], came: Mapping[str, str]) -> dict[str, str]:
    """Return each site's longest ledger: lengths only grow, and a shorter one is a restored copy."""
    heads = dict(seen)
    for site, head in came.items():
        heads[site] = max(heads.get(site, head), head, key=lambda one: int(one.partition(":")[0]))
    return heads


def _record(
    run: RunFolder, closed: Closed, weights: dict[str, float], last: Checkpoint, seconds: float
) -> dict[str, Any]:
    """Return what the manifest tells a person about the round."""
    total = sum(weights.values())
    number = last.round + 1
    return {
        "sites": {site: {**vars(value), "weight": weights[site] / total} for site, value in closed.declared.items()},
        "refused": closed.refused,
        "last_folded": {**last.record.get("last_folded", {}), **dict.fromkeys(closed.updates, number)},
        "ledgers": _newest(last.record.get("ledgers", {}), closed.ledgers),
        "bytes_received": closed.bytes,
        "bytes_sent": sum(array.nbytes for array in last.state.values()) * len(closed.updates),
        "seconds": seconds,
        "parent": state_hash(last.state),
        "versions": versions(),
    }
