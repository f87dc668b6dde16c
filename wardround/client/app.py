"""The site's end of Flower: a message in, the policy's and the journal's word, an answer out."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_private_key
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from wardround.client import drift, policy
from wardround.client.audit import AuditLog, Exchange, kind_of, protocol_of
from wardround.client.charge import charge
from wardround.client.journal import WRITTEN, Journal
from wardround.client.local_round import local_round
from wardround.client.scoring import refuse_scores, scores
from wardround.config import Protocol, SiteConfig, read_site
from wardround.config.privacy import UnitPrivacyConfig
from wardround.data import open_site
from wardround.errors import BudgetExhausted, DataError, PolicyRefusal, UpdateError, WardroundError
from wardround.signatures import fingerprint
from wardround.ssl.devices import Machine, checked_device
from wardround.update import Refusal, Task, TaskKind, withholds
from wardround.wire import answer_to_records, crossing, records_to_task

log = logging.getLogger(__name__)
app = ClientApp()

# An error's kind decides whether its text may cross: those of images and configs name files of the site.
CODES: dict[type[Exception], str] = {
    PolicyRefusal: "policy",
    BudgetExhausted: "budget",
    UpdateError: "training",
    DataError: "images",
}


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one task with an update or a refusal; nothing that is raised crosses, nor what cannot be logged."""
    return _guarded("task", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Answer one question for scores with them or a refusal, as guarded as an update is."""
    return _guarded("evaluation", message, context)


def _guarded(kind: TaskKind, message: Message, context: Context) -> Message:
    try:
        return _answered(kind, message, read_site(Path(str(context.node_config["site-config"]))))
    except Exception as error:  # Flower's own SuperNode sends the text of what ends its ClientApp
        log.error("no answer: %s", error, exc_info=error)
        raise WardroundError("no answer: the reason stands in the site's own log") from None


def _answered(kind: TaskKind, message: Message, site: SiteConfig) -> Message:
    """Return the answer to one message; both are in the audit log when this returns."""
    own, coordinators = keys(site)
    audit = AuditLog(site.work)
    exchange = Exchange(fingerprint(coordinators) if coordinators else "this process")
    try:
        task = _task(kind, message, site.name, coordinators, audit, exchange)
        answer = ANSWERS[kind](site, task, exchange)
    except (PolicyRefusal, UpdateError) as error:
        log.warning("site '%s' refuses: %s", site.name, error)
        answer = Refusal(CODES[type(error)], str(error))
    except BudgetExhausted as error:  # its text tells what other federations spend here
        log.warning("site '%s' refuses: %s", site.name, error)
        answer = Refusal(CODES[BudgetExhausted], "the site's privacy ledger does not admit this round; see its own log")
    except Exception as error:  # whatever it says may name a file or a patient
        log.warning("site '%s' failed: %s", site.name, error, exc_info=not isinstance(error, WardroundError))
        answer = Refusal(CODES.get(type(error), "failed"), "the reason stands in the site's own log")
    records = answer_to_records(answer, site.name, message.metadata.group_id, own)
    audit.add(exchange.crossing("out", kind_of(answer, exchange), crossing(records)))
    return Message(records, reply_to=message)


def _task(
    kind: TaskKind,
    message: Message,
    site: str,
    key: EllipticCurvePublicKey | None,
    audit: AuditLog,
    exchange: Exchange,
) -> Task:
    """Return the task in a message, logged whether there is one or not. Raises as `records_to_task` does."""
    coordinator, exchange.peer, told = exchange.peer, "", "unreadable"
    try:
        task = records_to_task(message.content, site, key, kind)
        exchange.peer, exchange.round, exchange.protocol, told = coordinator, task.round, protocol_of(task), kind
        return task
    finally:
        exchange.head = audit.add(exchange.crossing("in", told, crossing(message.content)))


def keys(site: SiteConfig) -> tuple[EllipticCurvePrivateKey, EllipticCurvePublicKey] | tuple[None, None]:
    """Return the site's own key and the coordinator's public one; none where all sites run in one process."""
    if site.coordinator is None:
        return None, None
    own = load_ssh_private_key(site.coordinator.private_key.read_bytes(), None)
    coordinators = load_pem_public_key(site.coordinator.signing_key.read_bytes())
    assert isinstance(own, EllipticCurvePrivateKey) and isinstance(coordinators, EllipticCurvePublicKey)
    return own, coordinators


def run_task(site: SiteConfig, task: Task, exchange: Exchange | None = None) -> bytes | Refusal:
    """Return the bytes of this site's update: replayed where the round is done, trained where not.

    What the audit log tells of the answer is filled into `exchange`. A refusal where the task holds a step and
    this site lacks the state that the step starts from.
    """
    exchange = exchange or Exchange("this process")
    protocol = policy.agreed_protocol(site, task)
    journal = Journal(site.work, protocol.digest(), site.max_trainings_per_round)
    steps = protocol.encoding != "float32"  # a step of float32 has as many bytes as a state
    held = journal.held(protocol.encoding) if steps else None
    start = policy.checked_state(protocol, task, held)
    if start is None:
        return Refusal("state", "it does not hold the state that the step starts from")
    done = journal.replay(task.round, start.hash)
    if done is not None:
        exchange.kind = "replay"
        return done
    if protocol.privacy.unit == "site" and journal.released(task.round):
        raise PolicyRefusal(f"round {task.round} was released from another state already, and its noise pays for once.")
    if steps and start is not held:
        journal.hold(start)
    start, held = start._replace(step=None), None  # not in memory while it trains
    with _own_affair(protocol):
        images = open_site(site, protocol.data)
        policy.refuse_few(site, protocol, images.num_images)
        level = drift.measured(site, protocol, start.state, images, machine(site))
    memory = journal.memory(task.last_folded)
    if memory is None:
        log.warning("site '%s': the site memory of round %d is lost; it starts anew", site.name, task.last_folded)
        memory = {}
    journal.check_room(WRITTEN * sum(array.nbytes for array in start.state.values()))
    with journal.training(task.round):
        private = isinstance(protocol.privacy, UnitPrivacyConfig)
        charged = charge(site, protocol, task) if private else None
        exchange.epsilon = charged.epsilon if charged else None
    midway = None if private else journal.midway(task.round)  # noise once drawn is not kept to be drawn upon
    with _own_affair(protocol):
        update, memory = local_round(
            protocol, site.name, task.round, start, memory, images, machine(site), charged, midway
        )
    told = None if withholds(protocol.privacy) else level
    update = replace(update, declared=replace(update.declared, audit=exchange.head, drift=told))
    block = update.to_bytes()
    journal.finish(task.round, block, memory, task.last_folded)
    return block


def run_evaluation(site: SiteConfig, task: Task, exchange: Exchange) -> bytes:
    """Return the bytes of this site's scores of a task's state."""
    exchange.kind = "scores"
    protocol = policy.agreed_protocol(site, task)
    refuse_scores(site, protocol)
    start = policy.checked_state(protocol, task)
    assert start is not None, "an evaluation holds the whole state"
    return scores(site, protocol, start.state, machine(site).device).to_bytes()


ANSWERS: dict[TaskKind, Callable[[SiteConfig, Task, Exchange], bytes | Refusal]] = {
    "task": run_task,
    "evaluation": run_evaluation,
}


@contextmanager
def _own_affair(protocol: Protocol) -> Iterator[None]:
    """Let what ails images or training cross as a bare failure where privacy withholds what is measured of them."""
    try:
        yield
    except (DataError, UpdateError) as error:
        if withholds(protocol.privacy):
            raise WardroundError(str(error)) from error
        raise


def machine(site: SiteConfig) -> Machine:
    """Return the hardware that the site allows. Raises ConfigError where it is not here."""
    device = site.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = checked_device(device, site.devices)
    return Machine(device, site.devices, site.threads, site.micro_batch, site.checkpointing)
