# syntax=docker/dockerfile:1
# The base images are pinned by tag. A release pipeline should pin them by digest, and renew the digests.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
ENV SQLX_OFFLINE=true
COPY . .
# The caches stay with the builder; the versions are those of Cargo.lock, or the build fails.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    cargo build --release --locked --bin regcred && install -s target/release/regcred /regcred

FROM debian:12-slim
# Whom registries and clusters with public certificates are checked against.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /regcred /usr/local/bin/regcred
USER 65532:65532
# Every address of the container; which of them the world can reach is for whoever runs it to say.
ENV REGCRED_HTTP_LISTEN=0.0.0.0:8080 REGCRED_LOG_FORMAT=json
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["regcred", "healthcheck"]
ENTRYPOINT ["regcred"]
CMD ["serve"]
