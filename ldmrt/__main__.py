"""`python -m ldmrt`."""

from ldmrt.cli import main

if __name__ == "__main__":
    main()
