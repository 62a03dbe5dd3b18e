# The two commands for newcomers are `make run` and `make test`. Everything else is for those who change the code.

CARGO ?= cargo
# Where cargo puts what it builds; the same rule as cargo's own.
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Seconds that `make fuzz` gives each target.
FUZZ_SECONDS ?= 30
# Options of the benchmark: `make bench BENCH=--quick`.
BENCH ?=

.PHONY: help run build test test-vm test-reference tools bench fuzz docs lint fmt clean

help: ## Show the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

build: ## Build both programs for release
	$(CARGO) build --release --bins

run: ## Build, serve a small image over NBD, show it through a real client, stop
	@tests/tools run
	$(CARGO) build --release --bin qemu-storage-daemon
	@tests/demo $(TARGET)/release/qemu-storage-daemon

tools: ## Install the programs that the tests run against, or say what is missing
	@tests/tools test

test: tools ## Run every test
	$(CARGO) build --workspace --bins
	@rm -f $(abspath $(TARGET))/notes; mkdir -p $(TARGET)
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		TESTS_NOTES=$(abspath $(TARGET))/notes $(CARGO) nextest run --workspace --no-fail-fast; \
	else \
		TESTS_NOTES=$(abspath $(TARGET))/notes $(CARGO) test --workspace --no-fail-fast; \
	fi; status=$$?; \
	RUSTFLAGS="--cfg loom" $(CARGO) test -p block --release --target-dir $(TARGET)/loom --lib gate::model || status=1; \
	if [ -s $(TARGET)/notes ]; then echo "Notes of the tests:"; sort -u $(TARGET)/notes; fi; \
	exit $$status

test-vm: ## Run the tests on real kernels, in a VM; says why where it cannot
	$(CARGO) build -p qemu-storage-daemon -p qemu-pr-helper --bins
	$(CARGO) build -p tests --bin vdpa-driver
	@tests/vm/suite $(abspath $(TARGET))/debug/qemu-pr-helper

test-reference: tools ## Run the same suite against the installed reference
	QSD_UNDER_TEST=$${QSD_REFERENCE:-/usr/bin/qemu-storage-daemon} $(CARGO) test -p tests --no-fail-fast

bench: ## Measure this daemon and the installed reference alternately, and print ratios
	@tests/tools bench
	$(CARGO) build --release --bin qemu-storage-daemon --bin bench
	$(TARGET)/release/bench $(BENCH)

fuzz: ## Fuzz each parser of foreign bytes for FUZZ_SECONDS
	@tests/fuzz/run $(FUZZ_SECONDS)

docs: ## Make the manual pages, the QMP reference, the code's reference, and the book where mdbook is installed
	UPDATE_DOCS=1 $(CARGO) test -p qemu-storage-daemon docs
	UPDATE_DOCS=1 $(CARGO) test -p qemu-pr-helper --test docs
	$(CARGO) doc --workspace --no-deps --document-private-items
	@if command -v mdbook >/dev/null; then mdbook build docs/book; \
	else echo "mdbook is not installed: read the book as it is, from docs/book/src/SUMMARY.md"; fi

lint: ## Check formatting and lints
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

fmt: ## Format the code
	$(CARGO) fmt --all

clean: ## Remove what was built
	$(CARGO) clean
