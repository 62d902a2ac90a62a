"""Models and tokenizers: loading them, and what an architecture can do."""
