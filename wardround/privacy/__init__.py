"""Differential privacy: the private gradient engines, noise, accounting and the site's ledger."""
