# The teacher server. Built from the repository's root:
#   docker build -f docker/teacher.Dockerfile -t opd-teacher:cpu .
#   docker build -f docker/teacher.Dockerfile -t opd-teacher:gpu --build-arg VARIANT=gpu .
# PYTHON_IMAGE may name a mirror's copy, or one digest of it.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}

ARG VARIANT=cpu
# Where the CPU build of torch comes from when pip's own sources do not have it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_NO_DEPS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# From what changes least to what changes most: torch, the other packages, the code.
COPY docker/requirements/teacher-${VARIANT}.txt /opt/requirements.txt
RUN grep '^torch==' /opt/requirements.txt > /opt/torch.txt \
    && { pip install -r /opt/torch.txt || pip install --index-url "$TORCH_INDEX" -r /opt/torch.txt; }
RUN pip install -r /opt/requirements.txt

# vLLM's kernels for CPUs are linked against libnuma; Triton, for GPUs, compiles its launchers with gcc.
RUN apt-get update \
    && apt-get install -y --no-install-recommends $([ "$VARIANT" = gpu ] && echo gcc libc6-dev || echo libnuma1) \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --uid 10001 --no-create-home opd \
    && install -d -o opd -g opd /hub /models /runs && install -d -o opd -g opd -m 700 /secrets/teacher /secrets/student

# The root file system may be read-only: whatever is written goes to /tmp, or to a volume.
ENV HOME=/tmp HF_HOME=/tmp/huggingface PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY protos /app/protos
COPY teacher_server /app/teacher_server
USER opd
WORKDIR /app

EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 CMD ["python", "-c", \
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
# SIGTERM drains (`--drain-timeout-s`) and ends with 0.
ENTRYPOINT ["python", "-m", "teacher_server"]
CMD ["--help"]
