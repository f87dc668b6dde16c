"""The site's own file, `site.toml`. It never leaves the site."""

import re
import stat
from datetime import time
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from wardround.config.hours import LocalHours, within
from wardround.config.privacy import Delta, Epsilon
from wardround.config.strict import NAMES, Name, Strict, read_toml
from wardround.errors import ConfigError


class ImagesConfig(Strict):
    """Where a site's images lie, and which of them are its own."""

    folder: Path = Field(
        default=Path("dicomweb"),
        description="The folder of images; it is only read. Required, but for dicomweb, which makes it below `work`.",
    )
    kind: Literal["auto", "tree", "labelled", "dicomweb"] = Field(
        default="auto",
        description="tree: every readable file below the folder. labelled: the rows of its labels.csv. "
        "auto: labelled where a labels.csv lies in the folder. dicomweb: what a server of DICOM objects has.",
    )
    url: str | None = Field(
        default=None, description="dicomweb: where its paths begin, such as https://pacs.hospital/dicom-web."
    )
    filters: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{1,64}$")], str] = Field(
        default={},
        description="dicomweb: studies are looked for with these, DICOM keyword = value, such as ModalitiesInStudy = "
        '"CR" or StudyDate = "20200101-".',
    )
    credentials: Path | None = Field(
        default=None,
        description="dicomweb: a file of one line, USER:PASSWORD or Bearer TOKEN, for the server; mode 0600.",
    )
    ca_certificate: Path | None = Field(
        default=None, description="dicomweb: the CA certificate (PEM) of the server, where it is the hospital's own."
    )
    site: str | None = Field(
        default=None, max_length=64, description="labelled: only rows whose column `site` says this."
    )
    splits: tuple[str, ...] = Field(
        default=("train",), min_length=1, description="labelled: only rows whose column `split` is one of these."
    )
    opt_out: Path | None = Field(
        default=None,
        description="A text file with one PatientID a line; their images are left out at every index.",
    )

    @field_validator("url")
    @classmethod
    def _an_address_bears_no_password(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url):
            # Without the value: it may hold a password.
            raise ValueError("is no https://host/path; where it asks who you are, put that into credentials")
        return url

    @model_validator(mode="after")
    def _a_source_has_its_own_keys(self) -> Self:
        if self.kind != "dicomweb":
            if "folder" not in self.model_fields_set:
                raise ValueError("the key 'folder' is missing; add it")
            others = ("url", "filters", "credentials", "ca_certificate")
            if given := [key for key in others if key in self.model_fields_set]:
                raise ValueError(f"{given[0]} is a key of kind = 'dicomweb'; remove it, or change kind")
        elif self.url is None:
            raise ValueError("kind = 'dicomweb' needs the key 'url'; add it")
        elif "folder" in self.model_fields_set:
            raise ValueError("folder: what kind = 'dicomweb' fetches lies below work; remove it")
        elif self.credentials is not None and not self.url.startswith("https:"):
            raise ValueError("credentials would cross in clear; take a url that begins with https:")
        return self


class CoordinatorConfig(Strict):
    """How a site reaches the coordinator, and how it proves who it is."""

    address: str = Field(pattern=r"^[^\s/]+:\d{1,5}$", description="host:port of the coordinator's fleet address.")
    ca_certificate: Path = Field(description="The federation's CA certificate, from the kit (PEM).")
    private_key: Path = Field(description="The site's private key, from the kit (OpenSSH, ECDSA P-384, mode 0600).")
    signing_key: Path = Field(
        description="The coordinator's public key, from the kit (PEM): no message is answered that it did not sign."
    )
    proxy: str | None = Field(
        default=None,
        description="The HTTP proxy of this network, http://host:port. Unset: none; what the environment's HTTPS_PROXY "
        "says does not count.",
    )
    proxy_credentials: Path | None = Field(
        default=None, description="A file of one line, USER:PASSWORD, for the proxy; mode 0600."
    )

    @field_validator("proxy")
    @classmethod
    def _a_proxy_bears_no_password(cls, proxy: str | None) -> str | None:
        if proxy is not None and not re.fullmatch(r"http://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):\d{1,5}", proxy):
            # Without the value: it may hold a password.
            raise ValueError("is no http://host:port; where it asks who you are, put that into proxy_credentials")
        return proxy

    @model_validator(mode="after")
    def _credentials_are_a_proxys(self) -> Self:
        if self.proxy is None and self.proxy_credentials is not None:
            raise ValueError("proxy_credentials is for a proxy; set proxy, or remove it")
        return self


class SitePrivacy(Strict):
    """What a site allows to be spent of its patients' privacy, over all federations that share its ledger."""

    epsilon: Epsilon = Field(description="The ceiling: no round starts that would take the ledger past it.")
    delta: Delta = Field(description="The delta at which the ledger is read; one for all federations.")
    units: int | None = Field(
        default=None,
        ge=1,
        description="The declared number of patients (or images, where they are the unit): a round number that may be "
        "known, below the true one. It sets how often a patient is drawn.",
    )
    ledger: Path | None = Field(
        default=None,
        description="The ledger's file, where the hospital takes part in several federations: all their site.toml name "
        "the same, else each counts alone. Unset: ledger.db in work.",
    )


class ApproveConfig(Strict):
    """Protocols that run without a person's approval; each key must hold. Without the section all wait for a person."""

    methods: tuple[str, ...] = Field(min_length=1, description="[method] names that are allowed, such as mae.")
    units: tuple[Literal["patient", "image", "site", "none"], ...] = Field(
        min_length=1, description="Privacy units that are allowed; none: without differential privacy."
    )
    rounds: int = Field(ge=1, le=100_000, description="Most rounds of a federation.")
    epsilon: Epsilon | None = Field(
        default=None,
        description="The largest epsilon of a federation, over all its rounds; needed with any unit. With unit site, "
        "which no ledger counts: of all federations that run by this rule.",
    )
    delta: Delta = Field(default=1e-5, description="The largest delta at which that epsilon is promised, likewise.")

    @model_validator(mode="after")
    def _a_unit_has_a_ceiling(self) -> Self:
        if self.epsilon is None and set(self.units) != {"none"}:
            raise ValueError("epsilon is missing: units has a privacy unit; set the largest epsilon that is allowed")
        return self


class MinimumConfig(Strict):
    """The least that an update is made of where the coordinator sees it without noise, whoever approved it.

    The fewer images, steps and images a step, the more an update tells of each image. No number makes it safe.
    """

    images: int = Field(default=10, ge=1, le=1_000_000, description="Images at the site.")
    local_steps: int = Field(default=2, ge=1, le=1_000_000, description="Local steps a round.")
    batch_size: int = Field(default=4, ge=1, le=65_536, description="Images a step.")


class AnswersConfig(Strict):
    """Labelled images that a backbone may be probed on here when the coordinator asks; only scores leave.

    Without the section the site answers no such question. Scores bear no noise: with a privacy unit none are given.
    """

    folder: Path = Field(description="A labelled folder: labels.csv with file, label, patient, site, split.")
    label: str = Field(default="label", description="The column that is learnt.")
    site: Name | None = Field(default=None, description="Only rows with this value of the column site.")
    patients: int = Field(
        default=10, ge=2, le=1_000_000, description="Fewest patients of each class among the test images."
    )


class SiteConfig(Strict):
    """Everything one hospital sets for itself."""

    format: Literal[1] = Field(description="The version of this file's format.")
    name: Name = Field(description=f"The site's name in the federation: {NAMES}.")
    images: ImagesConfig = Field(description="The site's images.")
    work: Path = Field(description="A folder for the cache, the journal and the site memory; the only one written.")
    approved: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = Field(
        default=(),
        description="Protocol digests, all 64 digits, that this site agreed to, beside those of `wardround site "
        "approve`; no other is run. What that command took back is not run, though it stands here.",
    )
    approve: ApproveConfig | None = Field(default=None, description="Protocols that need no person's approval.")
    minimum: MinimumConfig = Field(
        default=MinimumConfig(), description="The least that an update is made of, without differential privacy."
    )
    hours: LocalHours | None = Field(
        default=None,
        description="When the site is connected and begins rounds, by this machine's local time, such as 20:00-06:00; "
        "unset: always.",
    )
    bandwidth: float | None = Field(
        default=None,
        ge=1.0,
        le=100_000.0,
        description="Most megabits a second that states and updates take, each way; unset: all there are.",
    )
    evaluation: AnswersConfig | None = Field(
        default=None, description="Labelled images that a backbone may be probed on; unset: none."
    )
    privacy: SitePrivacy | None = Field(
        default=None, description="The site's own limit; without it no round with differential privacy is trained."
    )
    coordinator: CoordinatorConfig | None = Field(
        default=None, description="The connection; absent where all sites run in one process."
    )
    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads for training; 0 means all.")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="cpu, cuda, or cuda:1 and so on; auto takes a GPU where there is one.",
    )
    devices: int = Field(
        default=1, ge=1, le=64, description="GPUs, or processes on CPUs, that share each batch; gradients are the same."
    )
    micro_batch: int = Field(
        default=0, ge=0, le=65_536, description="Images at once on each device; 0 takes as many as memory allows."
    )
    checkpointing: bool = Field(
        default=False, description="Save memory by computing activations again in the backward pass."
    )
    max_trainings_per_round: int = Field(
        default=2, ge=1, le=10, description="How often one round may be trained, restarts after a crash included."
    )

    @model_validator(mode="after")
    def _several_devices_have_no_number(self) -> Self:
        if self.devices > 1 and ":" in self.device:
            raise ValueError(f"device = '{self.device}' is one, and devices = {self.devices}; write device = 'cuda'")
        return self

    def is_open(self, now: time) -> bool:
        """Return whether a moment of the day, in local time, lies within `hours`."""
        return self.hours is None or within(self.hours, now)


def read_site(path: Path) -> SiteConfig:
    """Return a site's file; its relative paths count from the folder that the file lies in. Raises ConfigError."""
    site = read_toml(path, SiteConfig)
    home = path.resolve().parent
    opt_out = site.images.opt_out and home / site.images.opt_out
    fetched = site.images.kind == "dicomweb"
    images = site.images.model_copy(
        update={
            "folder": home / (site.work if fetched else "") / site.images.folder,
            "opt_out": opt_out,
            "credentials": site.images.credentials and home / site.images.credentials,
            "ca_certificate": site.images.ca_certificate and home / site.images.ca_certificate,
        }
    )
    changes: dict[str, object] = {"images": images, "work": home / site.work}
    if site.privacy is not None and site.privacy.ledger is not None:
        changes["privacy"] = site.privacy.model_copy(update={"ledger": home / site.privacy.ledger})
    if site.evaluation is not None:
        changes["evaluation"] = site.evaluation.model_copy(update={"folder": home / site.evaluation.folder})
    if (known := site.coordinator) is not None:
        paths = {"ca_certificate": home / known.ca_certificate, "private_key": home / known.private_key}
        paths["signing_key"] = home / known.signing_key
        if known.proxy_credentials is not None:
            paths["proxy_credentials"] = home / known.proxy_credentials
        changes["coordinator"] = known.model_copy(update=paths)
    return site.model_copy(update=changes)


def read_secret(path: Path) -> str:
    """Return the one line of a file that the site's own account alone can read.

    Raises ConfigError, and quotes nothing of what it holds.
    """
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(f"{path}: other accounts can read it; 'chmod 600' it.")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}; write the one line into it that it is for.") from error
    if not lines[0].strip() or any(map(str.strip, lines[1:])):
        raise ConfigError(f"{path}: holds not one line; write what it is for, and nothing else.")
    return lines[0].strip()


def read_login(path: Path) -> tuple[str, str]:
    """Return the name and the password in a file, USER:PASSWORD. Raises ConfigError, and quotes nothing of them."""
    user, colon, password = read_secret(path).partition(":")
    if not colon:
        raise ConfigError(f"{path}: has no colon; write USER:PASSWORD, and nothing else.")
    return user, password
