# docker build --target cpu  --tag expert-pipeline:cpu .
# docker build --target cuda --tag expert-pipeline:cuda .
# docker run --rm -v "$PWD:/data" expert-pipeline:cpu expert run /data/job.yaml
FROM python:3.11.14-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# A C compiler makes the CPU's kernels at first use.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 expert
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY pipeline pipeline
COPY jobs jobs
COPY configs configs

FROM base AS cpu
RUN pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu ".[grammar,s3,gcs]"
USER 10001
EXPOSE 8000
CMD ["expert", "--help"]

# The wheels of torch for Linux bring the CUDA libraries with them; the machine brings the driver.
FROM base AS cuda
RUN pip install --constraint constraints.txt ".[grammar,s3,gcs,quantization]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
EXPOSE 8000
CMD ["expert", "--help"]
