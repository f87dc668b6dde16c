"""The site's own file, `site.toml`. It never leaves the site."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from wardround.config.privacy import Delta, Epsilon
from wardround.config.strict import Name, Strict, read_toml


class ImagesConfig(Strict):
    """Where a site's images lie, and which of them are its own."""

    folder: Path = Field(description="The folder of images; it is only read.")
    kind: Literal["auto", "tree", "labelled"] = Field(
        default="auto",
        description="tree: every readable file below the folder. labelled: the rows of its labels.csv. "
        "auto: labelled where a labels.csv lies in the folder.",
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


class CoordinatorConfig(Strict):
    """How a site reaches the coordinator, and how it proves who it is."""

    address: str = Field(pattern=r"^[^\s/]+:\d{1,5}$", description="host:port of the coordinator's fleet address.")
    ca_certificate: Path = Field(description="The federation's CA certificate, from the kit (PEM).")
    private_key: Path = Field(description="The site's private key, from the kit (OpenSSH, ECDSA P-384, mode 0600).")
    signing_key: Path = Field(
        description="The coordinator's public key, from the kit (PEM): no message is answered that it did not sign."
    )


class SitePrivacy(Strict):
    """What a site allows to be spent of its patients' privacy, over all federations."""

    epsilon: Epsilon = Field(description="The ceiling: no round starts that would take the ledger past it.")
    delta: Delta = Field(description="The delta at which the ledger is read; one for all federations.")
    units: int | None = Field(
        default=None,
        ge=1,
        description="The declared number of patients (or images, where they are the unit): a round number that may be "
        "known, below the true one. It sets how often a patient is drawn.",
    )


class SiteConfig(Strict):
    """Everything one hospital sets for itself."""

    format: Literal[1] = Field(description="The version of this file's format.")
    name: Name = Field(description="The site's name in the federation.")
    images: ImagesConfig = Field(description="The site's images.")
    work: Path = Field(description="A folder for the cache, the journal and the site memory; the only one written.")
    approved: tuple[str, ...] = Field(
        default=(), description="Protocol digests that this site agreed to; no other is run."
    )
    privacy: SitePrivacy | None = Field(
        default=None, description="The site's own limit; without it no round with differential privacy is trained."
    )
    coordinator: CoordinatorConfig | None = Field(
        default=None, description="The connection; absent where all sites run in one process."
    )
    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads for training; 0 means all.")
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto takes a GPU where there is one."
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


def read_site(path: Path) -> SiteConfig:
    """Return a site's file; its relative paths count from the folder that the file lies in. Raises ConfigError."""
    site = read_toml(path, SiteConfig)
    home = path.resolve().parent
    opt_out = site.images.opt_out and home / site.images.opt_out
    images = site.images.model_copy(update={"folder": home / site.images.folder, "opt_out": opt_out})
    changes: dict[str, object] = {"images": images, "work": home / site.work}
    if (known := site.coordinator) is not None:
        paths = {"ca_certificate": home / known.ca_certificate, "private_key": home / known.private_key}
        paths["signing_key"] = home / known.signing_key
        changes["coordinator"] = known.model_copy(update=paths)
    return site.model_copy(update=changes)
