"""The bill of materials of a release, in CycloneDX: the packages that were installed where it was made."""

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from wardround.registry.versions import installed

SBOM = "sbom.cdx.json"


def bill_of_materials(name: str, round: int, weights: str) -> str:
    """Return the bill of a released round, whose weights have this SHA-256, as JSON of CycloneDX 1.6."""
    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=name,
        version=f"round {round}",
        bom_ref=f"{name}@{round}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=weights)],
    )
    packages = [
        Component(type=ComponentType.LIBRARY, name=package, version=version, bom_ref=str(url), purl=url)
        for package, version in installed()
        for url in [PackageURL("pypi", name=package, version=version)]
    ]
    bill = Bom(components=packages)
    bill.metadata.component = model
    bill.register_dependency(model, packages)
    return str(JsonV1Dot6(bill).output_as_string(indent=2))
