"""Ground floor of the suite: what both daemons need and nothing that only one of them needs."""

from typing import Final

VERSION: Final = "1.0.0"
