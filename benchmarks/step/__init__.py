"""The training step: what a new placement in every step costs, its bytes, and the optimizer's update."""
