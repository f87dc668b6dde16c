"""Flower's own connections, held by our own processes: the one place that leans on Flower's internals.

Flower starts a new Python, which imports torch, for every message of a site, and runs whatever code
the coordinator's bundle holds. Here a site keeps one process, and asks for no bundle: no code from the
coordinator is ever fetched. The coordinator's rounds run in a process of ours, too, no child of SuperLink's.
The protocol on the wire, its keys and its TLS are Flower's, so that a stock `flower-supernode` still joins.
`tests/test_connection.py` names what is leant on; flwr is pinned.
"""
