"""`python -m heretic` is the command `heretic`."""

from heretic.cli.main import main

if __name__ == "__main__":
    main()
