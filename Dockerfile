FROM python:3.13-slim-bookworm AS build
WORKDIR /src
# What seldom changes comes first. Every file that is installed is checked against its hash.
COPY requirements.build.lock requirements.image.lock requirements.service.lock ./
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install --require-hashes --requirement requirements.build.lock \
    && python -m venv --without-pip /opt/exarq \
    && /opt/build/bin/pip --python /opt/exarq/bin/python install --require-hashes --requirement requirements.image.lock \
    && python -m venv --without-pip /opt/service \
    && /opt/build/bin/pip --python /opt/service/bin/python install --require-hashes --requirement requirements.image.lock \
        --requirement requirements.service.lock
COPY pyproject.toml README.md LICENSE ./
COPY worker worker
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels . \
    && /opt/build/bin/pip --python /opt/exarq/bin/python install --no-deps wheels/*.whl \
    && /opt/build/bin/pip --python /opt/service/bin/python install --no-deps wheels/*.whl

# An example of a service that enqueues: `docker build --target service`.
FROM python:3.13-slim-bookworm AS service
ENV PATH=/opt/service/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    UVICORN_HOST=0.0.0.0 \
    UVICORN_PORT=8000 \
    UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN=30
COPY --from=build /opt/service /opt/service
WORKDIR /app
COPY docs/examples/fastapi_service ./
USER 10001:10001
# It closes in order at SIGTERM as well, but then ends by it, which looks like a failure; after SIGINT it ends with 0.
STOPSIGNAL SIGINT
# The image has no curl.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", "import http.client, os; it = http.client.HTTPConnection('127.0.0.1:' + os.environ['UVICORN_PORT']); it.request('GET', '/health'); exit(it.getresponse().status != 204)"]
CMD ["uvicorn", "service:app"]

# One image for the workers, for `exarq db upgrade` and for what else belongs to them: only the command differs.
FROM python:3.13-slim-bookworm AS worker
# Nothing is written at run time but below /tmp, so the root may be read-only beside a tmpfs there.
ENV PATH=/opt/exarq/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    EXARQ_JOBS_MODULES=jobs.export,jobs.inventory,jobs.ledger,orders
COPY --from=build /opt/exarq /opt/exarq
WORKDIR /app
COPY jobs jobs
COPY docs/examples/fastapi_service/orders.py ./
# A number, for Kubernetes' runAsNonRoot does not look a name up.
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["exarq", "check"]
# No shell between: what asks the container to stop has to reach the worker.
ENTRYPOINT ["exarq"]
CMD ["run"]
