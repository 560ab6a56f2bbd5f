# The command line. It compiles for every target and runs WebAssembly and this machine's bundles.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS python
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends python3 >/dev/null \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/* \
           /usr/share/doc /usr/share/man /usr/share/locale \
 && useradd --create-home --uid 1000 edgepipe \
 && install -d -m 1777 /var/cache/edgepipe && install -d -o edgepipe -g edgepipe /work

FROM python AS source
COPY pyproject.toml README.md LICENSE /src/
COPY constraints.txt docker/prune /docker/
COPY edgepipe /src/edgepipe
COPY targets /src/targets
COPY calibration /src/calibration
COPY models /src/models
ENV PIP_CONSTRAINT=/docker/constraints.txt PIP_ROOT_USER_ACTION=ignore

# A folder of wheels given as the build context `wheels` takes this stage's place.
FROM source AS wheels
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-pip >/dev/null \
 && pip download -q --only-binary :all: -d / pip==26.3 hatchling '/src[wasmtime]'

# pip runs from its own wheel and leaves no trace.
FROM source AS build
RUN --mount=type=bind,from=wheels,target=/given \
    python3 -m venv --without-pip /opt/edgepipe \
 && /opt/edgepipe/bin/python "$(echo /given/pip-*.whl)/pip" install -q --no-index --find-links /given \
        '/src[wasmtime]' \
 && sh /docker/prune /opt/edgepipe/lib/python3*/site-packages

FROM python
COPY --from=build /opt/edgepipe /opt/edgepipe
# Both caches fill at first use, whoever the user is; a volume keeps them.
ENV PATH=/opt/edgepipe/bin:$PATH PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/var/cache/edgepipe ZIG_GLOBAL_CACHE_DIR=/var/cache/edgepipe/zig
USER edgepipe
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=30s CMD ["edgepipe", "targets", "--quiet"]
ENTRYPOINT ["edgepipe"]
CMD ["--help"]
