# Two images: the operator's, without torch, and the trainer's, without kopf and kubernetes.
#
#   docker build --target operator --tag ghcr.io/dpmoe/operator:0.1.0 .
#   docker build --target trainer  --tag ghcr.io/dpmoe/trainer:0.1.0 .
#
# constraints.txt pins every package. PIP_EXTRA_INDEX_URL, as a build argument, names the index of
# PyTorch's wheels for CPUs: they make a trainer that is far smaller and knows no GPU.

ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS source
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY examples examples
COPY operator operator
COPY trainer trainer

FROM source AS operator-packages
RUN python -m venv /opt/dpmoe \
    && /opt/dpmoe/bin/pip install --constraint constraints.txt '.[operator]'

FROM source AS trainer-packages
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/dpmoe \
    && /opt/dpmoe/bin/pip install --constraint constraints.txt '.[trainer]'
# The compiled kernels, for every level of processor: the image itself has no compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && /opt/dpmoe/bin/python -m dpmoe_trainer.dp.kernels

# What both images are: Python, a user without rights, and one virtual environment.
FROM python:${PYTHON} AS runtime
ENV PATH=/opt/dpmoe/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1
# The trainer's compiled kernels run on several threads by it.
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 65532 --user-group --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin dpmoe
USER 65532:65532

FROM runtime AS operator
COPY --from=operator-packages /opt/dpmoe /opt/dpmoe
ENTRYPOINT ["dpmoe"]
CMD ["operator"]

FROM runtime AS trainer
COPY --from=trainer-packages /opt/dpmoe /opt/dpmoe
ENTRYPOINT ["python", "-m", "dpmoe_trainer"]
