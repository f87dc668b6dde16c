"""Keys, certificates and the kits that sites receive."""

from wardround.provision.coordinator import prepare, renew
from wardround.provision.kit import add, answer, lines, provision, revoke, rotate

__all__ = ["add", "answer", "lines", "prepare", "provision", "renew", "revoke", "rotate"]
