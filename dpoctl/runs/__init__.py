"""The run directory: what is written while a run goes on, and how it is found again."""
