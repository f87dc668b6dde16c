"""Configuration: frozen, unknown keys refused, with digests."""

from wardround.config.federation import FederationConfig, Protocol, read_federation
from wardround.config.site import SiteConfig, read_site
from wardround.config.strict import Strict, digest, named, parse, read_toml

__all__ = [
    "FederationConfig",
    "Protocol",
    "SiteConfig",
    "Strict",
    "digest",
    "named",
    "parse",
    "read_federation",
    "read_site",
    "read_toml",
]
