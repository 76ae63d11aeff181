# dppo_mcore on an NGC PyTorch image: the image's torch, transformer-engine, apex and flash-attn are used as they are.
#
#   docker build -t dppo_mcore .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit nofile=65536 \
#       -v /data:/data -v /models:/models -v /runs:/runs dppo_mcore \
#       torchrun --nproc-per-node 8 -m dppo_mcore.train --config examples/qwen7b-1node.yaml --run-folder /runs/qwen7b
#
# A run stays only where a folder is mounted; the user in the image (1001) must be allowed to write to /runs.

# torch 2.11, triton 3.6, CUDA 13.2, Python 3.12.
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/dppo_mcore
COPY constraints constraints
COPY setup.py pyproject.toml Makefile LICENSE ./
COPY kernels kernels
COPY dppo_mcore dppo_mcore
COPY tools tools
RUN make setup-ngc PYTHON=python3 NGC_PIP_FLAGS=--no-cache-dir

# SGLang pins its own torch, so it gets an environment of its own, free of the image's constraints; the trainer finds
# it through --rollout-python.
RUN python3 -m venv /opt/sglang \
    && env -u PIP_CONSTRAINT /opt/sglang/bin/python -m pip install --no-cache-dir "sglang[all]==0.5.23"

COPY examples examples

RUN useradd --create-home --uid 1001 practice && mkdir -p /runs && chown practice /runs /opt/dppo_mcore
USER practice
VOLUME /runs

HEALTHCHECK --interval=5m --timeout=3m --start-period=3m CMD python3 -m dppo_mcore.doctor || exit 1
CMD ["python3", "-m", "dppo_mcore.doctor"]
