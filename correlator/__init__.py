"""Batches of records -> delays, paths and windows. Imports only what the stages share."""
