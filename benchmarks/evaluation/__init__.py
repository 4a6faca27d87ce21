"""Evaluation with sharded experts against evaluation with whole ones."""
