"""Reference numbers of the published implementation, checked against ours: `sfd verify`.

Each module but `_case` and `_folder` is one kind of case. It says which cases are its own (`claims`, from the contents
of the case's JSON file) and checks them (`check`).
"""

from sfd.verification._case import Row
from sfd.verification._folder import Findings, verify

__all__ = ["Findings", "Row", "verify"]
