"""The accessory daemon: named namespaces for process spawners."""
