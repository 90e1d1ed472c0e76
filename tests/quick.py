"""A plugin of pytest for `make check`: fewer examples of each law. `make test` takes the usual hundred.

A plugin, because whoever imports hypothesis without need pays for it: a guest of the lab, ten seconds.
"""

from hypothesis import settings

settings.register_profile("quick", max_examples=25, deadline=None)
settings.load_profile("quick")
