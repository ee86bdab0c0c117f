# `make fuzz`: libFuzzer on the packet programs, compiled for this machine (ARCHITECTURE.md says what it looks for).

FUZZ_SECONDS ?= 60
# -1: as many inputs as that time allows.
FUZZ_RUNS ?= -1
# 0: another one each time; it is printed.
FUZZ_SEED ?= 0
FUZZ := $(TARGET)/fuzz
FUZZ_SOURCES := $(wildcard tests/fuzz/*.c)
FUZZ_CHECKS := undefined,address -fno-sanitize=alignment -fno-sanitize-recover=all
FUZZ_FLAGS := -O1 -g -Wall -Wextra -Werror -Wno-unknown-attributes -I tests/fuzz/include
# The longest input: a world and 48 packets.
FUZZ_LENGTH := 1544
FUZZ_C := $(FUZZ_SOURCES) $(wildcard tests/fuzz/*.h tests/fuzz/include/bpf/*.h)

.PHONY: fuzz fuzz-corpus

# Only the programs are measured: ways through the harness are no news.
$(FUZZ)/packets: $(FUZZ_C) $(wildcard bpf/*)
	@mkdir -p $(FUZZ)/corpus
	clang $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link,$(FUZZ_CHECKS) -c tests/fuzz/programs.c -o $(FUZZ)/programs.o
	clang $(FUZZ_FLAGS) -fsanitize=fuzzer,$(FUZZ_CHECKS) -fno-sanitize-coverage=inline-8bit-counters,pc-table,trace-cmp \
		$(filter-out %/programs.c %/replay.c,$(FUZZ_SOURCES)) $(FUZZ)/programs.o -o $@

# What it finds is kept in target/fuzz/corpus, for the next run.
fuzz: setup $(FUZZ)/packets ## Fuzz the packet programs for FUZZ_SECONDS (60): executions, coverage and seed are printed
	@if ! $(FUZZ)/packets -max_total_time=$(FUZZ_SECONDS) -runs=$(FUZZ_RUNS) -seed=$(FUZZ_SEED) -max_len=$(FUZZ_LENGTH) -print_final_stats=1 \
		-artifact_prefix=$(FUZZ)/ $(FUZZ)/corpus tests/fuzz/corpus &> $(FUZZ)/log < /dev/null; then \
		grep -vE '^(#[0-9]|INFO|\s*NEW_)' $(FUZZ)/log | tail -n 100 | cut -c 1-600; \
		echo "Once more: $(FUZZ)/packets FILE, with the file that is named above" >&2; \
		exit 1; \
	fi; \
	awk '/^INFO: Seed/ { seed = $$3 } / cov: / { edges = $$4 } /number_of_executed_units/ { runs = $$2 } \
		/average_exec_per_sec/ { speed = $$2 } \
		END { print runs " inputs (" speed " a second), " edges " edges of the programs, seed " seed ": nothing is wrong" }' \
		$(FUZZ)/log

fuzz-corpus: setup $(FUZZ)/packets ## Add to tests/fuzz/corpus what `make fuzz` found new ways with
	$(FUZZ)/packets -merge=1 -use_counters=0 -max_len=$(FUZZ_LENGTH) tests/fuzz/corpus $(FUZZ)/corpus &> $(FUZZ)/log
	@tail -n 1 $(FUZZ)/log
