"""The command `sfd`."""
