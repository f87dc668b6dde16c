"""The durable loop over rounds. It knows nothing of Flower: how sites are asked is handed in.

Every step is on disk before the next one begins, so the loop may be killed anywhere and started
again: a committed round is never repeated, an open one keeps what has arrived, a closed one is
folded as it was decided.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from wardround.config.federation import Encoding
from wardround.config.privacy import SitePrivacyConfig, UnitPrivacyConfig
from wardround.encoding import check_encoded, compress, encode, inflate, keep, kept, stepped
from wardround.errors import UpdateError
from wardround.privacy import site_level
from wardround.registry import checkpoint
from wardround.registry.checkpoint import Checkpoint
from wardround.registry.versions import versions
from wardround.server import cohort
from wardround.server.aggregate import Read, fold, next_variates, with_variates
from wardround.server.robust import folded
from wardround.server.run_folder import RunFolder
from wardround.server.spool import Closed, Spool
from wardround.update import (
    Declared,
    Refusal,
    State,
    Task,
    Update,
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
    last = run.newest()
    done = last.round
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
        after, server = next_state(run, last, read, weights)
    state, server, step = publish(run.protocol.encoding, last, after, server)
    record = _record(run, closed, weights, last, time.time() - started)
    new = Checkpoint(number, run.digest, state, server, record, step)
    checkpoint.write(run.round(number) / "checkpoint", new)
    spool.drop_updates()
    return new


def next_state(run: RunFolder, last: Checkpoint, read: Read, weights: dict[str, float]) -> tuple[State, State]:
    """Return the state and the server optimiser's tensors after a round.

    Where a site is the privacy unit and the server adds the noise, it is fresh at every call: only what
    the commit's rename publishes may be seen.
    """
    config, privacy, rounds = run.config.aggregation, run.config.privacy, run.config.training.rounds
    if isinstance(privacy, SitePrivacyConfig) and privacy.noise == "server":
        clip = float(last.server.get(site_level.CLIP, np.float64(privacy.clip)))
        noisy, clip = site_level.noisy_mean(read, weights, last.state, privacy, rounds, clip)
        state, server = fold(last.state, last.server, noisy, config)
        return state, {**server, site_level.CLIP: np.array(clip)}
    delta = folded(read, weights, last.state, config)
    if isinstance(privacy, SitePrivacyConfig):
        present = len(weights) / privacy.cohort  # the mean over the declared cohort
        return fold(last.state, last.server, lambda name: present * delta(name), config)
    state, server = fold(last.state, last.server, delta, config)
    if run.config.training.correction.name == "scaffold":
        server |= next_variates(read, weights, len(run.members), last.state, last.server)
    return state, server


def outgoing(run: RunFolder, last: Checkpoint) -> State:
    """Return the tensors that sites start from."""
    carries = run.config.training.correction.name == "scaffold"
    return with_variates(last.state, last.server) if carries else last.state


def publish(kind: Encoding, last: Checkpoint, aim: State, server: State) -> tuple[State, State, State]:
    """Return the state to commit, the server's tensors with the next residual, and the encoded step to that state.

    What is committed is what a site gets that adds the step to the state before. A float32 step would cost
    as much as the state itself, and none is made.
    """
    if kind == "float32":
        return aim, server, {}
    moved = {name: new - last.state[name] for name, new in aim.items()}
    step, lost = encode(moved, kind, kept(last.server)[0])
    return stepped(last.state, step, kind), server | keep(lost), step


def collect(run: RunFolder, last: Checkpoint, spool: Spool, number: int, ask: Ask) -> Closed:
    """Return the decision on a round: ask whoever has not answered, check and keep what comes, close."""
    asked = spool.cohort()
    if asked is None:
        asked = cohort.choose(run.config, list(run.members), number)
        spool.open(asked)
    missing = sorted(set(asked) - set(spool.arrived()))
    refused: dict[str, Refusal] = {}
    ledgers: dict[str, str] = {}
    received: dict[str, int] = {}
    state = outgoing(run, last)
    sent = 0
    for whole in (False, True):  # who lacks the state that its step starts from is asked again with the whole one
        tasks = _tasks(run, last, number, missing, whole)
        missing = []
        sent += sum(len(task.state) for task in tasks.values())
        for site, answer in ask(tasks) if tasks else ():
            if isinstance(answer, Refusal):
                refused[site] = answer
                if answer.code == "state" and not whole:
                    missing.append(site)
                continue
            received[site] = len(answer)
            try:
                spool.add(site, check_update(run, site, number, state, answer))
                refused.pop(site, None)
            except UpdateError as error:
                refused[site] = Refusal("invalid", str(error))
                ledgers |= _ledger_of(run, site, state, answer)
    exhausted = sum(refusal.code == "budget" for refusal in refused.values())  # they will not come back
    arrived, needed = len(spool.arrived()), cohort.enough(run.config, asked, exhausted)
    if arrived < needed:
        reasons = "; ".join(f"'{site}' {refused[site].code}: {refused[site].text}" for site in sorted(refused))
        raise UpdateError(
            f"round {number}: {arrived} of {len(asked)} sites gave an update, {needed} are needed. "
            f"{reasons.rstrip('.')}. What arrived is kept; start the same command again to ask the others anew."
        )
    return spool.close(refused, ledgers, received, sent)


def check_update(run: RunFolder, site: str, number: int, state: State, answer: bytes) -> bytes:
    """Return the block in an answer, to be spooled.

    Raises UpdateError unless it is this site's update, of this round, from this state, and sound.
    """
    kind, shapes = run.protocol.encoding, layout(state)
    block = inflate(answer, shapes, kind, f"site '{site}': its update")
    update = Update.from_bytes(block)
    expected = {"site": site, "protocol": run.digest, "round": number, "state": state_hash(state), "encoding": kind}
    for field, value in expected.items():
        if (found := getattr(update, field)) != value:
            raise UpdateError(
                f"site '{site}': its update says {field} {str(found)[:16]}, expected {str(value)[:16]}. "
                "Compare its protocol digest with 'wardround check'."
            )
    _check_declared(run, site, update.declared)
    check_encoded(f"site '{site}'", update.delta, shapes, kind)
    return block


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


def _ledger_of(run: RunFolder, site: str, state: State, answer: bytes) -> dict[str, str]:
    """Return the ledger's head in a refused update by its site; empty where none can be read."""
    try:
        head = Update.from_bytes(inflate(answer, layout(state), run.protocol.encoding, "")).declared.ledger
    except UpdateError:
        return {}
    return {} if head is None else {site: head}


def _tasks(run: RunFolder, last: Checkpoint, number: int, sites: list[str], whole: bool) -> dict[str, Task]:
    """Return each site's task; those with the whole state share one block of bytes, those with a step another.

    Whose update was folded in the last round began it from the state that the step starts from.
    """
    protocol = json.dumps(run.protocol.model_dump(mode="json"), sort_keys=True)
    folded, ledgers = last.record.get("last_folded", {}), last.record.get("ledgers", {})
    near = [site for site in sites if last.step and folded.get(site) == last.round and not whole]
    hashes = {"from": last.record["parent"], "to": state_hash(last.state)} if near else {}
    step = compress(pack(last.step, hashes)) if near else b""
    state = compress(pack(outgoing(run, last), {})) if len(near) < len(sites) else b""
    units = run.config.membership.units if isinstance(run.config.privacy, UnitPrivacyConfig) else {}
    return {
        site: Task(
            number,
            protocol,
            folded.get(site, 0),
            step if site in near else state,
            ledgers.get(site, ""),
            units.get(site, 0),
        )
        for site in sites
    }


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
        "bytes_sent": closed.sent,
        "seconds": seconds,
        "parent": state_hash(last.state),
        "versions": versions(),
    }
