"""What ``make demo`` runs."""

import signal


def main() -> None:
    """Run the demo."""
    # While there is nothing to clean up, Ctrl-C simply ends us: no traceback of half an import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from demo.show import show

    show()


if __name__ == "__main__":
    main()
