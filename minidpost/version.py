"""The version, in a module of its own so that the build and every other module can read it."""

__version__ = "0.4.0"
