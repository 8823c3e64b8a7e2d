"""`python -m kvtier`: the command line."""

from kvtier.cli import main

if __name__ == "__main__":
    main()
