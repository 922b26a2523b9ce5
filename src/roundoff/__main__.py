"""`python -m roundoff` is `roundoff`."""

from roundoff.cli import main

if __name__ == "__main__":
    main()
