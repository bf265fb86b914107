# make setup · demo · test · test-full · lint · lock · board · pictures
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# A compiled module is kept between the many processes of a test, whatever a container says of it.
unexport PYTHONDONTWRITEBYTECODE
EXTRAS ?= quantization,pruning,engines,teaching,cluster,dev

.PHONY: setup demo test test-full unit contract integration lint lock board pictures readme clean

setup: $(STAMP)

# Any Python from 3.11 on; torch comes from wherever pip is set up to find it, CPU or CUDA build alike.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: setup
	$(BIN)/slimbench assets fetch
	$(BIN)/slimbench sweep experiment=demo results=runs
	$(BIN)/slimbench board build --results runs --out board

test: setup
	$(BIN)/slimbench assets fetch
	$(BIN)/python -m pytest tests/unit
	$(BIN)/python -m pytest tests/contract tests/cells tests/chaos
	$(BIN)/python -m pytest -m 'not full and not alone' tests/integration
	$(BIN)/python -m pytest -n 0 -m 'alone and not full' tests/integration

# What `make test` leaves out: what a smaller test of it proves too, or what takes minutes.
test-full: test
	$(BIN)/python -m pytest -n 0 -m full tests/unit tests/contract tests/cells tests/chaos tests/cluster tests/integration

unit: setup
	$(BIN)/python -m pytest tests/unit

contract: setup
	$(BIN)/python -m pytest tests/contract tests/cells tests/chaos

integration: setup
	$(BIN)/python -m pytest -m 'not full and not alone' tests/integration
	$(BIN)/python -m pytest -n 0 -m 'alone and not full' tests/integration

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tests/support/house.py

# Bind versions to the code behind them; SAME="why the same numbers come out" where code changed and its version did not.
lock: setup
	$(BIN)/slimbench lock $(if $(SAME),--same '$(SAME)')

board: setup
	$(BIN)/slimbench board build --results results --out board

# The pictures of README and docs, from the records of reference.
pictures: board
	cp board/pareto.png docs/images/front.png
	cp board/sizes.png docs/images/sizes.png
	$(BIN)/slimbench board figures --results results --out board/docs --kind png --only grids --only speedup --only prompt-speedup
	cp board/docs/grids-smollm2-135m-screen*.png docs/images/grids.png
	cp board/docs/speedup-smollm2-135m-speed-crossover.png docs/images/crossover.png
	cp board/docs/prompt-speedup-smollm2-135m-speed-crossover.png docs/images/prompt-crossover.png

# The tables of README and docs, from the records of reference.
readme: setup
	$(BIN)/python -P -m slimbench.leaderboard.tables.readme results README.md docs/engines.md docs/methods.md docs/grids.md

clean:
	rm -rf $(VENV) runs board
