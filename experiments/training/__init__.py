"""Training: losses, precision, the step, the program, the loop, and how they run in parallel."""
