"""Grafana dashboards as code: `python -m dashboards` writes dashboards/json/, which Grafana provisions.

    query.py     InfluxQL with the names of the catalogue (`contracts.metrics`)
    panels.py    parts that all dashboards share: variables, the ledger panels at the top, kinds of panels
    the others   one dashboard each, returned by `make()`

Tests generate the JSON again and compare, check every field and tag against the catalogue, and run every query on a
real InfluxDB. dashboards/README.md explains what each number means and how numbers may be combined.
"""
