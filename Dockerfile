# One image for the workers, for `exarq db upgrade` and for what else belongs to them: only the command differs.
FROM python:3.13-slim-bookworm AS build
WORKDIR /src
# What seldom changes comes first. Every file that is installed is checked against its hash.
COPY requirements.build.lock requirements.image.lock ./
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install --require-hashes --requirement requirements.build.lock \
    && python -m venv --without-pip /opt/exarq \
    && /opt/build/bin/pip --python /opt/exarq/bin/python install --require-hashes --requirement requirements.image.lock
COPY pyproject.toml README.md LICENSE ./
COPY worker worker
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels . \
    && /opt/build/bin/pip --python /opt/exarq/bin/python install --no-deps wheels/*.whl

FROM python:3.13-slim-bookworm
# Nothing is written at run time but below /tmp, so the root may be read-only beside a tmpfs there.
ENV PATH=/opt/exarq/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    EXARQ_JOBS_MODULES=jobs.export,jobs.inventory,jobs.ledger
COPY --from=build /opt/exarq /opt/exarq
WORKDIR /app
COPY jobs jobs
# A number, for Kubernetes' runAsNonRoot does not look a name up.
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["exarq", "check"]
# No shell between: what asks the container to stop has to reach the worker.
ENTRYPOINT ["exarq"]
CMD ["run"]
