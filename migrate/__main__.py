"""`python -m migrate`: the same as the console script `migrate`."""

from migrate.tools.cli import main

if __name__ == "__main__":
    main()
