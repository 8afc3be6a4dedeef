#!/usr/bin/env bash
# Checks that generated files are what the code generates: makes them anew in a
# copy of the tree and compares. Usage: hack/verify-generated.sh CONTROLLER_GEN
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
controller_gen=$1

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
tar --create --exclude=./.git --exclude=./build --exclude=node_modules . | tar --extract --directory "$copy"
make --no-print-directory -C "$copy" generate CONTROLLER_GEN="$controller_gen" --old-file="$controller_gen" >"$copy/log" 2>&1 ||
	{ cat "$copy/log" >&2; exit 1; }

stale=0
for folder in api config; do
	diff --recursive --unified --new-file "$folder" "$copy/$folder" || stale=1
done
if [ "$stale" -ne 0 ]; then
	echo "generated files are not current (above: what is there, and what should be): run \"make generate\"" >&2
	exit 1
fi
echo "generated files are current"
