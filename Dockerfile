# gpumesh as an image: only what it runs, no compiler, no root.
#
#   docker build -t gpumesh .
#   docker run --init --rm -p 127.0.0.1:11430:11430 -e GPUMESH_API_KEY \
#     -v "$PWD/mesh.yaml:/etc/gpumesh/mesh.yaml:ro" -v "$HOME/.ssh:/home/gpumesh/.ssh:ro" gpumesh
#
# The gateway listens on all addresses of the container, so mesh.yaml must name a key (`gateway: {api_key_env: …}`).
# examples/docker/compose.yaml has Open WebUI in front of it.

ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY gpumesh ./gpumesh
RUN python -m venv /opt/gpumesh \
    && /opt/gpumesh/bin/pip install --no-cache-dir --disable-pip-version-check '.[redis]'

FROM python:${PYTHON}-slim
# `ssh` reads ~/.ssh/config for gpumesh, and is the tunnel of nodes with `transport: openssh`.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends openssh-client \
    && rm -rf /var/lib/apt/lists/*
# The keys in ~/.ssh must belong to this user: build with your own number (`id -u`) if it is not 1000.
ARG UID=1000
RUN useradd --create-home --uid "${UID}" gpumesh \
    && install -d -o gpumesh -m 700 /home/gpumesh/.ssh /home/gpumesh/.local /home/gpumesh/.local/state
COPY --from=build /opt/gpumesh /opt/gpumesh
ENV PATH=/opt/gpumesh/bin:$PATH \
    GPUMESH_CONFIG=/etc/gpumesh/mesh.yaml
USER ${UID}
WORKDIR /home/gpumesh
EXPOSE 11430
# Healthy while any node can serve.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:11430/healthz', timeout=8)"]
# SIGTERM, which stops a container, lets what is in flight end: give it 30 s (`docker stop -t 30`).
ENTRYPOINT ["gpumesh"]
CMD ["up", "--quiet", "--listen", "0.0.0.0:11430"]
