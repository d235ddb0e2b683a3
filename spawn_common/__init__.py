"""Ground floor of the suite: what both daemons need and nothing that only one of them needs."""
