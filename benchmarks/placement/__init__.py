"""Placement policies on recorded traces."""
