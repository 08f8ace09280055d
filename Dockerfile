# One image for all services: `mace ingest`, `mace run`, `mace replay`.
#
#   docker build -t mace .
#
# BASE is any image with Python 3.11 to 3.14 as `python3`, its venv module and glibc: the wheels are made for it.
# Without an index, put the wheels of deploy/requirements.lock into deploy/wheelhouse/ first (docs/deploy.md).
ARG BASE=python:3.13-slim-bookworm

FROM ${BASE} AS build
COPY deploy/ /build/
# Only wheels whose hashes are in the lock. pip is removed, so nothing in the image can install anything. A third of
# Arrow is removed: headers, and protocols and clouds that MACE does not use.
RUN set -eu; \
    python3 -m venv /opt/mace; \
    if ls /build/wheelhouse/*.whl >/dev/null 2>&1; then set -- --no-index --find-links /build/wheelhouse; else set --; fi; \
    /opt/mace/bin/python -m pip install --disable-pip-version-check --no-cache-dir --no-compile \
        --only-binary :all: --require-hashes --requirement /build/requirements.lock "$@"; \
    /opt/mace/bin/python -m pip uninstall --yes --quiet pip setuptools; \
    cd /opt/mace/lib/python3*/site-packages; \
    rm -rf pyarrow/include pyarrow/src pyarrow/tests pyarrow/*flight* pyarrow/*s3* numpy/tests numpy/*/tests; \
    find . -name '*.pyi' -delete
COPY mace/ /opt/mace/app/mace/
COPY contracts/ /opt/mace/app/contracts/
COPY collector/ /opt/mace/app/collector/
COPY correlator/ /opt/mace/app/correlator/
COPY storage/ /opt/mace/app/storage/
# The root file system is read-only at run time, so a container could not keep compiled files.
RUN python3 -m compileall -q -j 0 /opt/mace

FROM ${BASE}
LABEL org.opencontainers.image.title="mace" \
      org.opencontainers.image.description="Measures what a container's virtual network devices add to each packet" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/mace /opt/mace
# The only writable directory; a volume takes its owner from here.
RUN mkdir -m 770 /var/lib/mace && chown 10001:10001 /var/lib/mace
ENV PATH=/opt/mace/bin:$PATH \
    PYTHONPATH=/opt/mace/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# A number, so that Kubernetes can see that it is not root (runAsNonRoot).
USER 10001:10001
WORKDIR /var/lib/mace
VOLUME /var/lib/mace
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/mace/bin/python", "-m", "mace"]
CMD ["--help"]
