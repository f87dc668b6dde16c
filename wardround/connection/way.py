"""A site's way to the coordinator: straight, or by the proxy of its file, and never as the environment says."""

import ssl

import httpx

from wardround.config.site import CoordinatorConfig, read_login


def way(found: CoordinatorConfig, timeout: httpx.Timeout | float) -> httpx.Client:
    """Return a client that calls by the site's proxy or by none, and trusts the federation's CA alone; timeout in s.

    It follows no redirection: one address alone was agreed on. Raises ConfigError where the proxy's login cannot be
    read.
    """
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust.load_verify_locations(found.ca_certificate)
    login = read_login(found.proxy_credentials) if found.proxy_credentials else None
    proxy = httpx.Proxy(found.proxy, auth=login) if found.proxy else None
    return httpx.Client(verify=trust, proxy=proxy, trust_env=False, timeout=timeout)
