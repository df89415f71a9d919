"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# A first call imports and warms up; how long an example takes on a busy machine is no property of the code.
settings.register_profile("sfd", deadline=None)
settings.load_profile("sfd")
