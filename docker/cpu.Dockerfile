# dougong on CPUs: x86-64 and AArch64.
#
#   docker build --file docker/cpu.Dockerfile --tag dougong:cpu .
#   docker run --publish 8000:8000 dougong:cpu MODEL
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY backends/cpu backends/cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=torch==2.13.*
RUN python3 -m venv /opt/dougong \
    && /opt/dougong/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH" \
    && /opt/dougong/bin/pip install --no-cache-dir ".[serve]" ./backends/cpu \
    && /opt/dougong/bin/pip uninstall --yes pip \
    && find /opt/dougong -name __pycache__ -type d -prune -exec rm -rf {} +

FROM ${BASE}
RUN useradd --create-home --home-dir /var/lib/dougong --uid 10001 dougong \
    && install --directory --owner dougong /var/lib/dougong/models
COPY --from=build /opt/dougong /opt/dougong
ENV PATH=/opt/dougong/bin:$PATH \
    DOUGONG_BACKEND=cpu \
    HF_HOME=/var/lib/dougong/models
USER 10001
WORKDIR /var/lib/dougong
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["dougong", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--help"]
