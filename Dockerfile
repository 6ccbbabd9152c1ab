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
COPY . .
COPY --from=console /build/console/dist console/dist
# The builder keeps the caches. The build fails if Cargo.lock is not up to date.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    cargo build --locked --profile "$PROFILE" --bin regcred && \
    install -D "target/$([ "$PROFILE" = dev ] && echo debug || echo "$PROFILE")/regcred" /root-of-image/usr/local/bin/regcred
# Shared libraries at their paths; users; resolution of names; CAs for registries and clusters with public certificates.
RUN cd /root-of-image && \
    ldd usr/local/bin/regcred | grep -o '/[^ ]*' | xargs -I {} cp -L --parents {} . && \
    mkdir -p etc/ssl/certs && \
    cp -L /etc/ssl/certs/ca-certificates.crt etc/ssl/certs/ && \
    echo 'hosts: files dns' >etc/nsswitch.conf && \
    echo 'regcred:x:65532:65532::/:/none' >etc/passwd && \
    echo 'regcred:x:65532:' >etc/group

FROM scratch
COPY --from=build /root-of-image /
USER 65532:65532
# All addresses of the container; the published ports decide which are reachable.
ENV PATH=/usr/local/bin REGCRED_HTTP_LISTEN=0.0.0.0:8080 REGCRED_LOG_FORMAT=json
EXPOSE 8080 8081
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["regcred", "healthcheck"]
ENTRYPOINT ["regcred"]
CMD ["serve"]
