# `make test-vm`: the tests of VM_TESTS on Debian's kernels, in software emulation (see tests/vm/matrix).

# Integration tests that run in the guests. kernel_matrix prints what the table shows.
VM_TESTS ?= kernel_matrix bpf_lifecycle

# A command or file that must be there, and the Debian package that brings it.
VM_NEEDED := \
	/usr/bin/qemu-system-x86_64:qemu-system-x86 \
	/bin/busybox:busybox-static \
	/sbin/modprobe:kmod \
	/usr/bin/cpio:cpio \
	/usr/bin/xz:xz-utils \
	/usr/bin/zstd:zstd

.PHONY: test-vm

test-vm: setup ## Run the kernel matrix: the BPF tests on Debian's kernels, emulated (root; KERNELS="5.10 6.1 6.12 newest")
	@missing=(); \
	for entry in $(VM_NEEDED); do [[ -e $${entry%:*} ]] || missing+=("$${entry#*:}"); done; \
	if (( $${#missing[@]} )); then \
		if (( EUID != 0 )); then echo "Missing packages (Debian names): $${missing[*]}" >&2; exit 1; fi; \
		echo "Installing: $${missing[*]}"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -q < /dev/null; \
		apt-get install -q -y --no-install-recommends "$${missing[@]}" < /dev/null; \
	fi
	KERNELS="$(KERNELS)" tests/vm/matrix $(VM_TESTS)
