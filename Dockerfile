# One image for all services: `mace ingest`, `mace run`, `mace replay`.
#
#   docker build -t mace .
#
# BASE is any image with Python 3.11 to 3.14 as `python3`, its venv module and glibc: the wheels are made for it.
# Without an index, put the wheels of deploy/requirements.lock into deploy/wheelhouse/ first (docs/deploy.md).
ARG BASE=python:3.13-slim-bookworm

FROM ${BASE} AS build
COPY deploy/ /build/
# Only wheels whose hashes are in the lock. A third of Arrow is removed: headers, and protocols and clouds that MACE does
# not use.
RUN set -eu; \
    python3 -m venv /opt/mace; \
    if ls /build/wheelhouse/*.whl >/dev/null 2>&1; then set -- --no-index --find-links /build/wheelhouse; else set --; fi; \
    /opt/mace/bin/python -m pip install --disable-pip-version-check --no-cache-dir --no-compile \
        --only-binary :all: --require-hashes --requirement /build/requirements.lock "$@"; \
    cd /opt/mace/lib/python3*/site-packages; \
    rm -rf pyarrow/include pyarrow/src pyarrow/tests pyarrow/*flight* pyarrow/*s3* numpy/tests numpy/*/tests; \
    find . -name '*.pyi' -delete
COPY mace/ /opt/mace/app/mace/
COPY contracts/ /opt/mace/app/contracts/
COPY collector/ /opt/mace/app/collector/
COPY correlator/ /opt/mace/app/correlator/
COPY storage/ /opt/mace/app/storage/
COPY bpf/ /opt/mace/app/bpf/
COPY kmod/uapi/ /opt/mace/app/kmod/uapi/
COPY setup.py /opt/mace/app/
# Compile the extensions, unless ./dev setup has compiled ones that run here. pip is removed afterwards, so nothing in the
# image can install anything.
RUN set -eu; \
    cd /opt/mace/app; \
    runs() { /opt/mace/bin/python -c 'from collector.compiled import loops; from correlator.compiled import joiner'; }; \
    if ! runs 2>/dev/null; then \
        packages="gcc libc6-dev"; \
        [ -e "$(/opt/mace/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] \
            || packages="$packages python3-dev"; \
        command -v gcc >/dev/null || { apt-get -qq -o Acquire::http::Timeout=10 update \
            && apt-get -qq install --yes --no-install-recommends $packages >/dev/null; }; \
        /opt/mace/bin/python setup.py --quiet build_ext --inplace --force; \
        runs; \
    fi; \
    rm -rf setup.py build c*/compiled/*.c c*/compiled/*.h; \
    /opt/mace/bin/python -m pip uninstall --yes --quiet pip setuptools
# For the source bpf: build its programs, unless ./dev setup has built them, and copy the library that loads them. If
# the base image lacks the tools and no package index is reachable, the image lacks the source bpf; all else works.
RUN set -eu; \
    cd /opt/mace/app; \
    mkdir /opt/mace/native; \
    has_library() { ldconfig -p | grep -q 'libbpf\.so\.1 '; }; \
    if ! { [ -e collector/bpf/mace_old.bpf.o ] && has_library; } && command -v apt-get >/dev/null; then \
        packages=libbpf1; \
        [ -e collector/bpf/mace_old.bpf.o ] || packages="clang libbpf-dev linux-libc-dev make"; \
        { apt-get -qq -o Acquire::http::Timeout=10 update \
            && apt-get -qq install --yes --no-install-recommends $packages; } >/dev/null 2>&1 || true; \
    fi; \
    [ -e collector/bpf/mace_old.bpf.o ] || make -C bpf || echo "no BPF programs: this image lacks the source bpf"; \
    for name in libbpf.so.1 libelf.so.1; do \
        found=$(ldconfig -p | sed -n "s|^[[:space:]]*$name (.* => ||p" | head -n 1); \
        [ -z "$found" ] || cp -L "$found" "/opt/mace/native/$name"; \
    done; \
    rm -rf bpf kmod
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
    LD_LIBRARY_PATH=/opt/mace/native \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# A number, so that Kubernetes can see that it is not root (runAsNonRoot).
USER 10001:10001
WORKDIR /var/lib/mace
VOLUME /var/lib/mace
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/mace/bin/python", "-m", "mace"]
CMD ["--help"]
