"""What placement policies would have done with a recorded trace. Numpy only, no processes."""
