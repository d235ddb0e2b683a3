"""How property-based tests run here: without a deadline, since a busy host is not a bug."""

from hypothesis import settings

settings.register_profile("unit", deadline=None)
settings.load_profile("unit")
