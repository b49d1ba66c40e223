# make demo                  a container in a microVM of its own, from a fresh Debian 12 or 13
# make node                  a shell with containerd and Bulkhead ready: on this machine if its KVM is good, else on an
#                            emulated node (ON=host or ON=node: just there)
#   RUN='command'            runs one command there instead; make tells its exit code
#   SHARE=directory          puts a directory of this machine at /share in both
# make test                  all that CI checks
#   TEST=name                only the tests whose names contain it
# make bench                 counts what a start, the network and the streams of a container cost, on the emulated node, and
#                            fails if a budget (tests/budgets.toml) is broken
#   ROW=name                 only the rows whose names begin with it
# make install               the runtime, for a containerd of yours
#   DESTDIR=directory        below which the files go, for packages
# make format                lays out the sources

cargo := tests/cargo
node := $(cargo) run --quiet --locked --package bulkhead-tests --bin node --
export ON SHARE
# As it was typed: a $ in it is the shell's.
override export RUN := $(value RUN)

.PHONY: demo node test lint unit e2e bench install format

demo:
	@$(node) demo $${ON:+--on "$$ON"}

node:
	@$(node) run $${ON:+--on "$$ON"} $${SHARE:+--share "$$SHARE"} -- $${RUN:+"$$RUN"}

test: $(if $(TEST),,lint) unit e2e

lint:
	$(cargo) fmt --all --check
	@# A clippy of another version than the compiler's, which may be installed beside it, cannot read what that makes.
	@version=$$($(cargo) version | sed 's/^cargo 1\.\([0-9]*\).*/\1/'); \
	if $(cargo) clippy --version 2>/dev/null | grep -q "^clippy 0\.1\.$$version\>"; then \
	  set -x; $(cargo) clippy --locked --workspace --all-targets -- --deny warnings && \
	  $(cargo) clippy --locked --package bulkhead-tests --test e2e --test bench -- --deny warnings; \
	else echo "cargo clippy 0.1.$$version is not installed: not checked with it"; fi

# What the tests call apart from what every Debian has.
unit:
	@tests/install busybox-static e2fsprogs erofs-utils
	$(cargo) test --locked --workspace -- $(TEST)

# Where `make node` would run a command. (Not an exported variable: `unit` would inherit it.)
e2e: unit
	CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='$(CURDIR)/tests/on-node' \
	  $(cargo) test --locked --package bulkhead-tests --test e2e -- $(TEST)

bench:
	@start=$$(date +%s); \
	COUNTING=1 ON= CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='$(CURDIR)/tests/on-node' \
	  $(cargo) test --quiet --locked --package bulkhead-tests --test bench -- $(ROW); \
	code=$$?; echo "Took $$(($$(date +%s) - start)) s."; exit $$code

install:
	@stage=$$(mktemp -d) && trap 'rm -r "$$stage"' EXIT && $(node) stage "$$stage" && set -x && \
	install -D -t '$(DESTDIR)/usr/local/bin' "$$stage/bin/bulkhead" "$$stage/bin/containerd-shim-bulkhead-v2" && \
	install -D -t '$(DESTDIR)/usr/lib/bulkhead' "$$stage/bin/bulkhead-vmm" && \
	install -D -m 644 -t '$(DESTDIR)/usr/lib/bulkhead' "$$stage"/lib/*

format:
	$(cargo) fmt --all
