# polyground in a container, as a user without rights. Not built by the project's own checks.
#   docker build -t polyground .                                                                  CPU
#   docker build -t polyground --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .   CUDA (run with --gpus all)
#   docker run --rm -v "$PWD":/work polyground run recipes/tiny.yaml
FROM python:3.12-slim

# The CUDA builds of torch bring their libraries along; the host brings the driver.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=train,serve,eval
# Files in the mounted folder belong to this user: give your own (`id -u`).
ARG UID=1000

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /opt/polyground
COPY pyproject.toml constraints.txt LICENSE ./
# torch goes first, before the package's own files: a change of those does not fetch it again.
RUN pip install -c constraints.txt --extra-index-url "$TORCH_INDEX" torch
COPY src src
RUN pip install -c constraints.txt ".[${EXTRAS}]" && useradd --create-home --uid "$UID" polyground

USER polyground
WORKDIR /work
ENTRYPOINT ["polyground"]
CMD ["--help"]
