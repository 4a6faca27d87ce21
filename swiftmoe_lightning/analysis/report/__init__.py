"""Pictures of a run; they change nothing."""
