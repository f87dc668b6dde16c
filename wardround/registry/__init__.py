"""Checkpoints on disk, and releases in MLflow."""

import os

# MLflow reads it when it is imported, and sends usage data otherwise; it takes DO_NOT_TRACK=1 for a no.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
