"""What `MemoryCheckpoint` takes of a step, and how soon a run goes on after a lost node."""
