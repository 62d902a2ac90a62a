"""The run directory: everything that a run writes, and how it is read again."""
