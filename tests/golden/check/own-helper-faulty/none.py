"""No helper in here."""
