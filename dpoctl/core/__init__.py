"""The shared core: plan, batch, log-probabilities, losses, loop."""
