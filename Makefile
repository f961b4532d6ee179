# Copyright: (c) 2026, blockops.qemu contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Every target does its own set-up. The work is done by the small scripts in scripts/.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint sanity units integration bench build clean

help: ## Show this list
	@printf 'make TARGET, where TARGET is one of\n\n'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '%-14s %s\n' "$$name" "$$text"; done

setup: ## Install missing packages, make .venv, link the collection
	@scripts/setup

demo: setup ## Back up two running VMs, lose a disk, restore it, boot again
	@scripts/demo

test: setup ## All checks and tests: lint, sanity, pytest
	@scripts/test

lint: setup ## ruff, mypy, yamllint, shellcheck, ansible-lint, antsibull
	@scripts/lint

sanity: setup ## ansible-test sanity, without ignore files
	@scripts/ansible-test sanity

units: setup ## Unit and architecture tests (seconds)
	@scripts/pytest tests/unit tests/architecture

integration: setup ## Every integration target against real QEMUs
	@scripts/pytest tests/integration

bench: setup ## Measure speed beside other tools; prints a table
	@PYTHONPATH=tests .venv/bin/python -m bench

build: setup ## Build the collection's tarball into dist/
	@.venv/bin/ansible-galaxy collection build --force --output-path dist

clean: ## Remove everything that the other targets made in this checkout
	@rm -rf .ansible .cache .collections .mypy_cache .pytest_cache .ruff_cache .venv dist tests/output tests/integration/inventory \
		changelogs/.plugin-cache.yaml
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
