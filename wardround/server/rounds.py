"""The durable loop over rounds. It knows nothing of Flower: how sites are asked is handed in.

Every step is on disk before the next one begins, so the loop may be killed anywhere and started
again: a committed round is never repeated, an open one keeps what has arrived, a closed one is
folded as it was decided.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from wardround.config.federation import Encoding
from wardround.config.privacy import SitePrivacyConfig, UnitPrivacyConfig
from wardround.encoding import (
    check_encoded,
    compress,
    compressed_file,
    encode,
    encoded_layout,
    inflate,
    keep,
    residual_layout,
    residual_of,
    stepped,
)
from wardround.errors import UpdateError
from wardround.privacy import site_level
from wardround.registry import checkpoint
from wardround.registry.checkpoint import SERVER, STATE, STEP, Checkpoint, Draft
from wardround.registry.versions import versions
from wardround.server import cohort
from wardround.server.aggregate import Read, fold, next_variates, variates_layout, with_variates
from wardround.server.optimisers import kinds
from wardround.server.robust import folded
from wardround.server.run_folder import RunFolder, reread
from wardround.server.spool import Closed, Spool
from wardround.update import (
    Array,
    Declared,
    Layout,
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


# Returns the decision on an open round of a run, from the checkpoint before it.
Gather = Callable[[RunFolder, Checkpoint, Spool, int], Closed]


@dataclass
class Tally:
    """What has come of an open round beside the updates that are spooled, by site."""

    refused: dict[str, Refusal] = field(default_factory=dict)
    ledgers: dict[str, str] = field(default_factory=dict)  # heads that came with refused updates
    received: dict[str, int] = field(default_factory=dict)  # bytes as they crossed
    sent: int = 0


def run_rounds(run: RunFolder, ask: Ask, committed: Callable[[int], None], fill: Gather | None = None) -> None:
    """Train until the last round is committed; `committed` is called after each commit.

    `ask` asks the sites of a round that waits for them; `fill` gathers those of [membership] buffer (see buffer.py).
    """
    for number in run.committed():
        Spool(run.round(number)).drop_updates()  # a kill may have come between a commit and this
    last = run.newest()
    done = last.round
    todo = range(done + 1, run.config.training.rounds + 1)
    for number in tqdm(todo, "rounds", initial=done, total=run.config.training.rounds, unit="round", disable=None):
        gather = partial(collect, ask=ask) if run.config.membership.buffer is None else fill
        assert gather is not None, "who has a buffer says how it is filled"
        last = run_round(run, last, number, gather)
        committed(number)
        run = reread(run)  # who takes part may have changed


def run_round(run: RunFolder, last: Checkpoint, number: int, gather: Gather) -> Checkpoint:
    """Gather, close, fold and commit one round, from wherever an earlier try left it."""
    started = time.monotonic()  # a clock that is set meanwhile makes no round shorter than nothing
    spool = Spool(run.round(number))
    closed = spool.closed() or gather(run, last, spool, number)
    fresh = cohort.weights(run.config, closed.declared)
    weights: Mapping[str, float] = {
        site: one * cohort.freshness(run.config, number - closed.rounds[site]) for site, one in fresh.items()
    }
    with spool.reader(closed) as read:
        share = sum(weights.values()) / sum(fresh.values())
        draft, weights = next_state(run, last, read, weights, share)
        record = partial(_record, run, closed, weights, last, started)
        new = checkpoint.write(run.round(number) / "checkpoint", number, run.digest, draft, record)
    spool.drop_updates()
    return new


def next_state(
    run: RunFolder, last: Checkpoint, read: Read, weights: Mapping[str, float], share: float
) -> tuple[Draft, Mapping[str, float]]:
    """Return the checkpoint after a round, made tensor by tensor as it is written, and the weights of who counts.

    `share` is what staleness leaves of the weights' sum, and so of the mean: FedBuff divides by the buffer's
    size, whatever is in it (Nguyen et al. 2022, arXiv:2106.06639, Algorithm 1).
    Where a site is the privacy unit and the server adds the noise, it is fresh at every call: only what
    the commit's rename publishes may be seen.
    """
    config, privacy, rounds = run.config.aggregation, run.config.privacy, run.config.training.rounds
    if isinstance(privacy, SitePrivacyConfig) and privacy.noise == "server":
        clip = float(last.server.get(site_level.CLIP, np.float64(privacy.clip)))
        noisy, clip = site_level.noisy_mean(read, weights, last.state, privacy, rounds, clip)
        return draft(run, last, noisy, {site_level.CLIP: np.array(clip)}.items()), weights
    delta, counted = folded(read, weights, last.state.layout, config)
    if isinstance(privacy, SitePrivacyConfig):
        share *= len(weights) / privacy.cohort  # the mean over the declared cohort
    beside: Iterable[tuple[str, Array]] = ()
    if scaffold(run):
        beside = next_variates(read, weights, len(run.members), last.state, last.server)
    return draft(run, last, lambda name: share * delta(name), beside), counted


def draft(
    run: RunFolder, last: Checkpoint, delta: Callable[[str], Array], beside: Iterable[tuple[str, Array]]
) -> Draft:
    """Return the checkpoint after the last one, from one tensor's folded delta at a time.

    The server's tensors are its optimiser's, the residual of what it sends and those in `beside`.
    """
    kind, config, shapes = run.protocol.encoding, run.config.aggregation, last.state.layout

    def tensors() -> Iterator[tuple[str, str, Array]]:
        for name in sorted(shapes):
            old = last.state[name]
            aim, kept = fold(name, old, last.server, delta(name), config)
            new, lost, coded = publish(kind, name, old, aim, residual_of(last.server, name))
            yield STATE, name, new
            yield from ((SERVER, *one) for one in (kept | lost).items())
            yield from ((STEP, *one) for one in coded.items())
        yield from ((SERVER, *one) for one in beside)

    server: Layout = {f"{kept}{name}": (shapes[name][0], "float32") for name in shapes for kept in kinds(config)}
    if kind != "float32":
        server |= residual_layout(shapes)
    if scaffold(run):
        server |= variates_layout(shapes)
    if isinstance(run.config.privacy, SitePrivacyConfig) and run.config.privacy.noise == "server":
        server[site_level.CLIP] = ((), "float64")
    step = {STEP: encoded_layout(shapes, kind)} if kind != "float32" else {}
    return Draft({STATE: shapes, SERVER: server, **step}, tensors())


def scaffold(run: RunFolder) -> bool:
    """Return whether control variates cross beside the state."""
    return run.config.training.correction.name == "scaffold"


def outgoing(run: RunFolder, last: Checkpoint) -> tuple[Layout, str]:
    """Return the layout of the tensors that sites start from, and their hash."""
    if scaffold(run):
        state = with_variates(last.state, last.server)
        return layout(state), state_hash(state)
    return last.state.layout, last.hash


def publish(kind: Encoding, name: str, old: Array, aim: Array, residual: State) -> tuple[Array, State, State]:
    """Return one tensor of the state to commit, its next residual for the server, and the encoded step to it.

    What is committed is what a site gets that adds the step to the state before. A float32 step would cost
    as much as the state itself, and none is made.
    """
    if kind == "float32":
        return aim, {}, {}
    coded, lost = encode({name: aim - old}, kind, residual)
    return stepped({name: old}, coded, kind)[name], keep(lost), coded


def collect(run: RunFolder, last: Checkpoint, spool: Spool, number: int, ask: Ask) -> Closed:
    """Return the decision on a round: ask whoever has not answered, check and keep what comes, close."""
    asked = spool.cohort()
    if asked is None:
        asked = dict.fromkeys(cohort.choose(run.config, list(run.members), number), number)
        spool.open(asked)
    missing = sorted(set(asked) - set(spool.arrived()))
    tally, (shapes, start) = Tally(), outgoing(run, last)
    for whole in (False, True):  # who lacks the state that its step starts from is asked again with the whole one
        tasks = tasks_of(run, last, number, missing, whole)
        missing = []
        tally.sent += sum(len(task.state) for task in tasks.values())
        for site, answer in ask(tasks) if tasks else ():
            take(run, spool, tally, site, number, shapes, start, answer)
            if isinstance(answer, Refusal) and answer.code == "state" and not whole:
                missing.append(site)
    exhausted = sum(refusal.code == "budget" for refusal in tally.refused.values())  # they will not come back
    left = [site for site in asked if site not in tally.refused or tally.refused[site].code != "revoked"]
    needed = cohort.enough(run.config, left, exhausted)
    if len(spool.arrived()) < needed:
        raise too_few(number, spool, len(asked), needed, tally.refused)
    return spool.close(tally.refused, tally.ledgers, tally.received, tally.sent)


def take(
    run: RunFolder,
    spool: Spool,
    tally: Tally,
    site: str,
    number: int,
    shapes: Layout,
    start: str,
    answer: bytes | Refusal,
) -> None:
    """Spool a site's update of the round that it was asked in, from the state of hash `start`; or note why not."""
    if isinstance(answer, Refusal):
        tally.refused[site] = answer.shown()
        return
    tally.received[site] = len(answer)
    try:
        spool.add(site, check_update(run, site, number, shapes, start, answer))
        tally.refused.pop(site, None)
    except UpdateError as error:
        # What was found is quoted as the site wrote it: names of tensors, values of the header.
        tally.refused[site] = Refusal("invalid", str(error)).shown()
        tally.ledgers |= ledger_of(run, site, shapes, answer)


def too_few(number: int, spool: Spool, asked: int, needed: int, refused: Mapping[str, Refusal]) -> UpdateError:
    """Return the error of a round that cannot be closed, with each site's reason."""
    reasons = "; ".join(f"'{site}' {refused[site].code}: {refused[site].text.rstrip('.')}" for site in sorted(refused))
    return UpdateError(
        f"round {number}: {len(spool.arrived())} of {asked} sites gave an update, {needed} are needed. "
        f"{reasons}. What arrived is kept; start the same command again to ask the others anew."
    )


def check_update(run: RunFolder, site: str, number: int, shapes: Layout, start: str, answer: bytes) -> bytes:
    """Return the block in an answer, to be spooled.

    Raises UpdateError unless it is this site's update, of this round, from the state of this hash, and sound.
    """
    kind = run.protocol.encoding
    block = inflate(answer, shapes, kind, f"site '{site}': its update")
    update = Update.from_bytes(block)
    expected = {"site": site, "protocol": run.digest, "round": number, "state": start, "encoding": kind}
    for name, value in expected.items():
        if (found := getattr(update, name)) != value:
            raise UpdateError(
                f"site '{site}': its update says {name} {str(found)[:16]}, expected {str(value)[:16]}. "
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


def ledger_of(run: RunFolder, site: str, shapes: Layout, answer: bytes) -> dict[str, str]:
    """Return the ledger's head in a refused update by its site; empty where none can be read."""
    try:
        head = Update.from_bytes(inflate(answer, shapes, run.protocol.encoding, "")).declared.ledger
    except UpdateError:
        return {}
    return {} if head is None else {site: head}


def tasks_of(run: RunFolder, last: Checkpoint, number: int, sites: list[str], whole: bool) -> dict[str, Task]:
    """Return each site's task; those with the whole state share one block of bytes, those with a step another.

    Whose update was folded in the last round began it from the state that the step starts from.
    """
    protocol = json.dumps(run.protocol.model_dump(mode="json"), sort_keys=True)
    folded, ledgers = last.record.get("last_folded", {}), last.record.get("ledgers", {})
    near = [site for site in sites if last.step and folded.get(site) == last.round and not whole]
    step = state = b""
    if near:
        step = compress(pack(last.step, {"from": last.record["parent"], "to": last.hash}))
    if len(near) < len(sites):
        state = whole_state(run, last)
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


def whole_state(run: RunFolder, last: Checkpoint) -> bytes:
    """Return the block of all that sites start from, compressed; without control variates it is the state's file."""
    if scaffold(run):
        return compress(pack(with_variates(last.state, last.server), {}))
    return compressed_file(last.state.path)


def newest_heads(seen: Mapping[str, str], came: Mapping[str, str]) -> dict[str, str]:
    """Return each site's longest ledger: lengths only grow, and a shorter one is a restored copy."""
    heads = dict(seen)
    for site, head in came.items():
        heads[site] = max(heads.get(site, head), head, key=lambda one: int(one.partition(":")[0]))
    return heads


def _record(
    run: RunFolder, closed: Closed, weights: Mapping[str, float], last: Checkpoint, started: float
) -> dict[str, Any]:
    """Return what the manifest tells a person about the round, which is over now."""
    total = sum(weights.values())
    number = last.round + 1
    return {
        "sites": {
            site: {**vars(value), "weight": weights.get(site, 0.0) / total} for site, value in closed.declared.items()
        },
        "refused": closed.refused,
        "last_folded": {**last.record.get("last_folded", {}), **closed.rounds},
        "base_rounds": closed.rounds,
        "staleness": {site: number - round for site, round in closed.rounds.items()},
        "training": closed.training,
        "dropped": closed.dropped,
        "ledgers": newest_heads(last.record.get("ledgers", {}), closed.ledgers),
        "bytes_received": closed.bytes,
        "received": closed.received,
        "bytes_sent": closed.sent,
        "seconds": time.monotonic() - started,
        "parent": last.hash,
        "versions": versions(),
    }
