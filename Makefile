# `make` says what there is. Every gate of .ci/run is a target here.
SHELL := /bin/bash
.DEFAULT_GOAL := help
# The SQL is checked against .sqlx, whatever database the shell has set; `make sqlx-check` checks .sqlx itself.
export SQLX_OFFLINE := true
# More arguments for `make test`, as in: make test ARGS='--test integration walkthrough::'
ARGS ?=

.PHONY: help
help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: ## Build and run regcred with its own Postgres and a cluster; Ctrl-C stops all, the data stays
	@dev/run

.PHONY: demo
demo: ## Show the main job with two real registries
	@dev/demo

.PHONY: install
install: ## Install what the sandbox needs (the other targets do it by themselves)
	@dev/install

.PHONY: test
test: ## Run all tests beside a Postgres, two Kubernetes API servers and two registries of their own
	@dev/with-services cargo test --locked $(ARGS)

.PHONY: bench
bench: ## Measure, each figure beside what it is compared with
	@dev/with-services cargo bench --locked $(ARGS)

.PHONY: bench-fanout
bench-fanout: ## Measure rotations in 1,000 and 5,000 namespaces; make bench-fanout ARGS='300' for another size
	@REGCRED_TEST_PG_DURABLE=1 dev/with-services cargo bench --locked --bench speed -- --fanout $(ARGS)

.PHONY: scenarios
scenarios: ## Measure what it withstands: slow clients, floods, too much; make scenarios ARGS='a1 a8' for some
	@dev/with-services cargo bench --locked --bench speed -- --scenarios $(ARGS)

.PHONY: fmt
fmt: ## Format the code
	cargo fmt

.PHONY: fmt-check
fmt-check: ## Fail where the code is not formatted
	cargo fmt --check

.PHONY: lint
lint: ## Run clippy; a warning is an error
	cargo clippy --locked --all-targets -- -D warnings

.PHONY: sqlx-prepare
sqlx-prepare: ## Write .sqlx after a change of SQL or migrations
	@dev/sqlx prepare

.PHONY: sqlx-check
sqlx-check: ## Fail where .sqlx is not up to date
	@dev/sqlx check

.PHONY: openapi
openapi: ## Write openapi/openapi.json from the code
	@dev/openapi write

.PHONY: openapi-check
openapi-check: ## Fail where openapi/openapi.json is not what the code generates
	@dev/openapi check

.PHONY: ci
ci: ## Run everything that a change must pass
	@.ci/run

.PHONY: compose-secrets
compose-secrets: ## Make the secrets of docker-compose.yml
	@dev/compose-secrets

.PHONY: clean
clean: ## Remove what was built here (the caches in ~/.cache/regcred stay)
	cargo clean
