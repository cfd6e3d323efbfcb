"""Privacy-preserving image registration for DIPY."""

__version__ = "0.1.0.dev0"
