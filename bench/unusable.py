"""The one way in which a benchmark fails."""


class Unusable(Exception):
    """Nothing can be measured; the message says why in one line."""
