# dppo_mcore on an NGC PyTorch image: the image's torch, transformer-engine, apex and flash-attn are used as they are.
#
#   docker build -t dppo_mcore .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit nofile=65536 -v /data:/data dppo_mcore \
#       torchrun --nproc-per-node 8 -m dppo_mcore.train --config examples/qwen7b-1node.yaml

ARG BASE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/dppo_mcore
COPY constraints constraints
COPY setup.py pyproject.toml Makefile LICENSE ./
COPY kernels kernels
COPY dppo_mcore dppo_mcore
RUN make setup-ngc PYTHON=python3

# SGLang pins its own torch, so it gets an environment of its own; the trainer finds it through --rollout-python.
RUN python3 -m venv /opt/sglang \
    && /opt/sglang/bin/python -m pip install --no-cache-dir "sglang[all]==0.5.23"

COPY tools tools
COPY examples examples

RUN useradd --create-home --uid 1001 practice && mkdir -p /runs && chown practice /runs /opt/dppo_mcore
USER practice
VOLUME /runs

HEALTHCHECK --interval=5m --timeout=2m --start-period=2m CMD python3 -m dppo_mcore.doctor || exit 1
CMD ["python3", "-m", "dppo_mcore.doctor"]
