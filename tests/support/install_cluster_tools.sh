#!/usr/bin/env bash
# Installs SLURM, pdsh, ssh and ip for tests/integration/test_clusters.py where this may be done: as root, with apt-get.
# Starts no service. Never fails: what is missing afterwards is named, and its tests are skipped.
set -u
export PATH="$PATH:/usr/sbin:/sbin"
packages=()
need() { command -v "$1" >/dev/null || packages+=("$2"); }
need slurmctld slurm-wlm
need munged munge
need pdsh pdsh
need sshd openssh-server
need ssh openssh-client
need ip iproute2
if [ ${#packages[@]} = 0 ]; then exit 0; fi
give_up() { echo "tests: not installed: ${packages[*]} ($1); what needs them is skipped"; exit 0; }
if [ "$(id -u)" != 0 ]; then give_up "not root"; fi
command -v apt-get >/dev/null || give_up "no apt-get"

log=$(mktemp)
leftovers=("$log")
trap 'rm -f "${leftovers[@]}"' EXIT
policy=/usr/sbin/policy-rc.d # asked by Debian's packages before they start a service
if ! [ -e "$policy" ]; then
    leftovers+=("$policy")
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
install() {
    DEBIAN_FRONTEND=noninteractive timeout 240 apt-get install -y -q --no-install-recommends \
        -o DPkg::Lock::Timeout=60 "${packages[@]}" >"$log" 2>&1 </dev/null
}
start=$SECONDS
install || { timeout 120 apt-get update -q >/dev/null 2>&1; install; } || give_up "apt-get: $(grep -m 1 '^E:' "$log" || tail -n 1 "$log")"
echo "tests: installed ${packages[*]} in $((SECONDS - start)) s"
