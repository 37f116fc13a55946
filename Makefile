# Every target makes the environment it needs. The first run installs (a few minutes); later ones start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
STAMP := $(VENV)/.installed

.PHONY: venv demo quickstart test test-slow test-release test-browser test-package check docs benchmarks cifar10-study clean

venv: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing fewstep and its development tools into $(VENV)"
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/fewstep demo --out runs/demo

# What the package needs and nothing else, in an environment of its own: one's own network, sampled.
quickstart:
	@test -x .venv-quickstart/bin/python || $(PYTHON) -m venv .venv-quickstart
	@.venv-quickstart/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) torch .
	.venv-quickstart/bin/python examples/01_own_network.py

# One thread and two processes, a test file at a time in each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet -n 2 --dist loadfile

test: $(STAMP)
	$(PYTEST)

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not release"

test-release: $(STAMP)
	FEWSTEP_MUTATIONS=200 $(PYTEST) -m "release or slow"

# The page in a browser: chromium or google-chrome from the system. Without one this fails, where `make test-slow` passes these tests over.
test-browser: $(STAMP)
	@$(PIP) --editable '.[browser]'
	FEWSTEP_BROWSER=required $(BIN)/python -m pytest --quiet -n 0 -m slow tests/apps/page/test_page_browser.py

# Wheel and sdist, left in dist/. RELEASE=v1.2.3 also asks for that version, and for its date in the changelog.
RELEASE ?=
test-package: $(STAMP)
	FEWSTEP_RELEASE=$(RELEASE) FEWSTEP_DIST=dist FEWSTEP_CONSTRAINTS=$(CONSTRAINTS) $(BIN)/python -m pytest --quiet -n 0 -m release tests/hygiene/test_package.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell src tests docs benchmarks examples README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md CITATION.cff mkdocs.yml .github
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/pyright -p pyright-strict.json

# Without --quiet, under which mkdocs counts no warning and --strict never fails.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

ALL := euler,ddim,heun,dpm-solver-2s,dpm-solver-3s,dpm-solver-pp-2m,dpm-solver-pp-3m,unipc-2,unipc-3,deis-3,ipndm,dpm-solver-v3
MULTISTEP := ddim,dpm-solver-pp-2m,dpm-solver-pp-3m,unipc-2,unipc-3,deis-3,ipndm,dpm-solver-v3
FOUR := ddim,dpm-solver-pp-2m,unipc-2,dpm-solver-v3
VARIANTS := dpm-solver-pp-3m,dpm-solver-pp-3m:third_order=corrected,unipc-2,unipc-2:weights=exact,ipndm,ipndm:steps=2,ipndm:steps=3
TWO := dpm-solver-v3:steps=2:predictor=true
V3 := dpm-solver-v3,dpm-solver-v3:steps=1,$(TWO),dpm-solver-v3:predictor=true,dpm-solver-v3:corrector=none,dpm-solver-v3:corrector=same,dpm-solver-v3:corrector=true

benchmarks: $(STAMP)
	$(BIN)/python benchmarks/step_overhead.py --out benchmarks/results/step_overhead.json
	$(BIN)/python benchmarks/kernel_traffic.py --out benchmarks/results/kernel_traffic.json
	$(BIN)/python benchmarks/teacher_quality.py --out benchmarks/results/teacher_quality.json
	$(BIN)/python benchmarks/calibration_cost.py --out benchmarks/results/calibration_cost.json
	$(BIN)/python benchmarks/local_errors.py --out benchmarks/results/local_errors.json
	$(BIN)/python benchmarks/schedule_bounds.py --out benchmarks/results/schedule_bounds.json
	for model in digits-edm digits-ddpm; do \
		$(BIN)/fewstep bench $$model --solver $(FOUR) --grid karras,logsnr,uniform,quadratic,angle --nfe 3,4,15,20 --num 1024 \
			--out benchmarks/results/$$model-optimized && \
		$(BIN)/fewstep bench $$model --solver $(FOUR) --grid optimized --nfe 3,4,5,6,8,10,15,20 --num 1024 \
			--out benchmarks/results/$$model-optimized || exit 1; \
	done
	$(BIN)/fewstep bench digits-edm --solver unipc-2,dpm-solver-v3 --grid optimized,angle,karras,logsnr --nfe 7,12,17 --num 1024 \
		--out benchmarks/results/digits-edm-optimized
	for model in digits-edm digits-ddpm; do \
		$(BIN)/fewstep bench $$model --solver fitted --grid optimized --nfe 3,4,5,6,7,8,9,10 --num 1024 \
			--out benchmarks/results/$$model-fitted || exit 1; \
	done
	$(BIN)/fewstep bench digits-edm --solver fitted --grid optimized --nfe 4,5,6,8,10 --num 1024 --guidance 2 \
		--out benchmarks/results/digits-edm-guidance-2-fitted
	$(BIN)/python benchmarks/fit_study.py --out benchmarks/results/fit_study.json
	$(BIN)/fewstep bench digits-edm --solver $(ALL) --grid karras,logsnr,uniform,quadratic,angle --nfe 1,2 --num 1024 \
		--out benchmarks/results/digits-edm-few
	$(BIN)/fewstep bench digits-flow-map --nfe 1,2,3,4,5,6,8 --num 1024 --out benchmarks/results/digits-flow-map
	$(BIN)/python benchmarks/passes.py digits-flow-map digits-edm --out benchmarks/results/passes.json
	for scale in 1 2 4; do \
		$(BIN)/fewstep bench assets/digits-guided --data digits --solver unipc-2 --grid angle --nfe 5,8,10,20 --num 1024 --guidance $$scale \
			--out benchmarks/results/digits-guided-guidance-$$scale && \
		$(BIN)/fewstep bench digits-edm --solver unipc-2 --grid angle --nfe 5,8,10,20 --num 1024 --guidance $$scale \
			--out benchmarks/results/digits-edm-by-unipc-guidance-$$scale || exit 1; \
	done
	$(BIN)/fewstep bench assets/digits-dsno --num 1024 --out benchmarks/results/digits-dsno
	$(BIN)/python benchmarks/dsno_study.py --out benchmarks/results/dsno_study.json
	$(BIN)/python benchmarks/pipeline_study.py --out benchmarks/results/pipeline_study.json --picture docs/pipeline.png
	$(BIN)/python benchmarks/tuned_models.py --out benchmarks/results/tuned_models
	$(BIN)/fewstep bench digits-edm --solver $(ALL) --grid logsnr,karras,angle --nfe 5,6,8,10 --num 1024 --peers diffusers \
		--out benchmarks/results/digits-edm
	$(BIN)/fewstep bench digits-edm --solver $(MULTISTEP) --grid uniform,quadratic --nfe 5,6,8,10 --num 1024 \
		--out benchmarks/results/digits-edm
	$(BIN)/fewstep bench digits-ddpm --solver $(ALL) --grid logsnr,angle,trailing --nfe 5,6,8,10 --num 1024 --peers diffusers \
		--out benchmarks/results/digits-ddpm
	$(BIN)/fewstep bench digits-ddpm --solver $(MULTISTEP) --grid karras,uniform,quadratic,leading,linspace --nfe 5,6,8,10 --num 1024 \
		--out benchmarks/results/digits-ddpm
	$(BIN)/fewstep bench digits-edm --solver $(MULTISTEP) --grid logsnr,karras,angle --nfe 5,6,8,10 --num 1024 --guidance 2 \
		--out benchmarks/results/digits-edm-guidance-2
	$(BIN)/fewstep bench digits-edm --solver $(VARIANTS) --grid karras,angle --nfe 5,6,8,10 --num 1024 \
		--out benchmarks/results/digits-edm-variants
	$(BIN)/fewstep bench digits-edm --solver $(TWO) --grid logsnr,karras,angle,uniform,quadratic --nfe 5,6,8,10 --num 1024 \
		--out benchmarks/results/digits-edm-two
	$(BIN)/fewstep bench digits-edm --solver $(TWO) --grid logsnr,karras,angle --nfe 5,6,8,10 --num 1024 --guidance 2 \
		--out benchmarks/results/digits-edm-guidance-2-two
	$(BIN)/fewstep bench digits-edm --solver $(V3) --grid logsnr,angle --nfe 5,6,8 --num 512 --out benchmarks/results/digits-edm-v3
	$(BIN)/fewstep bench digits-ddpm --solver $(V3) --grid logsnr,angle --nfe 5,6,8 --num 512 --out benchmarks/results/digits-ddpm-v3
	$(BIN)/fewstep bench digits-edm --solver $(V3) --grid logsnr,angle --nfe 5,6,8 --num 512 --guidance 2 \
		--out benchmarks/results/digits-edm-guidance-2-v3

# The study on CIFAR-10: DATA is the folder of its binary version; PRESET=cpu (more than 6 hours on 2 cores) or gpu. A killed one continues.
PRESET ?= cpu
DATA ?= ../shared/data
cifar10-study: $(STAMP)
	$(BIN)/python -m benchmarks.cifar10.study --preset $(PRESET) --data $(DATA)

clean:
	rm -rf $(VENV) .venv-quickstart site runs dist build .pytest_cache .ruff_cache .hypothesis
