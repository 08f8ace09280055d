"""Correlates batches of records into delays, paths and windows. Imports only `contracts`."""
