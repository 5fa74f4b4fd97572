"""The version of the distribution, in one place: packaging, manifests and the CLI read it here."""

__version__ = "0.1.0"
