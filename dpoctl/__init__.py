"""Fine-tune language models on demonstrations and preferences, from YAML recipes."""

__version__ = "0.1.0"
