"""Prometheus metrics of everything that is applied on this host."""
