"""The command line: one small file per command. No module here imports torch at module level."""
