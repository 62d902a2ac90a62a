"""The command line: one small file per command. Nothing here imports torch at module level."""
