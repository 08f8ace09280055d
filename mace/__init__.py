"""MACE: what did a container's virtual network devices add to a packet, device by device?

The package holds what the stages share (records, hooks, rows, ledger, wire) and what composes them (pipeline,
command line, lab). The stages are `collector`, `correlator` and `storage`.
"""

__version__ = "0.1.0"
