# Two stages: the first installs the locked packages, the second copies the result without pip.
#
# For production, pin the base by its digest: docs/security.md, "Supply chain".
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS packages

# `--build-arg REQUIREMENTS=requirements-traces.txt` adds the packages that GATEWAY_TRACES=on needs.
ARG REQUIREMENTS=requirements.txt
COPY ${REQUIREMENTS} /requirements.txt
# The virtual environment has no pip, since nothing is installed into the finished image.
RUN python -m venv --without-pip /opt/gateway \
    && python -m pip --python /opt/gateway/bin/python install \
        --no-cache-dir --disable-pip-version-check --only-binary :all: --require-hashes --requirement /requirements.txt


FROM ${PYTHON_IMAGE}

# A number, because Kubernetes' runAsNonRoot cannot check a user name.
RUN groupadd --gid 10001 gateway \
    && useradd --uid 10001 --gid gateway --no-create-home --shell /usr/sbin/nologin gateway

COPY --from=packages /opt/gateway /opt/gateway
WORKDIR /srv/gateway
COPY migrations migrations
COPY gateway gateway

# Compile byte code here: the image's user cannot write it, and the root file system may be read-only.
RUN /opt/gateway/bin/python -m compileall -q gateway
# Probes come from outside the container, so the operations port listens on all addresses. Publish it to this machine alone.
ENV PATH=/opt/gateway/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GATEWAY_OPS_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8080 9090

# Python, because the image has no curl. Liveness only: an outage of the broker is no reason to restart.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.getenv('GATEWAY_OPS_PORT', '9090') + '/livez')"]

# SIGTERM drains: requests in flight are answered after their confirms (up to 23 s by default).
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "gateway"]
CMD ["serve"]
