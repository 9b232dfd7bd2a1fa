# The image of scale_mae with all its dependencies, for one GPU machine and for clusters. See docs/guides/containers.md.
#
# The base can be any Debian or Ubuntu with Python 3.11 or 3.12, because the wheels of PyTorch and DALI contain the CUDA libraries.
# The default base adds cuda-compat, with which data-center GPUs run CUDA 13 on an older driver.
ARG BASE_IMAGE=docker.io/nvidia/cuda:13.0.2-base-ubuntu24.04
ARG PYTHON=python3

FROM ${BASE_IMAGE} AS build
ARG PYTHON
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ${PYTHON} ${PYTHON}-venv \
 && ${PYTHON} -m venv /opt/scale_mae
WORKDIR /source
# Install the dependencies in a layer of their own. Then a change of the code rebuilds and transfers megabytes, not gigabytes.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    ${PYTHON} -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = [r for name, extra in p["optional-dependencies"].items() if name not in ("dev", "docs") for r in extra]; \
print(*p["dependencies"], *extras, sep="\n")' > requirements.txt \
 && /opt/scale_mae/bin/pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt
COPY . .
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/scale_mae/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${BASE_IMAGE}
ARG PYTHON
# With engine.compile=true, Triton compiles a launcher for each kernel. Only this needs gcc, libc and the headers of Python.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
    ${PYTHON} ${PYTHON}-venv lib${PYTHON}-dev gcc libc6-dev ca-certificates \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/apt /var/log/*.log \
 && useradd --uid 10001 --home-dir /tmp --no-create-home --shell /bin/bash scale-mae \
 && install --directory --mode 1777 /workspace
COPY --from=build /opt/scale_mae /opt/scale_mae
RUN --mount=type=bind,from=build,source=/wheel,target=/wheel \
    /opt/scale_mae/bin/pip install --no-cache-dir --no-deps --no-index /wheel/*.whl
# Caches go to /tmp, so that any user ID and a read-only root file system work. NVIDIA's container toolkit and enroot read the
# two NVIDIA variables.
ENV PATH=/opt/scale_mae/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /workspace
USER 10001
# Check the image. The builder's /dev/shm has 64 MB, which doctor reports as too small for training, so mount another one.
RUN --mount=type=tmpfs,target=/dev/shm HOME=/dev/shm scale-mae doctor
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=
LABEL org.opencontainers.image.title="scale_mae" \
      org.opencontainers.image.description="Pre-training of masked autoencoders (MAE) at scale" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
ENTRYPOINT ["scale-mae"]
CMD ["--help"]
