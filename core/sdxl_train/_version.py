"""The version of sdxl-train, in one place."""

__version__ = "0.1.0"
