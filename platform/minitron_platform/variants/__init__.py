"""Variants of students: models that other tools have aligned or quantised, registered with what they were made from."""
