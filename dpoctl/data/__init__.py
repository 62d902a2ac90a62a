"""Data: from any row on disk to verified token spans in a memory-mapped store."""
