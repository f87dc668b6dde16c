"""A site: policy, journal, the local round, and the Flower app around them."""
