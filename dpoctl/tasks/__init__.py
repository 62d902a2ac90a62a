"""What the commands do: each task picks a loss and wires the core together."""
