"""A whole federation in one process: production's ServerApp and ClientApp over a Grid of ten lines."""

import json
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from wardround.client.app import app as client_app
from wardround.config import FederationConfig, read_site
from wardround.config.privacy import UnitPrivacyConfig
from wardround.config.strict import NAME, NAMES
from wardround.data import SiteImages, labelled_sites, open_site
from wardround.errors import ConfigError, DataError
from wardround.plan import Plan, resolve
from wardround.probe.site_scores import Asked
from wardround.registry.durable import write_file
from wardround.server import scoring
from wardround.server.app import Fleet
from wardround.server.app import app as server_app
from wardround.server.membership import read_members
from wardround.server.run_folder import RunFolder, check_owner, create

Answer = Callable[[Message, Context], Message]


def index_sites(config: FederationConfig, data: Path, out: Path, threads: int = 0) -> dict[str, SiteImages]:
    """Return the images of every site of a folder, indexed and decoded, so that bad input shows before training.

    `data` is a labelled folder (labels.csv, its `site` column) or a folder with one folder a site.
    Each site gets a `site.toml` and a work folder below `out/sites/`, as it would have at home.
    """
    files = _write_sites(config, resolve(config), data, out, threads)
    sites = (read_site(path) for path in files.values())
    return {site.name: open_site(site, config.data) for site in sites}


def simulate(
    config: FederationConfig, data: Path, out: Path, tracking: str, threads: int = 0, client: Answer = client_app
) -> RunFolder:
    """Run a federation over the sites of a folder (see `index_sites`), or go on where an earlier call stopped.

    `client` answers for every site; who measures what absent sites cost puts another one in its place.
    """
    plan = resolve(config)
    files = _write_sites(config, plan, data, out, threads)
    run = create(out, plan, {site: f"in-process:{site}" for site in files}, tracking)
    grid = InProcessGrid(client, files)
    server_app(grid, Context(1, 0, {}, RecordDict(), {"run-folder": str(out.resolve())}))
    return run


def ask_sites(run: RunFolder) -> Asked:
    """Ask the sites of a run that was simulated for their scores of its newest state.

    Raises ConfigError for a run of a network, whose sites this process does not have.
    """
    files = {site: run.path / "sites" / site / "site.toml" for site in run.members}
    if lacking := sorted(site for site, path in files.items() if not path.exists()):
        raise ConfigError(
            f"{run.path}: site '{lacking[0]}' is not of this process; give --kit, the coordinator's folder."
        )
    return scoring.ask_sites(run, Fleet(InProcessGrid(client_app, files), run, None).ask)


def choose_sites(config: FederationConfig, data: Path) -> list[str]:
    """Return the sites of a folder that take part. Raises DataError or ConfigError where there are none."""
    if not data.is_dir():
        raise DataError(f"{data}: is no folder; give --data the folder of a labels.csv, or one with a folder a site.")
    found = labelled_sites(data) if _labelled(data) else _folders(data)
    if not found:
        raise DataError(f"{data}: has neither a labels.csv nor a folder a site; nothing to train on.")
    if missing := sorted(config.membership.sites.keys() - set(found)):
        raise ConfigError(f"[membership] sites: '{missing[0]}' is not in {data}, which has {', '.join(found)}.")
    taking_part = sorted(config.membership.sites) or found
    if wrong := [site for site in taking_part if not re.match(NAME, site)]:
        raise DataError(f"{data}: '{wrong[0]}' cannot be a site's name: expected {NAMES}. Rename it there.")
    return taking_part


def _folders(data: Path) -> list[str]:
    """Return the names of the folders in a folder, but hidden ones."""
    return sorted(path.name for path in data.iterdir() if path.is_dir() and not path.name.startswith("."))


def _write_sites(config: FederationConfig, plan: Plan, data: Path, out: Path, threads: int) -> dict[str, Path]:
    """Return the `site.toml` of each site that takes part."""
    sites = choose_sites(config, data)
    check_owner(out, plan)
    members = out / "members.json"
    if members.exists() and read_members(members).version > 0:
        raise ConfigError(
            f"run folder {out}: is of a network, whose sites are not in this process; give another --out, or go on "
            "with 'wardround coordinate'."
        )
    return {site: _write_site(out / "sites" / site, site, data, plan, threads) for site in sites}


def _write_site(folder: Path, site: str, data: Path, plan: Plan, threads: int) -> Path:
    """Write the `site.toml` of a site of this process, which approves just this protocol."""
    text = json.dumps  # a JSON string is a TOML string
    lent = ""
    images = f"folder = {text(str((data if _labelled(data) else data / site).resolve()))}\n"
    if _labelled(data):
        images += f'kind = "labelled"\nsite = {text(site)}\n'
        lent = f"\n[evaluation]\nfolder = {text(str(data.resolve()))}\nsite = {text(site)}\npatients = 2\n"
    path = folder / "site.toml"
    content = (
        f"format = 1\nname = {text(site)}\nwork = {text(str(folder.resolve()))}\napproved = [{text(plan.digest)}]\n"
        f"threads = {threads}\n\n[images]\n{images}{lent}{_terms(plan.config, site)}\n"
        "[minimum]  # none: whoever has all sites' images in one place sees them anyway\n"
        "images = 1\nlocal_steps = 1\nbatch_size = 1\n"
    )
    write_file(path, content.encode())
    return path


def _terms(config: FederationConfig, site: str) -> str:
    """Return the [privacy] section of a site of this process: its declared units, and room for rounds trained twice."""
    privacy = config.privacy
    if not isinstance(privacy, UnitPrivacyConfig):
        return ""
    if site not in config.membership.units:
        raise ConfigError(
            f"[membership] units: no declared number of {privacy.unit}s for '{site}'; add one, a round number below "
            "the true one."
        )
    units = config.membership.units[site]
    return f"\n[privacy]\nepsilon = {min(2 * privacy.epsilon, 1000.0)}\ndelta = {privacy.delta}\nunits = {units}\n"


def _labelled(data: Path) -> bool:
    return (data / "labels.csv").exists()


class InProcessGrid(Grid):
    """Flower's Grid without a network: a message is answered when its reply is asked for.

    Contents are not copied: what wire.py sends are immutable bytes.
    """

    def __init__(self, client: Answer, files: dict[str, Path]) -> None:
        self.client = client
        self.files = {number: (site, path) for number, (site, path) in enumerate(sorted(files.items()), start=1)}
        self.waiting: dict[str, Message] = {}
        # Flower's Message asks for the identity of the task that it is made in.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return every site; the name stands in for the public key of a real connection."""
        return [NodeInfo(node_id=n, public_key=f"in-process:{site}".encode()) for n, (site, _) in self.files.items()]

    def get_node_ids(self) -> Iterable[int]:
        """Return the number of every site."""
        return list(self.files)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are asked for."""
        made = {uuid.uuid4().hex: message for message in messages}
        for message_id, message in made.items():
            message.metadata.__dict__["_message_id"] = message_id
        self.waiting.update(made)
        return list(made)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the client for each message, one after the other."""
        return [self._answer(self.waiting.pop(message_id)) for message_id in message_ids]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = Context(1, node, {"site-config": str(self.files[node][1])}, RecordDict(), {})
        return self.client(message, context)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send and answer at once."""
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message, as the deprecated call of Flower's Grid does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
