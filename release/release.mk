# `make audit`: what is in the daemon besides its own code.

.PHONY: audit

audit: ## Check licences, duplicates, sources and advisories of dependencies (cargo-deny)
	@release/audit
