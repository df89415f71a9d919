"""`python -m sfd` is the command `sfd`."""

from sfd.cli.main import main

if __name__ == "__main__":
    main()
