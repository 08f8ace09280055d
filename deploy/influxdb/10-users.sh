#!/bin/sh
# The influxdb image runs this once, when the database is made. It makes two users with few rights: the ingest may only
# write, Grafana may only read. No service needs the administrator's token afterwards.
set -eu

influx v1 dbrp create --org "$DOCKER_INFLUXDB_INIT_ORG" --bucket-id "$DOCKER_INFLUXDB_INIT_BUCKET_ID" \
    --db "$DOCKER_INFLUXDB_INIT_BUCKET" --rp autogen --default
influx v1 auth create --org "$DOCKER_INFLUXDB_INIT_ORG" --write-bucket "$DOCKER_INFLUXDB_INIT_BUCKET_ID" \
    --username ingest --password "$(cat /run/secrets/influxdb_ingest_password)"
influx v1 auth create --org "$DOCKER_INFLUXDB_INIT_ORG" --read-bucket "$DOCKER_INFLUXDB_INIT_BUCKET_ID" \
    --username grafana --password "$(cat /run/secrets/influxdb_grafana_password)"
