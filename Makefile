# kubelane: what a checkout needs, on a Debian machine with cargo. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# ip, bpftool and iptables are administrators' tools: su(1) without a dash leaves their directories out.
export PATH := $(PATH):/usr/sbin:/sbin

# A command or file that must be there, or a library of clang's, and the Debian package that brings it.
NEEDED := \
	command:cc:gcc \
	command:clang:clang \
	command:clang-format:clang-format \
	runtime:fuzzer:libclang-rt-dev \
	command:llvm-strip:llvm \
	command:pkg-config:pkg-config \
	command:ip:iproute2 \
	command:iptables:iptables \
	command:nft:nftables \
	command:bpftool:bpftool \
	command:openssl:openssl \
	command:strace:strace \
	command:faketime:faketime \
	file:/usr/lib/cni/portmap:containernetworking-plugins \
	file:/usr/include/libelf.h:libelf-dev \
	file:/usr/include/zlib.h:zlib1g-dev \
	file:/usr/include/linux/bpf.h:linux-libc-dev

# Laboratories of tests that run side by side do not meet. Half of a test is waiting.
TEST_THREADS ?= $(shell n=$$(nproc); echo $$((n < 8 ? 2 * n : 16)))

.PHONY: help setup build manual image-binary demo test test-cluster promtool lint format clean-lab

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup: ## Install what is missing (apt-get, as root)
	@missing=(); \
	for entry in $(NEEDED); do \
		IFS=: read -r kind name package <<< "$$entry"; \
		case $$kind in \
			command) command -v "$$name" > /dev/null || missing+=("$$package") ;; \
			file) [[ -e $$name ]] || missing+=("$$package") ;; \
			runtime) compgen -G "$$(clang -print-runtime-dir 2> /dev/null)/libclang_rt.$$name*.a" > /dev/null || \
				missing+=("$$package") ;; \
		esac; \
	done; \
	command -v cargo > /dev/null || { echo "cargo is missing: install Rust (https://rustup.rs)" >&2; exit 1; }; \
	if (( $${#missing[@]} == 0 )); then exit 0; fi; \
	if (( EUID != 0 )) || ! command -v apt-get > /dev/null; then \
		echo "Missing packages (Debian names): $${missing[*]}" >&2; \
		echo "Install them as root: apt-get update && apt-get install $${missing[*]}" >&2; \
		exit 1; \
	fi; \
	echo "Installing: $${missing[*]}"; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -q < /dev/null; \
	apt-get install -q -y --no-install-recommends "$${missing[@]}" < /dev/null

# Prometheus' own parser. Its Debian package starts a server when it is installed, so that it is only unpacked.
promtool:
	@if command -v promtool > /dev/null || [[ -x target/promtool ]]; then exit 0; fi; \
	unpacked=$$(mktemp -d); trap 'rm -rf "$$unpacked"' EXIT; chmod 755 "$$unpacked"; \
	get() { (cd "$$unpacked" && apt-get download -q prometheus < /dev/null && dpkg -x prometheus_*.deb .) &> "$$unpacked/log"; }; \
	if get || { (( EUID == 0 )) && apt-get update -q < /dev/null > /dev/null && get; }; then \
		mkdir -p target; install -m 755 "$$unpacked/usr/bin/promtool" target/promtool; \
	else \
		echo "promtool cannot be had, the test that needs it will be skipped:" >&2; tail -3 "$$unpacked/log" >&2; \
	fi

build: setup ## Build the daemon in release mode
	cargo build --release

manual: build ## Write manual pages and completions to target/manual
	rm -rf $(TARGET)/manual; mkdir -p $(TARGET)/manual/man8
	$(TARGET)/release/kubelane man --directory $(TARGET)/manual/man8
	for shell in bash zsh fish; do $(TARGET)/release/kubelane completion $$shell > $(TARGET)/manual/kubelane.$$shell; done

# What release/static-binary makes, but with crates that other builds of the profile have made (CARGO_BUILD_BUILD_DIR):
# only the last step differs. Tests put it into an image.
IMAGE_PROFILE ?= dev
IMAGE_FLAGS ?=
ARCHIVES = elf z $(if $(wildcard $(shell cc -print-file-name=libzstd.a)),zstd)
TARGET := $(or $(CARGO_TARGET_DIR),target)

image-binary: setup
	@mkdir -p $(TARGET)/archives
	@for name in $(ARCHIVES); do \
		archive=$$(cc -print-file-name=lib$$name.a); \
		[[ $$archive == /* ]] || { echo "lib$$name.a is missing" >&2; exit 1; }; \
		ln -sf "$$archive" $(TARGET)/archives/; \
	done
	CARGO_BUILD_BUILD_DIR=$(abspath $(TARGET)) CARGO_TARGET_DIR=$(TARGET)/image \
		cargo rustc --profile $(IMAGE_PROFILE) $(IMAGE_FLAGS) --bin kubelane -- \
		-C target-feature=+crt-static -C strip=debuginfo -L native=$(abspath $(TARGET)/archives) \
		$(if $(filter zstd,$(ARCHIVES)),-C link-arg=-lzstd)

demo: setup ## Two nodes in network namespaces, Services on both, requests while backends change (root)
	cargo build --release --features lab
	$(TARGET)/release/kubelane-lab demo --manifests manifests/demo

# What cannot run here says so by itself on stderr, and is counted at the end.
test: setup promtool ## Run every test (those that need namespaces or BPF need root)
	@if (( EUID != 0 )); then echo "Not root: tests that make namespaces, cgroups or BPF programs will be skipped." >&2; fi
	@skips=$$(mktemp); trap 'rm -f "$$skips"' EXIT; \
	KUBELANE_SKIPS="$$skips" cargo test --features lab -- --test-threads=$(TEST_THREADS) < /dev/null; \
	count=$$(wc -l < "$$skips"); \
	echo "All tests passed; $$count skipped for want of something on this machine."; \
	cat "$$skips"

# Objects are made in a namespace of the run, and deleted at its end; pods are namespaces of this machine.
test-cluster: setup ## Kubernetes' own questions to a proxy, with a real API server: KUBECONFIG=FILE (root)
	@if [[ -z "$(KUBECONFIG)" ]]; then echo "Which API server? make test-cluster KUBECONFIG=FILE" >&2; exit 2; fi
	KUBELANE_TEST_KUBECONFIG="$(abspath $(KUBECONFIG))" \
		cargo test --features lab --test conformance -- --test-threads=1 --nocapture < /dev/null

C_SOURCES := $(wildcard bpf/*.[ch] tests/fuzz/*.[ch] tests/fuzz/include/bpf/*.h)

lint: setup ## Check formatting and lints
	cargo fmt --check
	cargo clippy --all-targets --features lab -- -D warnings
	clang-format --dry-run -Werror $(C_SOURCES)
	@status=0; release/lint-workflows .github/workflows/*.yml || status=$$?; \
	case $$status in \
		0) echo "lint: nothing is wrong" ;; \
		3) echo "lint: nothing is wrong; 1 check skipped, for the reason above" ;; \
		*) exit $$status ;; \
	esac

format: setup ## Format Rust and C
	cargo fmt
	clang-format -i $(C_SOURCES)

clean-lab: setup ## Remove what laboratories of killed runs left behind (root)
	cargo run --quiet --features lab --bin kubelane-lab -- sweep

include release/release.mk
include tests/vm/vm.mk
include benches/bench.mk
include tests/fuzz/fuzz.mk
