"""Metrics on their way to MLflow, which may be slow or away, and the registry of models."""
