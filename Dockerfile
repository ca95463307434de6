# docker build -t pneumo-experiments .
#
# This package and the versions in requirements.lock, for a user without rights. How to run it, and what was
# tried: docs/cluster.md. The lock has torch with CUDA, and the tools of development, too.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    MLFLOW_DISABLE_TELEMETRY=true \
    GIT_PYTHON_REFRESH=quiet

COPY requirements.lock /tmp/requirements.lock
RUN pip install --require-hashes -r /tmp/requirements.lock

COPY pyproject.toml README.md LICENSE /tmp/project/
COPY pneumo_experiments /tmp/project/pneumo_experiments
RUN pip install --no-deps --no-build-isolation /tmp/project && rm -r /tmp/project

RUN useradd --create-home --uid 1000 pneumo && install -d -o pneumo -g pneumo /workspace
USER pneumo
WORKDIR /workspace

# No ENTRYPOINT: `mlflow run` starts an image with a whole command.
CMD ["python", "-m", "pneumo_experiments", "--help"]
