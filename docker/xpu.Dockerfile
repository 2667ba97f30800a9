# dougong on Intel GPUs. The base has the compiler that Triton calls and Level Zero's loader; libze-intel-gpu1 is the user part of the driver.
#
#   docker build --file docker/xpu.Dockerfile --tag dougong:xpu .
#   docker run --device /dev/dri --group-add $(getent group render | cut -d: -f3) --ipc host --publish 8000:8000 \
#       dougong:xpu MODEL
ARG BASE=intel/deep-learning-essentials:2025.3.2-0-devel-ubuntu24.04

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY kernels kernels
COPY backends/xpu backends/xpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/xpu
ARG TORCH=torch==2.13.*
RUN python3 -m venv /opt/dougong \
    && /opt/dougong/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH" \
    && /opt/dougong/bin/pip install --no-cache-dir ".[serve]" ./kernels ./backends/xpu \
    && /opt/dougong/bin/pip uninstall --yes pip \
    && find /opt/dougong -name __pycache__ -type d -prune -exec rm -rf {} +

FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libze-intel-gpu1 libze1 python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --home-dir /var/lib/dougong --uid 10001 dougong \
    && install --directory --owner dougong /var/lib/dougong/models
COPY --from=build /opt/dougong /opt/dougong
ENV PATH=/opt/dougong/bin:$PATH \
    DOUGONG_BACKEND=xpu \
    HF_HOME=/var/lib/dougong/models \
    TRITON_CACHE_DIR=/var/lib/dougong/.triton
USER 10001
WORKDIR /var/lib/dougong
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["dougong", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--help"]
