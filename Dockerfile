# syntax=docker/dockerfile:1
# The base images are pinned by tag. A release pipeline should pin digests and renew them.

FROM node:24-bookworm-slim AS console
WORKDIR /build/console
COPY console/package.json console/package-lock.json ./
RUN --mount=type=cache,target=/root/.npm npm ci --ignore-scripts --no-audit --no-fund
COPY console .
COPY clients/typescript/src /build/clients/typescript/src
RUN npx vite build

FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
ENV SQLX_OFFLINE=true
COPY . .
COPY --from=console /build/console/dist console/dist
# The builder keeps the caches. The build fails if Cargo.lock is not up to date.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    cargo build --release --locked --bin regcred && install target/release/regcred /regcred

FROM debian:12-slim
# Trust store for registries and clusters with public certificates.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /regcred /usr/local/bin/regcred
USER 65532:65532
# All addresses of the container; the published ports decide which are reachable.
ENV REGCRED_HTTP_LISTEN=0.0.0.0:8080 REGCRED_LOG_FORMAT=json
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["regcred", "healthcheck"]
ENTRYPOINT ["regcred"]
CMD ["serve"]
