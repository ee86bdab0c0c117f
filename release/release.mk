# `make image`, `make release`, `make audit`: what others get, and what is in it. CONTRIBUTING.md says how a release is
# made. Tools come from Debian's newer suites, unpacked below target/tools and never installed (release/unpack).

HOST_ARCH := $(shell dpkg --print-architecture 2> /dev/null)
# An engine needs no newer suite than its own; cross compilers are Debian's for this suite.
ENGINE := $(TARGET)/tools/engine
RELEASE_ARCHES ?= amd64 arm64
ARCH ?= $(HOST_ARCH)
# Where the images will be: the manifests name it. The version is its tag.
RELEASE_IMAGE ?= kubelane
# The tag that is released (v0.2.0): it must be this tree's version, and have notes in CHANGELOG.md.
RELEASE_TAG ?=
# More files to release.
RELEASE_EXTRA ?=
export RELEASE_IMAGE RELEASE_TAG RELEASE_EXTRA RELEASE_ARCHES

.PHONY: static-binary static-binaries engine image image-twice release audit

static-binary: setup ## Build the daemon for ARCH (amd64, arm64; this machine's) as one static file, target/static/*/kubelane
	release/static-binary $(ARCH)

static-binaries: setup
	@set -e; for arch in $(RELEASE_ARCHES); do release/static-binary $$arch; done

engine:
	@release/unpack trixie $(ENGINE) buildah podman crun

image: static-binaries engine ## Build the image for amd64 and arm64 with buildah, target/image.oci.tar (root)
	release/build-image $(ENGINE) $(TARGET)/image.oci.tar $(RELEASE_ARCHES)

# Cargo keeps what it has built: the second time only this crate is compiled. With REBUILD=all everything is.
image-twice: image ## Build the image again, and compare the bytes (root; REBUILD=all: dependencies, too)
	@cp $(TARGET)/image.oci.tar $(TARGET)/image-first.oci.tar
	$(if $(filter all,$(REBUILD)),rm -rf $(TARGET)/static/build,touch src/lib.rs src/main.rs build.rs)
	$(MAKE) image
	cmp $(TARGET)/image-first.oci.tar $(TARGET)/image.oci.tar
	@echo "The image is the same, byte for byte."

release: image ## Make all files of a release, target/release-files (root; RELEASE_TAG=v0.1.0, RELEASE_IMAGE=registry.example/kubelane)
	release/make-release

audit: ## Check licences, duplicates, sources and advisories of dependencies (cargo-deny)
	@release/audit
