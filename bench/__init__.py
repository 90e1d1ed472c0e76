"""Measurements: what orch costs, next to what people do by hand."""
