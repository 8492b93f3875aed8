"""A GPT to read in an evening: start with model.py."""

__version__ = "3.0.0"
