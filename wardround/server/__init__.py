"""The coordinator: rounds, cohort, aggregation, and the Flower app around them."""
