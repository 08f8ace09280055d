"""Counts how often MACE is right: numbered packets, observers independent of MACE, and a score.

    talker.py ──── numbered packets through a lab ────► echo
                      │ inner device      │ outer device
                  observer.py         observer.py      packet sockets with the kernel's stamps: the truth
                      └────────┬──────────┘
    source ──► engine ──► rows ┴──► truth.score: precision, recall, error of the delays

`scenarios` has the table of scenarios; `stream` keeps the records and removes some of them.
"""
