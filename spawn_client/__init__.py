"""For those who ask: a client of the accessory, as a library and as a command."""
