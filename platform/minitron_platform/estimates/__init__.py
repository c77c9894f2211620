"""Estimates of compute, disk and memory, from shapes and settings alone."""
