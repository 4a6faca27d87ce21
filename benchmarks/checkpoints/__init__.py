"""Saving and loading checkpoints, against torch and Lightning."""
