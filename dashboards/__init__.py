"""Grafana dashboards as code: `python -m dashboards` writes dashboards/json/, which Grafana reads as it is.

    query.py     InfluxQL in the words of the catalogue (`contracts.metrics`)
    panels.py    what all dashboards share: variables, the ledger that stands first, kinds of panels
    the others   one dashboard each: `make()` gives it

A test makes them anew and compares, holds every field and tag to the catalogue, and runs every query against a real
InfluxDB. dashboards/README.md says what each number means and how two of them may be put together.
"""
