"""How often is MACE right? Traffic whose packets are numbered, a witness that knows nothing of MACE, and the score.

    talker.py ──── numbered packets through a lab ────► echo
                      │ inner device      │ outer device
                  observer.py         observer.py      packet sockets with the kernel's stamps: the truth
                      └────────┬──────────┘
    source ──► engine ──► rows ┴──► truth.score: precision, recall, error of the delays

`scenarios` has the table of what is tried, `stream` the records and how some of them are taken away.
"""
