"""One run in one folder: loop, state, checkpoints, signals."""
