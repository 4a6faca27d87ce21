"""Runs that are killed and resume."""
