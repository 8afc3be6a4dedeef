#!/usr/bin/env bash
# Installs the Debian packages that building and testing need and the machine
# lacks; without root or apt-get it says what to install.
set -euo pipefail

missing=()
# need PACKAGE COMMAND...: the command works when the package is there.
need() {
	local package=$1
	shift
	"$@" >/dev/null 2>&1 || missing+=("$package")
}
need git git --version
need gcc gcc --version # the race detector needs cgo
need libc6-dev sh -c "echo '#include <stdlib.h>' | gcc -E -"
need pkg-config pkg-config --version
need libseccomp-dev pkg-config --exists libseccomp # runc
need nftables nft --version                        # the cluster's network
need conntrack conntrack --version
need iproute2 ip -Version
need mount mount --version
need nodejs node --version # discord.js, as a client in the end-to-end tests
need npm npm --version

if [ ${#missing[@]} -eq 0 ]; then
	echo "no package is missing"
elif [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
	echo "installing ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q
	apt-get install -q --yes --no-install-recommends "${missing[@]}"
else
	echo "missing packages: ${missing[*]}" >&2
	echo "install them as root: apt-get install ${missing[*]}" >&2
	exit 1
fi
