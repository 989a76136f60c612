"""What is true of every batch and object, and who is at it; the only SQL.

The ledger is the queue: bounded by disk, ordered by due time, shared by several daemons, there after a crash. State says
what is true of the data; a claim says who is at it. One class in layers, a file for each of those who use it: the watcher
(`watching`), workers (`claiming`), a walk (`walking`), cleanup (`clearing`), the settler (`settling`), a rebuild
(`rebuilding`), people and programs (`looking`). Below them the `database`, its `schema`, and the `file` that it lies in.
"""

from spoold.ledger.clearing import Aside, Clearance, Proof, ReplacedKey
from spoold.ledger.looking import STATES, TROUBLE, Looking
from spoold.ledger.rebuilding import Found
from spoold.ledger.settling import OpenUpload, Overwritten
from spoold.ledger.watching import Known


class Ledger(Looking):
    """All verbs of the ledger."""


__all__ = [
    "STATES", "TROUBLE", "Aside", "Clearance", "Found", "Known", "Ledger", "OpenUpload", "Overwritten", "Proof", "ReplacedKey",
]  # fmt: skip
