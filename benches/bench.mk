# The benches; included by the Makefile. Figures are printed beside their targets, nothing fails because of one.
# ARGS goes to the bench: make bench-scale ARGS="--services 1000 --layout one"

.PHONY: bench-api bench-scale bench-netperf bench-micro

bench-scale: setup ## The daemon at 10,000 Services: first sync, memory, one change (root)
	cargo bench --features lab --bench scale -- $(ARGS)

bench-api: setup ## The daemon on an API server with 10,000 Services: first sync, memory, changes, idle (root)
	cargo bench --features lab --bench api -- $(ARGS)

bench-netperf: setup ## netperf through a cluster IP against the pod's address (root)
	cargo bench --features lab --bench netperf -- $(ARGS)

bench-micro: ## Criterion: compile, first sync in memory, one change, parsing
	cargo bench --bench micro -- $(ARGS)
