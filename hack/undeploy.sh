#!/usr/bin/env bash
# Removes Guildhall from a cluster, or with config/crd only its CRDs. Guilds and
# shards go first, while the operator is there to clean up after them. What it
# has not finished in time loses its finalizer: removal always comes to an end.
# Usage: KUBECTL=kubectl hack/undeploy.sh FOLDER KUSTOMIZE
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$1
kustomize=$2
read -r -a kubectl <<<"${KUBECTL:-kubectl}"
kubectl+=(--request-timeout=30s)

manifests=$("$kustomize" build "$folder")
"${kubectl[@]}" version >/dev/null # without a cluster, end here

for kind in guilds guildshards; do
	resource=$kind.guildhall.dev
	if ! "${kubectl[@]}" get "customresourcedefinition/$resource" >/dev/null 2>&1; then
		continue
	fi
	# The operator gives a finalizer up after 30 s in any case.
	if timeout 120 "${kubectl[@]}" delete "$resource" --all --all-namespaces --timeout=90s; then
		continue
	fi
	echo "the operator did not finish with all $kind; removing their finalizers" >&2
	"${kubectl[@]}" get "$resource" --all-namespaces \
		--output=jsonpath='{range .items[*]}{.metadata.namespace}{" "}{.metadata.name}{"\n"}{end}' |
		while read -r namespace name; do
			"${kubectl[@]}" patch "$resource" "$name" --namespace "$namespace" --type=merge \
				--patch '{"metadata":{"finalizers":null}}' </dev/null || true
		done
done

timeout 240 "${kubectl[@]}" delete --ignore-not-found --timeout=180s -f - <<<"$manifests"
