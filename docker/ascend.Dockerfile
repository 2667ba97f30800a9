# dougong on Ascend NPUs (A2; give BASE for other chips). The base has CANN and Python.
#
#   docker build --file docker/ascend.Dockerfile --tag dougong:ascend .
#   docker run --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc \
#       --volume /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro --publish 8000:8000 dougong:ascend MODEL
ARG BASE=quay.io/ascend/cann:8.5.0-910b-ubuntu22.04-py3.11

FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY backends/ascend backends/ascend
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=torch==2.13.*
# Of torch's own minor version.
ARG TORCH_NPU=torch-npu==2.13.*
RUN python3 -m venv /opt/dougong \
    && /opt/dougong/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH" \
    && /opt/dougong/bin/pip install --no-cache-dir ".[serve]" ./backends/ascend "$TORCH_NPU" \
    && /opt/dougong/bin/pip uninstall --yes pip \
    && find /opt/dougong -name __pycache__ -type d -prune -exec rm -rf {} +

FROM ${BASE}
RUN useradd --create-home --home-dir /var/lib/dougong --uid 10001 dougong \
    && install --directory --owner dougong /var/lib/dougong/models /var/lib/dougong/.cache
COPY --from=build /opt/dougong /opt/dougong
# CANN's logs and what it compiles: beside a read-only root they would have no place.
ENV PATH=/opt/dougong/bin:$PATH \
    DOUGONG_BACKEND=ascend \
    HF_HOME=/var/lib/dougong/models \
    ASCEND_CACHE_PATH=/var/lib/dougong/.cache \
    ASCEND_WORK_PATH=/var/lib/dougong/.cache
USER 10001
WORKDIR /var/lib/dougong
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# CANN's libraries are found through its own script, which a plain ENV cannot follow from version to version.
ENTRYPOINT ["/bin/bash", "-c", "source /usr/local/Ascend/ascend-toolkit/set_env.sh && exec dougong serve --host 0.0.0.0 --port 8000 \"$@\"", "dougong"]
CMD ["--help"]
