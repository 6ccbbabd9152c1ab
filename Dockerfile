# The final image has the program, the libraries that it loads and a trust store: no shell, no package manager.
#
# A release pipeline passes the base by digest: --build-arg BUILD_IMAGE=rust:1.95-slim-bookworm@sha256:…
ARG BUILD_IMAGE=rust:1.95-slim-bookworm
ARG CONSOLE_IMAGE=node:24-bookworm-slim

FROM ${CONSOLE_IMAGE} AS console
WORKDIR /build/console
COPY console/package.json console/package-lock.json ./
RUN --mount=type=cache,target=/root/.npm npm ci --ignore-scripts --no-audit --no-fund
COPY console .
COPY clients/typescript/src /build/clients/typescript/src
RUN npx vite build

FROM ${BUILD_IMAGE} AS build
# A profile of Cargo: release, or dev for a fast build.
ARG PROFILE=release
WORKDIR /build
ENV SQLX_OFFLINE=true CARGO_INCREMENTAL=0
# Records the crates of the program in it, for scanners. The version is that of dev/requirements/crates.txt.
ARG CARGO_AUDITABLE=0.7.7
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    cargo install --quiet --locked --version "=$CARGO_AUDITABLE" cargo-auditable
COPY . .
COPY --from=console /build/console/dist console/dist
# The builder keeps the caches. The build fails if Cargo.lock is not up to date.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    cargo auditable build --locked --profile "$PROFILE" --bin regcred && \
    dev/image-root "target/$([ "$PROFILE" = dev ] && echo debug || echo "$PROFILE")/regcred" /root-of-image

FROM scratch
COPY --from=build /root-of-image /
USER 65532:65532
# All addresses of the container; the published ports decide which are reachable.
ENV PATH=/usr/local/bin REGCRED_HTTP_LISTEN=0.0.0.0:8080 REGCRED_LOG_FORMAT=json
EXPOSE 8080 8081
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["regcred", "healthcheck"]
ENTRYPOINT ["regcred"]
CMD ["serve"]
