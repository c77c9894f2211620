"""Tracking in MLflow: records of runs on disk, their transfer to MLflow in the background, and the model registry."""
