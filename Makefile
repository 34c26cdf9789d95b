# Two commands are enough on a fresh Debian 12: `make demo` and `make test`. Both install what they need.
VENV    := .venv
PYTHON  := $(VENV)/bin/python
BESIDE  := -n 2 --dist loadfile   # two modules of tests at a time: those of labs mostly wait
PACKAGES := conmon crun skopeo nftables libnftables1 iproute2 util-linux busybox-static docker-registry dnsutils curl \
            procps iputils-ping python3-venv apache2-utils strace

.PHONY: demo test check lint types unit bench sim-nightly test-vm proto install clean

demo: install
	$(PYTHON) -m tests.demo

test: install lint types
	$(PYTHON) -m pytest -q $(BESIDE)

check: install lint types unit

lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types:
	$(VENV)/bin/mypy

unit:
	$(PYTHON) -m pytest -q $(BESIDE) -m "not root and not lab and not vm and not sim"

sim-nightly: install
	$(PYTHON) -m tests.sim --seeds 1..10000 --scenario mixed

bench: install
	$(PYTHON) -m tests.bench.scale

test-vm: install
	$(PYTHON) -m tests.vm -- $(CURDIR)/$(PYTHON) -m pytest -q -p no:cacheprovider --color=no --durations=5 $(sort $(wildcard tests/test_vm*.py))

# What is missing is installed once; the stamp is newer than pyproject.toml then.
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@missing=""; for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  echo "installing:$$missing"; \
	  apt-get update -q >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$missing >/dev/null; \
	fi
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

proto: install
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PYTHON) -m grpc_tools.protoc -I. --python_out=. --mypy_out=. proto/*.proto
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PYTHON) -m grpc_tools.protoc -I. --grpc_python_out=. --mypy_grpc_out=. $(addprefix proto/,control.proto dispatch.proto join.proto local.proto raft.proto)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
