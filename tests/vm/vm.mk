# `make test-vm`: the tests of VM_TESTS on Debian's kernels, in software emulation (see tests/vm/matrix).

# Integration tests that run in the guests. kernel_matrix prints what the table shows.
VM_TESTS ?= kernel_matrix packet::devices packet::remote packet::verdicts

# Tests of these that do not run there: they send tens of thousands of packets, which takes minutes in emulation, and
# ask about arithmetic and table sizes, which are the same on every kernel.
VM_SKIP ?= \
	one_clients_ports_never_meet_and_a_port_used_again_is_given_the_same_one \
	many_clients_share_the_range_until_established_ones_fill_it \
	a_flood_of_unproved_flows_takes_places_from_itself_only

# A command or file that must be there, and the Debian package that brings it.
VM_NEEDED := \
	/usr/bin/qemu-system-x86_64:qemu-system-x86 \
	/bin/busybox:busybox-static \
	/sbin/modprobe:kmod \
	/usr/bin/cpio:cpio \
	/usr/bin/xz:xz-utils \
	/usr/bin/zstd:zstd

.PHONY: test-vm test-arm64

test-vm: setup ## Run the BPF tests on Debian's kernels, emulated, and a virtual machine as a pod (root; KERNELS="5.10 6.1 6.12 newest")
	@missing=(); \
	for entry in $(VM_NEEDED); do [[ -e $${entry%:*} ]] || missing+=("$${entry#*:}"); done; \
	if (( $${#missing[@]} )); then \
		if (( EUID != 0 )); then echo "Missing packages (Debian names): $${missing[*]}" >&2; exit 1; fi; \
		echo "Installing: $${missing[*]}"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -q < /dev/null; \
		apt-get install -q -y --no-install-recommends "$${missing[@]}" < /dev/null; \
	fi
	KERNELS="$(KERNELS)" VM_SKIP="$(strip $(VM_SKIP))" tests/vm/matrix $(VM_TESTS)
	tests/vm/pods

# Its own small world instead of the tests: these would have to be built for arm64, too.
test-arm64: setup ## Boot Debian's arm64 kernel, emulated, and have the daemon of `make static-binary` serve there (root)
	@command -v cpio > /dev/null || apt-get install -q -y --no-install-recommends cpio < /dev/null
	release/static-binary arm64
	tests/vm/boot-arm64 $(TARGET)/static/arm64/kubelane $(TARGET)/vm-arm64
