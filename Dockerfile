# heretic in a container; see docs/notebooks.md#containers.
#   docker build -t heretic .                              CPU
#   docker build -t heretic --build-arg DEVICE=cuda .      NVIDIA GPUs
FROM debian:bookworm-slim
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The Makefile checks every package against its hash in lock/, and takes the CUDA libraries if this PyTorch needs them.
WORKDIR /opt/heretic
COPY . .
ARG DEVICE=cpu
ARG PIP_EXTRA_INDEX_URL=""
RUN case "$DEVICE" in \
      cpu) export PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-https://download.pytorch.org/whl/cpu}" ;; \
      cuda) ;; \
      *) echo "DEVICE is cpu or cuda, not $DEVICE" >&2; exit 1 ;; \
    esac \
    && PIP_NO_CACHE_DIR=1 make .venv/.installed \
    && .venv/bin/heretic --version

# Runs and models belong to whoever started the container: mount a folder at /work and pass --user.
RUN useradd --create-home heretic && install -d -m 1777 /work /cache
ENV PATH="/opt/heretic/.venv/bin:$PATH" HF_HOME=/cache
USER heretic
WORKDIR /work
ENTRYPOINT ["heretic"]
CMD ["--help"]
