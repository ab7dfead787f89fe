"""``python -m megadistill``."""

from megadistill.cli.main import entry

if __name__ == "__main__":
    entry()
