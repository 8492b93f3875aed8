"""A GPT to read in one sitting: start with model.py."""

__version__ = "2.0.0"
