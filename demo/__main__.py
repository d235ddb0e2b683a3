"""What ``make demo`` runs."""

import signal


def main() -> None:
    """Run the demo."""
    # Whatever our parent ignores or blocks: we wait for children, and can be told to end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # While there is nothing to clean up, Ctrl-C simply ends us: no traceback of half an import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from demo.show import show

    show()


if __name__ == "__main__":
    main()
