"""`python -m cidfs` is the command line."""

from cidfs.cli.main import run

if __name__ == "__main__":
    run()
