"""`python -P -m slimbench`: the command line."""

from slimbench.harness.cli.main import main

if __name__ == "__main__":
    main()
