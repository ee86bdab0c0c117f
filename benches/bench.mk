# The benches; included by the Makefile. Figures are printed beside their targets, and nothing fails because of one, but
# for those of single packets: check-figures.
# ARGS goes to the bench: make bench ARGS="--path node-port-remote --rounds 9"

.PHONY: bench bench-quick bench-control bench-api bench-scale bench-netperf bench-packets bench-monitor bench-micro check-figures

bench: setup ## kubelane beside kube-proxy's rules and no proxy: netperf, first connections, plots in target/bench (root, under 20 min)
	cargo bench --features lab --bench compare -- $(ARGS)

# The programs in the kernel are the same in every profile, and tests have built this one.
bench-quick: setup ## The same and bench-control, small and in few rounds, from the debug build: three minutes (root)
	cargo bench --profile dev --features lab --bench compare -- --quick --output target/bench/quick $(ARGS)
	cargo bench --profile dev --features lab --bench control -- --quick --output target/bench/quick

bench-scale: setup ## The daemon at 10,000 Services: first sync, memory, one change (root)
	cargo bench --features lab --bench scale -- $(ARGS)

bench-control: setup ## The control plane at 100 to 100,000 Services, and kube-proxy's rule sets beside it (root, 10 min)
	cargo bench --features lab --bench control -- $(ARGS)

# Requests and bytes are the same in every profile, and tests have built this one.
bench-api: setup ## Requests, connections and bytes that one daemon asks of an API server, and many that come back to one (root)
	cargo bench --profile dev --features lab --bench api -- $(ARGS)

bench-netperf: setup ## netperf through a cluster IP against the pod's address (root)
	cargo bench --features lab --bench netperf -- $(ARGS)

bench-packets: setup ## Nanoseconds in the packet programs, for each way through them (root; ARGS=--record keeps them)
	cargo bench --features lab --bench packets -- $(ARGS)

# Alone on the machine, as far as that can be had: not beside other tests. The dev profile is what they have built.
check-figures: setup ## Fail if the BPF programs cost a tenth more than benches/FIGURES.md says (root, a minute)
	cargo bench --profile dev --features lab --bench packets -- --check $(ARGS)

bench-monitor: setup ## What `kubelane monitor` costs connections, and how many events it keeps up with (root, 3 min)
	cargo bench --features lab --bench monitor -- $(ARGS)

bench-micro: ## Criterion: compile, first sync in memory, one change, parsing
	cargo bench --bench micro -- $(ARGS)
