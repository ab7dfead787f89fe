"""Training: one step, the loop around it, and what both are made of."""
