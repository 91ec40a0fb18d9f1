# Everything one does with this repository. `make` lists it.

PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
BINDIR ?= $(PREFIX)/bin
DATADIR ?= $(PREFIX)/share
DOCDIR ?= $(DATADIR)/doc/layered-stores
MANDIR ?= $(DATADIR)/man
UNITDIR ?= $(PREFIX)/lib/systemd/system
DBUSSERVICEDIR ?= $(DATADIR)/dbus-1/system-services
DBUSINTERFACEDIR ?= $(DATADIR)/dbus-1/interfaces
# systemd and the bus's service files are found below /usr/local; the bus's policies are not (dbus-daemon(1)).
ifeq ($(PREFIX),/usr/local)
DBUSPOLICYDIR ?= $(SYSCONFDIR)/dbus-1/system.d
else
DBUSPOLICYDIR ?= $(DATADIR)/dbus-1/system.d
endif
# polkit before version 125 does not look below /usr/local: POLKITDIR=/usr/share/polkit-1/actions there.
POLKITDIR ?= $(DATADIR)/polkit-1/actions
BASHCOMPLETIONDIR ?= $(DATADIR)/bash-completion/completions
ZSHCOMPLETIONDIR ?= $(DATADIR)/zsh/site-functions
FISHCOMPLETIONDIR ?= $(DATADIR)/fish/vendor_completions.d

CARGO ?= cargo
INSTALL ?= install

executables := layered-stores layered-storesd layered-stores-remount layered-stores-index
units := layered-storesd.service layered-stores-wait.service layered-stores.target layered-stores-nix-daemon@.service \
	layered-stores-index@.service layered-stores-index@.socket layered-stores-gc@.service layered-stores-gc@.timer \
	layered-stores-metrics.timer layered-stores-metrics.service layered-stores-metrics.socket layered-stores-metrics@.service
interfaces := $(notdir $(wildcard data/org.layeredstores1.*.xml))
documents := $(wildcard README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE)

release := target/release
venv := target/venv/bin
# Files that begin with #! and end their first line in the name of a shell.
shell_scripts = $(shell find . \( -path ./target -o -path ./.git \) -prune -o -type f -exec \
	awk 'FNR == 1 { if (/^\#!.*[\/ ](bash|dash|sh)$$/) print FILENAME; nextfile }' {} +)
# The driver and the scenarios have a check of their own.
python_scripts = nix/check-format tools/check-docs tools/dbus-reference tools/limits tools/mutants $(wildcard demo/*.py benches/*.py)
xml_files = $(wildcard data/*.xml data/*.conf data/*.policy)

# For every recipe: programs that rustup and Debian put elsewhere, the driver of the test machines, and no bytecode in
# the source tree.
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin:/usr/sbin:/sbin
export PYTHONPATH := $(CURDIR)/nixos-tests
export PYTHONDONTWRITEBYTECODE := 1

heading = @printf '\n==> %s\n'

.DEFAULT_GOAL := help
# Steps follow one another, so that the first failure is the last thing on the screen.
.NOTPARALLEL:
.PHONY: help build install uninstall deb docs lint audit test test-unit test-scenarios test-kernels mutants demo bench clean \
	setup-test

help: ## this list
	@echo 'make TARGET, where TARGET is'
	@sed -En 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18
	@echo
	@echo 'install and uninstall take DESTDIR= and PREFIX=$(PREFIX).'

# Without cargo, as under sudo, what was built before is installed.
build: ## the executables, into target/release
	@if command -v $(CARGO) >/dev/null || [ ! -x $(release)/layered-storesd ]; then \
		set -x; $(CARGO) build --release --locked; \
	else \
		echo '$(CARGO) is not in PATH: taking $(release) as it is'; \
	fi

install: build ## executables, units, D-Bus and polkit files, man pages, completions
	@set -e; \
	into() { $(INSTALL) -d "$(DESTDIR)$$1"; }; \
	into $(BINDIR); \
	for file in $(executables); do \
		$(INSTALL) -m 755 $(release)/$$file "$(DESTDIR)$(BINDIR)/$$file"; \
	done; \
	generated=$$(mktemp -d); trap 'rm -r "$$generated"' EXIT; \
	into $(UNITDIR); \
	for unit in $(units); do \
		[ ! -e data/$$unit.in ] || sed 's|@BINDIR@|$(BINDIR)|g' data/$$unit.in >"$$generated/$$unit"; \
		[ -e data/$$unit.in ] || cp data/$$unit "$$generated/$$unit"; \
		$(INSTALL) -m 644 "$$generated/$$unit" "$(DESTDIR)$(UNITDIR)/$$unit"; \
	done; \
	into $(DBUSPOLICYDIR); \
	$(INSTALL) -m 644 data/org.layeredstores1.conf "$(DESTDIR)$(DBUSPOLICYDIR)"; \
	into $(DBUSSERVICEDIR); \
	$(INSTALL) -m 644 data/org.layeredstores1.service "$(DESTDIR)$(DBUSSERVICEDIR)"; \
	into $(DBUSINTERFACEDIR); \
	for file in $(interfaces); do $(INSTALL) -m 644 data/$$file "$(DESTDIR)$(DBUSINTERFACEDIR)"; done; \
	into $(POLKITDIR); \
	$(INSTALL) -m 644 data/org.layeredstores1.policy "$(DESTDIR)$(POLKITDIR)"; \
	mkdir "$$generated/man" "$$generated/completions"; \
	$(release)/layered-stores generate-man "$$generated/man"; \
	for section in 1 5 8; do \
		into $(MANDIR)/man$$section; \
		$(INSTALL) -m 644 "$$generated"/man/*.$$section "$(DESTDIR)$(MANDIR)/man$$section"; \
	done; \
	$(release)/layered-stores generate-completions "$$generated/completions"; \
	into $(BASHCOMPLETIONDIR); into $(ZSHCOMPLETIONDIR); into $(FISHCOMPLETIONDIR); \
	cd "$$generated/completions"; \
	$(INSTALL) -m 644 layered-stores.bash "$(DESTDIR)$(BASHCOMPLETIONDIR)/layered-stores"; \
	$(INSTALL) -m 644 _layered-stores "$(DESTDIR)$(ZSHCOMPLETIONDIR)"; \
	$(INSTALL) -m 644 layered-stores.fish "$(DESTDIR)$(FISHCOMPLETIONDIR)"; \
	cd "$(CURDIR)"; \
	into $(DOCDIR)/examples; \
	$(INSTALL) -m 644 $(documents) "$(DESTDIR)$(DOCDIR)"; \
	into $(DOCDIR)/docs/images; \
	$(INSTALL) -m 644 $(wildcard docs/*.md) "$(DESTDIR)$(DOCDIR)/docs"; \
	into $(DOCDIR)/docs/metrics; \
	$(INSTALL) -m 644 $(wildcard docs/metrics/*) "$(DESTDIR)$(DOCDIR)/docs/metrics"; \
	$(INSTALL) -m 644 $(wildcard docs/images/*.svg) "$(DESTDIR)$(DOCDIR)/docs/images"; \
	$(INSTALL) -m 644 data/config.toml "$(DESTDIR)$(DOCDIR)/examples"; \
	echo 'installed into $(DESTDIR)$(PREFIX)'; \
	[ -n "$(DESTDIR)" ] || echo 'now: systemctl daemon-reload && systemctl reload dbus && systemctl enable --now layered-storesd'

# The mounts are units of their own and stay, as they do when the daemon ends.
uninstall: ## what install installed, stopped and disabled before; stores and their configuration stay
	@[ -n "$(DESTDIR)" ] || ! command -v systemctl >/dev/null || { set -x; \
		systemctl stop 'layered-stores-gc@*.timer' 'layered-stores-gc@*.service'; \
		systemctl stop 'layered-stores-nix-daemon@*.socket' 'layered-stores-nix-daemon@*.service' 'layered-stores-index@*'; \
		systemctl disable --now $(filter-out %@.service %@.socket %@.timer,$(units)) || true; \
		rm -f $(SYSCONFDIR)/systemd/system/timers.target.wants/layered-stores-gc@*.timer; }
	rm -f $(addprefix $(DESTDIR)$(BINDIR)/,$(executables))
	rm -f $(addprefix $(DESTDIR)$(UNITDIR)/,$(units))
	rm -f $(DESTDIR)$(DBUSPOLICYDIR)/org.layeredstores1.conf
	rm -f $(DESTDIR)$(DBUSSERVICEDIR)/org.layeredstores1.service
	rm -f $(addprefix $(DESTDIR)$(DBUSINTERFACEDIR)/,$(interfaces))
	rm -f $(DESTDIR)$(POLKITDIR)/org.layeredstores1.policy
	rm -f $(DESTDIR)$(MANDIR)/man1/layered-stores*.1 $(DESTDIR)$(MANDIR)/man5/layered-stores.toml.5 $(DESTDIR)$(MANDIR)/man8/layered-stores*.8
	rm -f $(DESTDIR)$(BASHCOMPLETIONDIR)/layered-stores
	rm -f $(DESTDIR)$(ZSHCOMPLETIONDIR)/_layered-stores
	rm -f $(DESTDIR)$(FISHCOMPLETIONDIR)/layered-stores.fish
	rm -rf $(DESTDIR)$(DOCDIR)
	@[ -n "$(DESTDIR)" ] || ! command -v systemctl >/dev/null || systemctl daemon-reload
	@echo 'stores that are up stay mounted until the next boot: findmnt --types overlay'

# What is in the package is what install makes, so there is one list of files.
deb: ## a Debian package, into target/debian
	@tools/setup deb
	rm -rf target/deb-root
	@$(MAKE) --no-print-directory install DESTDIR="$(CURDIR)/target/deb-root" PREFIX=/usr
	cargo-deb --no-build --no-strip --quiet --output target/debian/

docs: ## the manual as a book, into target/book
	@tools/setup docs
	mdbook build docs
	@echo 'written: target/book/index.html'

setup-test:
	@tools/setup test

lint: setup-test ## formatting, clippy, dependencies, documents, spelling, shell, Python, Nix, XML
	$(heading) 'lint: formatting'
	$(CARGO) fmt --all --check
	$(heading) 'lint: clippy'
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(heading) 'lint: documentation'
	RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' $(CARGO) doc --workspace --no-deps --document-private-items --locked
	$(heading) 'lint: dependencies (make audit asks for advisories, over the network)'
	$(CARGO) deny --locked check bans licenses sources
	$(heading) 'lint: documents'
	tools/check-docs --self-test
	tools/check-docs
	$(heading) 'lint: spelling'
	$(venv)/typos
	$(heading) 'lint: shell'
	shellcheck $(shell_scripts)
	$(heading) 'lint: Python'
	RUFF_CACHE_DIR=target/ruff $(venv)/ruff check --quiet --config nixos-tests/driver/ruff.toml $(python_scripts)
	RUFF_CACHE_DIR=target/ruff $(venv)/ruff format --check --quiet --config nixos-tests/driver/ruff.toml $(python_scripts)
	MYPYPATH=nixos-tests $(venv)/mypy --strict --scripts-are-modules --no-error-summary --python-version=3.11 \
		--cache-dir=target/mypy $(python_scripts)
	python3 -m driver check
	$(heading) 'lint: Nix'
	nix/check-format
	$(heading) 'lint: XML'
	python3 -c 'import sys, xml.dom.minidom as xml; [xml.parse(file) for file in sys.argv[1:]]' $(xml_files)

audit: ## known vulnerabilities of dependencies, over the network
	$(CARGO) deny --locked check advisories

test-unit: setup-test ## unit, property and integration tests
	$(heading) 'test: unit, property and integration tests'
	$(CARGO) nextest run --workspace --locked
	$(CARGO) test --doc --workspace --locked

test-scenarios: setup-test ## the scenarios of nixos-tests/ on a booted Debian; needs root
	$(heading) 'test: scenarios on a booted Debian'
	@python3 -m driver run $(SCENARIOS)

# A kernel, and the Debian that it runs under. Every instruction is emulated: this takes an afternoon.
KERNELS ?= 6.1/trixie 6.12/trixie sid/sid
test-kernels: ## some scenarios with other kernels, in qemu; needs root and much time
	@tools/setup kernels
	$(heading) 'test: the test machine, and what a power cut takes from its disk'
	@python3 -m driver selftest
	@failed=; for kernel in $(KERNELS); do \
		printf '\n==> test: scenarios with the kernel %s\n' "$$kernel"; \
		python3 -m driver run --kernel "$${kernel%/*}" --suite "$${kernel#*/}" \
			$(or $(SCENARIOS),basic remount gapless stack restart killpoints powercut) || failed="$$failed $$kernel"; \
	done; [ -z "$$failed" ] || { echo "failed with the kernels$$failed"; exit 1; }

# Each mutant is built and tested: hours for all. FILES='src/supervisor/plan.rs' examines a part.
mutants: ## what the Rust tests do not see when it breaks, compared with tools/mutants.txt; needs root and much time
	@tools/setup mutants
	$(heading) 'mutants: what no test sees'
	@tools/mutants $(FILES)

test: ## everything: lint, test-unit, test-scenarios
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test-unit
	@$(MAKE) --no-print-directory test-scenarios

demo: ## a layered store on a booted Debian, shown step by step; needs root
	@tools/setup demo
	@python3 demo/demo.py

bench: ## measurements against mount(8) and systemd; needs root
	@tools/setup demo
	@python3 benches/run.py

clean: ## target/, with the images of test machines
	rm -rf target
