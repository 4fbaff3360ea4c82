# Two stages: the first installs the locked packages, the second carries the result and nothing that built it.
FROM python:3.13-slim AS packages

# `--build-arg REQUIREMENTS=requirements-traces.txt` adds what GATEWAY_TRACES=on needs.
ARG REQUIREMENTS=requirements.txt
COPY ${REQUIREMENTS} /requirements.txt
RUN python -m venv /opt/gateway \
    && /opt/gateway/bin/pip install --no-cache-dir --require-hashes --requirement /requirements.txt


FROM python:3.13-slim

# A number, not a name: Kubernetes' runAsNonRoot cannot tell whom a name stands for.
RUN groupadd --gid 10001 gateway \
    && useradd --uid 10001 --gid gateway --no-create-home --shell /usr/sbin/nologin gateway

COPY --from=packages /opt/gateway /opt/gateway
WORKDIR /srv/gateway
COPY migrations migrations
COPY gateway gateway

# Byte code is compiled here, once: the user that runs it cannot write.
RUN /opt/gateway/bin/python -m compileall -q gateway
# Probes come from outside the container: the operations port must listen there, and must not be published.
ENV PATH=/opt/gateway/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GATEWAY_OPS_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8080 9090

# Without curl, which the image does not have. Liveness only: an outage of the broker is no reason to restart.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.getenv('GATEWAY_OPS_PORT', '9090') + '/livez')"]

# SIGTERM drains: the answers in flight are finished and their confirms awaited (up to 23 s by default).
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "gateway"]
CMD ["serve"]
