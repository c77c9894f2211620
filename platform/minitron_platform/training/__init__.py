"""Trainings on Ray Train: the workers, their events, and the training curve."""
