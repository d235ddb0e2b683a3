"""What a Lua script can use, one module for each name that it sees."""
