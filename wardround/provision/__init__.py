"""Keys, certificates and the kits that sites receive."""

from wardround.provision.kit import provision

__all__ = ["provision"]
