# The student trainer. Built from the repository's root:
#   docker build -f docker/student.Dockerfile -t opd-student:cpu .
#   docker build -f docker/student.Dockerfile -t opd-student:gpu --build-arg VARIANT=gpu .
# PYTHON_IMAGE may name a mirror's copy, or one digest of it.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# pycosat, which reasoning-gym needs, has no wheel: compiled here, so that the image has no compiler.
FROM ${PYTHON_IMAGE} AS wheels
ARG VARIANT=cpu
# Debian's own Python keeps its headers in a package of their own.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    $(python -c "import os, sysconfig; print('' if os.path.exists(sysconfig.get_path('include') + '/Python.h') else 'python3-dev')")
COPY docker/requirements/student-${VARIANT}.txt /opt/requirements.txt
RUN grep '^pycosat==' /opt/requirements.txt > /opt/pycosat.txt \
    && pip wheel --no-cache-dir --no-deps --wheel-dir /opt/built -r /opt/pycosat.txt

FROM ${PYTHON_IMAGE}

ARG VARIANT=cpu
# Where the CPU build of torch comes from when pip's own sources do not have it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_NO_DEPS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# From what changes least to what changes most: torch, the other packages, the code.
COPY docker/requirements/student-${VARIANT}.txt /opt/requirements.txt
RUN grep '^torch==' /opt/requirements.txt > /opt/torch.txt \
    && { pip install -r /opt/torch.txt || pip install --index-url "$TORCH_INDEX" -r /opt/torch.txt; }
COPY --from=wheels /opt/built /opt/built
RUN pip install --find-links /opt/built -r /opt/requirements.txt

RUN useradd --uid 10001 --no-create-home opd \
    && install -d -o opd -g opd /hub /models /runs && install -d -o opd -g opd -m 700 /secrets/teacher /secrets/student

# The root file system may be read-only: whatever is written goes to /tmp, or to a volume.
ENV HOME=/tmp HF_HOME=/tmp/huggingface PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 MPLBACKEND=agg
COPY protos /app/protos
COPY student_trainer /app/student_trainer
COPY docker/*.py /app/
USER opd
WORKDIR /app

# Healthy while something below RUN_FOLDER was written within STALL_S seconds: a run that waits for its teacher is not.
ENV RUN_FOLDER=/runs STALL_S=900
HEALTHCHECK --interval=60s --timeout=10s --start-period=15m --retries=1 CMD ["python", "/app/progress.py"]
# SIGTERM ends after the step, with a checkpoint; the same command goes on from there.
ENTRYPOINT ["python", "-m", "student_trainer"]
CMD ["--help"]
