# Guildhall. "make help" lists the targets.

# The image that image, docker-build and deploy are about.
IMG ?= guildhall.dev/guildhall:dev
# What the binaries call themselves.
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# How to talk to the cluster; without a kubectl of your own, the one that cluster-up built.
KUBECTL ?= $(shell command -v kubectl 2>/dev/null || echo go -C hack/cluster run . kubectl)

SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The same builds on every machine, whatever its Go settings say.
export GOFLAGS := -buildvcs=false
export GOWORK := off

TOOLS := $(CURDIR)/build/tools
CONTROLLER_GEN := $(TOOLS)/controller-gen
KUSTOMIZE := $(TOOLS)/kustomize
GOLANGCI_LINT := $(TOOLS)/golangci-lint

CLUSTER := go -C hack/cluster run .
# Folders with a go.mod of their own and code of ours.
MODULES := . hack/cluster hack/bench

##@ General

.PHONY: help
help: ## Show this.
	@awk 'BEGIN {FS = ":.*## "; printf "Usage: make \033[36m<target>\033[0m\n"} \
		/^##@ / {printf "\n\033[1m%s\033[0m\n", substr($$0, 5)} \
		/^[a-z][a-z0-9-]*:.*## / {printf "  \033[36m%-17s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Development

.PHONY: generate
generate: $(CONTROLLER_GEN) ## Write deep copies, apply configurations, CRDs and the operator's role from the code.
	$(CONTROLLER_GEN) object paths=./api/...
	$(CONTROLLER_GEN) applyconfiguration paths=./api/...
	$(CONTROLLER_GEN) crd paths=./api/... output:crd:dir=config/crd/bases
	$(CONTROLLER_GEN) rbac:roleName=manager-role paths=./controllers/... output:rbac:dir=config/rbac

.PHONY: verify-generated
verify-generated: $(CONTROLLER_GEN) ## Check that generated files are current, without touching them.
	hack/verify-generated.sh $(CONTROLLER_GEN)

.PHONY: fmt
fmt: $(GOLANGCI_LINT) ## Format the code.
	@for module in $(MODULES); do (cd $$module && $(GOLANGCI_LINT) fmt --config $(CURDIR)/.golangci.yml ./...); done

.PHONY: lint
lint: $(GOLANGCI_LINT) ## Check the code, and the API's conventions.
	$(GOLANGCI_LINT) config verify
	@failed=0; for module in $(MODULES); do \
		echo "lint $$module"; \
		(cd $$module && $(GOLANGCI_LINT) run --config $(CURDIR)/.golangci.yml ./...) || failed=1; \
	done; exit $$failed

.PHONY: lint-fix
lint-fix: $(GOLANGCI_LINT) ## Mend what lint can mend by itself.
	@for module in $(MODULES); do (cd $$module && $(GOLANGCI_LINT) run --fix --config $(CURDIR)/.golangci.yml ./...) || true; done

.PHONY: deps
deps: ## Install the Debian packages that the tests need (as root), or say which are missing.
	hack/deps.sh

##@ Tests

# In this order: what fails fastest comes first.
TEST_STEPS := deps verify-generated lint test-unit test-controllers test-e2e

.PHONY: test
test: ## Run everything that CI runs, one step after another.
	+@summary=; \
	for step in $(TEST_STEPS); do \
		echo "==> $$step"; started=$$SECONDS; \
		$(MAKE) --no-print-directory $$step || { echo "==> $$step failed after $$((SECONDS - started)) s"; exit 1; }; \
		took="$$step $$((SECONDS - started)) s"; echo "==> $$took"; summary="$$summary, $$took"; \
	done; \
	echo "==> all passed: $${summary#, }"

# Packages whose tests start an API server.
API_SERVER_TESTS := ./api/... ./controllers/...

.PHONY: test-unit
test-unit: ## Run the tests that need nothing but this repository.
	go test -race $$(go list ./... | grep -vE '^guildhall\.dev/guildhall/(api|controllers|hack/e2e)(/|$$)')
	cd hack/cluster && go test ./...
	cd hack/bench && go test ./...

# Tests that run at the same time mostly wait for what the operator does.
.PHONY: test-controllers
test-controllers: ## Run the tests of the API and the controllers against a real API server.
	assets=$$($(CLUSTER) assets) && KUBEBUILDER_ASSETS=$$assets go test -race -parallel 12 $(API_SERVER_TESTS)

.PHONY: test-e2e
test-e2e: ## Run the end-to-end tests, on a cluster of their own (root).
	@if [ -n "$$(go list ./hack/e2e/... 2>/dev/null)" ]; then \
		set -x; go test -count=1 -timeout 30m ./hack/e2e/...; \
	else \
		echo "no end-to-end tests here"; \
	fi

# How often bench measures each, with how many sessions, and which scenarios.
ROUNDS ?= 3
SESSIONS ?= 1000,5000,15000
ONLY ?= fixed,max,storm,stuck,quiet
# Where bench draws its results, docs/bench.svg for the documentation; empty: nowhere.
PICTURE ?=

.PHONY: bench
bench: ## Compare fan-out with other servers and the bare floor (ROUNDS, SESSIONS, ONLY; PICTURE=docs/bench.svg draws).
	$(GO_BUILD) -o build/bench/shardserver ./shardserver
	go -C hack/bench build -o $(CURDIR)/build/bench/bench .
	build/bench/bench run --shardserver build/bench/shardserver --rounds $(ROUNDS) --sessions $(SESSIONS) \
		--only $(ONLY) --csv build/bench.csv --storm-csv build/storm.csv --picture "$(PICTURE)"

# How often torture kills, and what else it does: go run ./hack/torture -h lists it.
KILLS ?= 500
TORTURE ?=

.PHONY: torture
torture: ## Kill a shard server under load KILLS times and audit what its clients saw (KILLS, TORTURE="--stops 20").
	$(GO_BUILD) -o build/torture/shardserver ./shardserver
	go build -o build/torture/torture ./hack/torture
	build/torture/torture --shardserver build/torture/shardserver --dir build/torture/run --kills $(KILLS) $(TORTURE)

# How often torture-cluster deletes a shard's pod, and how often that gets a successor while it still runs.
DELETIONS ?= 30
SUCCESSORS ?= 20

.PHONY: torture-cluster
torture-cluster: KILLS = 50
torture-cluster: ## The same on the local cluster, with 1,000 sessions (KILLS, DELETIONS, SUCCESSORS).
	go test -count=1 -v -timeout 2h ./hack/e2e -run 'TestShardIsKilled|TestSuccessor' \
		-kills $(KILLS) -deletions $(DELETIONS) -successors $(SUCCESSORS) -sessions 1000 -publishers 64

# How many sessions the guild of torture-relays grows to, how many a relay holds, the events per second, and how often
# the operator is killed while it moves sessions.
GROWTH ?= -crowd 15000 -per-relay 4000 -crowd-rate 5 -publishers 64 -operator-kills 20 -patience 10m

.PHONY: torture-relays
torture-relays: ## Have a guild grow over relays on the local cluster, and shrink, while relays, shard and operator are killed and an image is rolled out (GROWTH).
	go test -count=1 -v -timeout 2h ./hack/e2e -run 'TestRelays|TestCrowd' $(GROWTH)

# The seed of all that is random in simulate.
SEED ?= 1

.PHONY: simulate
simulate: ## Run the relay planner against growth curves of up to 2,000,000 sessions (SEED).
	go run ./hack/simulate --seed $(SEED)

.PHONY: bench-publish
bench-publish: ## Compare publishing with logs on disk, in memory, and a bare append-and-fsync loop (ROUNDS).
	$(GO_BUILD) -o build/bench/shardserver ./shardserver
	go -C hack/bench build -o $(CURDIR)/build/bench/bench .
	build/bench/bench publish --shardserver build/bench/shardserver --rounds $(ROUNDS) --dir build/bench

.PHONY: bench-restart
bench-restart: ## How long a killed shard server takes to serve 1,000 guilds with 10,000,000 events on disk (ROUNDS).
	$(GO_BUILD) -o build/bench/shardserver ./shardserver
	go -C hack/bench build -o $(CURDIR)/build/bench/bench .
	build/bench/bench restart --shardserver build/bench/shardserver --rounds $(ROUNDS) --dir build/bench

# How many sessions a guild has in bench-crowd, on which numbers of relays (empty: as many as they need), and for how long.
CROWD ?= 100000
RELAYS ?=
LENGTH ?= 1m

.PHONY: bench-crowd
bench-crowd: ## One guild's sessions on relays, all on this machine (CROWD, RELAYS=1,2,4,7, LENGTH).
	$(GO_BUILD) -o build/bench/shardserver ./shardserver
	go -C hack/bench build -o $(CURDIR)/build/bench/bench .
	build/bench/bench crowd --shardserver build/bench/shardserver --sessions $(CROWD) --relays "$(RELAYS)" --length $(LENGTH)

# The release, or other commit, that interop has this one work with.
RELEASE ?= $(shell git describe --tags --abbrev=0 2>/dev/null)

.PHONY: interop
interop: ## Have the relays of another release follow this one's shard, and the reverse (RELEASE=<tag or commit>).
	@test -n "$(RELEASE)" || { echo "RELEASE: expected a tag or a commit"; exit 1; }
	rm -rf build/interop && mkdir -p build/interop/src
	git archive $(RELEASE) | tar -x -C build/interop/src
	cd build/interop/src && CGO_ENABLED=0 go build -trimpath -ldflags '-X main.version=$(RELEASE)' -o ../other ./shardserver
	$(GO_BUILD) -o build/interop/this ./shardserver
	go -C hack/bench build -o $(CURDIR)/build/bench/bench .
	@echo "relays of $(RELEASE), this shard:"
	build/bench/bench crowd --shardserver build/interop/this --relayserver build/interop/other --sessions 2000 --relays 2 --every 50ms --length 10s
	@echo "these relays, a shard of $(RELEASE):"
	build/bench/bench crowd --shardserver build/interop/other --relayserver build/interop/this --sessions 2000 --relays 2 --every 50ms --length 10s

##@ Build

# CGO_ENABLED=0: the binaries run in an image that has nothing else.
GO_BUILD := CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)'

.PHONY: build
build: ## Build both binaries into build/.
	$(GO_BUILD) -o build/manager .
	$(GO_BUILD) -o build/shardserver ./shardserver

.PHONY: image
image: build ## Make build/image.tar of both binaries, without a container engine.
	$(CLUSTER) image --name $(IMG) --out $(CURDIR)/build/image.tar --entrypoint /manager --user 65532 \
		$(CURDIR)/build/manager $(CURDIR)/build/shardserver

CONTAINER_TOOL ?= docker

.PHONY: docker-build
docker-build: ## Build the image with Docker, or CONTAINER_TOOL=podman.
	$(CONTAINER_TOOL) build --build-arg VERSION=$(VERSION) --tag $(IMG) .

.PHONY: clean
clean: ## Remove what was built, tools too.
	rm -rf build

##@ A cluster on this machine

.PHONY: cluster-up
cluster-up: ## Start a Kubernetes cluster of this machine alone (root; the first time takes minutes).
	$(CLUSTER) up

.PHONY: cluster-down
cluster-down: ## End that cluster and remove everything that it made.
	$(CLUSTER) down

.PHONY: cluster-load
cluster-load: image ## Make the image and bring it into that cluster.
	$(CLUSTER) load $(CURDIR)/build/image.tar

.PHONY: run
run: ## Show it at work: a cluster, the operator, a shard, a guild and clients.
	go run ./hack/demo

##@ Deployment

.PHONY: install
install: $(KUSTOMIZE) ## Install the CRDs.
	$(KUSTOMIZE) build config/crd | $(KUBECTL) apply --server-side -f -

.PHONY: uninstall
uninstall: ## Remove all guilds and shards, then the CRDs.
	KUBECTL="$(KUBECTL)" hack/undeploy.sh config/crd $(KUSTOMIZE)
uninstall undeploy: $(KUSTOMIZE)

.PHONY: deploy
deploy: $(KUSTOMIZE) ## Deploy the operator with its CRDs, from IMG.
	@# A copy, since setting the image writes to it.
	rm -rf build/deploy && mkdir -p build/deploy && cp -R config build/deploy/
	cd build/deploy/config/default && $(KUSTOMIZE) edit set image controller=$(IMG)
	$(KUSTOMIZE) build build/deploy/config/default | $(KUBECTL) apply --server-side -f -

.PHONY: undeploy
undeploy: ## Remove all guilds and shards, then the operator and the CRDs.
	KUBECTL="$(KUBECTL)" hack/undeploy.sh config/default $(KUSTOMIZE)

# The tools, in the versions that hack/tools pins. golangci-lint has a module of its own: its
# dependencies and the others' contradict each other.

$(CONTROLLER_GEN): hack/tools/go.mod hack/tools/go.sum
	go -C hack/tools build -o $@ sigs.k8s.io/controller-tools/cmd/controller-gen

$(KUSTOMIZE): hack/tools/go.mod hack/tools/go.sum
	go -C hack/tools build -o $@ sigs.k8s.io/kustomize/kustomize/v5

$(GOLANGCI_LINT): hack/tools/lint/go.mod hack/tools/lint/go.sum
	go -C hack/tools/lint build -o $@ sigs.k8s.io/kube-api-linter/cmd/golangci-lint-kube-api-linter
