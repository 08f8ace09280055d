"""Kernel, file or network -> batches of records. Imports only what the stages share."""
