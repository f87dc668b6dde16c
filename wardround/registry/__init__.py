"""Checkpoints on disk, and releases in MLflow."""
