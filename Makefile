# `make` lists the targets. Every gate of .ci/run is one.
SHELL := /bin/bash
.DEFAULT_GOAL := help
# The SQL is checked against .sqlx, whatever DATABASE_URL is set; `make sqlx-check` checks .sqlx.
export SQLX_OFFLINE := true
# Additional arguments, as in: make test ARGS='--test integration pull_secrets::'
ARGS ?=
# Time and names of fuzz targets
SECONDS ?= 60
TARGET ?=

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: ## Build and run regcred with a private Postgres and a cluster; Ctrl-C stops all, the data stays
	@dev/run

.PHONY: demo
demo: ## Show the main job with two real registries
	@dev/demo

.PHONY: reset
reset: ## Stop `make run` and remove its data
	@dev/reset

.PHONY: registries
registries: ## Run two private registries for the tutorial; Ctrl-C stops and removes them
	@dev/registries

.PHONY: install
install: ## Install the programs of the sandbox (other targets do so when needed)
	@dev/install

.PHONY: test
test: ## Run all tests with a private Postgres, two Kubernetes API servers and two registries
	@cargo test --locked --no-run $(ARGS) # before the services, which would slow it down
	@dev/with-services cargo test --locked $(ARGS)

.PHONY: node-test
node-test: ## Test with a real node: kubelet, containerd and pods; needs root. ARGS='rotation::' selects some
	@cargo test --locked --no-run --test node
	@dev/with-node cargo test --locked --test node $(ARGS)

.PHONY: build-tests
build-tests: ## Compile the tests
	cargo test --locked --no-run

.PHONY: bench
bench: ## Measure; each figure has its reference from the same run
	@dev/with-services cargo bench --locked $(ARGS)

.PHONY: bench-fanout
bench-fanout: ## Measure rotations in 1,000 and 5,000 namespaces; ARGS='300' sets another size
	@REGCRED_TEST_PG_DURABLE=1 dev/with-services cargo bench --locked --bench speed -- --fanout $(ARGS)

.PHONY: scenarios
scenarios: ## Measure slow clients, floods and faults; ARGS='a1 a8' selects scenarios
	@dev/with-services cargo bench --locked --bench speed -- --scenarios $(ARGS)

.PHONY: fmt
fmt: ## Format the code
	cargo fmt
	cargo fmt --manifest-path fuzz/Cargo.toml

.PHONY: fmt-check
fmt-check: ## Fail if the code is not formatted
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml

.PHONY: lint
lint: language-check ## Check the wording, then run clippy; a warning is an error
	@# With the entry points of the fuzz targets, which nothing else compiles.
	cargo clippy --locked --all-targets -- -D warnings --cfg fuzzing
	@# Not part of `cargo test`, and so not of all targets.
	cargo clippy --locked --test node -- -D warnings --cfg fuzzing

.PHONY: language-check
language-check: ## Check the wording of code and documents
	@dev/language-check

.PHONY: deny
deny: ## Check licences, sources and versions of the dependencies; advisories if they can be downloaded
	@dev/deny

.PHONY: fuzz
fuzz: ## Run every fuzz target for SECONDS=60; TARGET='kubeconfig cursor' selects some
	@dev/fuzz $(SECONDS) $(TARGET)

.PHONY: fuzz-api
fuzz-api: ## Test the API against its OpenAPI document as each role; ARGS='viewer' selects some
	@cargo build --locked
	@dev/fuzz-api $(ARGS)

.PHONY: sqlx-prepare
sqlx-prepare: ## Write .sqlx after a change of SQL or migrations
	@dev/sqlx prepare

.PHONY: sqlx-check
sqlx-check: ## Fail if .sqlx is not up to date
	@dev/sqlx check

.PHONY: openapi
openapi: ## Write openapi/openapi.json, openapi-3.0.json and the TypeScript types from the code
	@dev/openapi write
	@dev/openapi-lint generate

.PHONY: openapi-examples
openapi-examples: ## Write openapi/examples.json, the examples of the API document, from a run
	@REGCRED_WRITE_EXAMPLES=1 dev/with-services cargo test --locked --test integration examples::
	@dev/openapi write
	@dev/openapi-lint generate

.PHONY: openapi-check
openapi-check: ## Fail if openapi/openapi.json differs from the code
	@dev/openapi check

.PHONY: openapi-lint
openapi-lint: ## Check that linters and client generators accept the API document, and run what they generate
	@cargo build --locked
	@dev/openapi-lint

.PHONY: client-test
client-test: ## Test the TypeScript client in Node.js and in Chromium
	@cargo build --locked
	@dev/client-test $(ARGS)

.PHONY: mint-test
mint-test: ## Test minted accounts against emulators, and beside the vendors' own clients
	@cargo test --locked --no-run --test integration
	@dev/python-tool aws-peers >/dev/null
	@dev/python-tool mint-clients >/dev/null
	@dev/node-tool dev/oauth2-mock-server >/dev/null
	@dev/with-services cargo test --locked --test integration 'mints::$(ARGS)' -- --ignored

.PHONY: console
console: ## Check and build the web console into console/dist, with its own Node.js
	@dev/console

.PHONY: console-test
console-test: ## Test the web console in Chromium; ARGS='--test-name-pattern=rotation' selects some
	@cargo build --locked
	@dev/console
	@dev/console-test $(ARGS)

.PHONY: chart
chart: ## Write deploy/kubernetes and the snapshots of tests/chart from the Helm chart
	@dev/chart write

.PHONY: chart-test
chart-test: ## Test the Helm chart, its alerts, and a release of it in a real API server
	@dev/chart test

.PHONY: dist
dist: ## Build the files of a release in target/dist: tarball, chart, bill of materials, checksums
	cargo build --locked --release --bin regcred
	@dev/dist

.PHONY: dist-test
dist-test: ## Install the tarball of target/dist on a minimal Debian 12 with systemd, and serve from it; needs root
	@dev/dist-test

.PHONY: image-test
image-test: ## Build the image with a private Docker engine and run docker-compose.yml; needs root
	@dev/image-test $(ARGS)

.PHONY: ci
ci: ## Run all gates of a change
	@.ci/run

.PHONY: fresh-machine
fresh-machine: ## Time run, demo and test on a new, minimal Debian 12; needs root
	@dev/fresh-machine

.PHONY: compose-secrets
compose-secrets: ## Create the secrets of docker-compose.yml
	@dev/compose-secrets

.PHONY: clean
clean: ## Remove the build output (the caches in ~/.cache/regcred stay)
	cargo clean
