"""A plugin of pytest for `make test`: a law holds however long it takes to try; a busy machine breaks none.

A plugin for the same reason as tests/quick.py.
"""

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
