"""What tests found and a person wants to see, by title; printed below the results."""

from __future__ import annotations

REPORTS: dict[str, list[str]] = {}
