"""orch: one profile, and the connection tracking helpers of a network namespace are registered, attached and served."""

__version__ = "0.1.0"
