#!/bin/sh
# The programs that some tests need and pip does not have. `make test` calls this: it installs what is missing where it
# may (root, on Debian and its kin), and elsewhere says what will be skipped. No service is started or enabled.
set -eu
PATH=$PATH:/usr/sbin:/usr/local/sbin:/sbin
export PATH

missing=
for part in curl:curl sshd:openssh-server ssh:openssh-client ip:iproute2 nft:nftables redis-server:redis-server chromium:chromium node:nodejs npm:npm bash:bash zsh:zsh fish:fish tcsh:tcsh dropbear:dropbear-bin openssl:openssl systemctl:systemd unshare:util-linux; do
    command -v "${part%%:*}" >/dev/null 2>&1 || missing="$missing ${part#*:}"
done
# A library, which no folder of PATH has.
[ -n "$(find /usr/lib /lib -name libnss_wrapper.so -print -quit 2>/dev/null)" ] || missing="$missing libnss-wrapper"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "not installed, and this cannot install it:$missing; the tests that need it are skipped" >&2
    exit 0
fi
echo "installing$missing (the tests need them) …"
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
DEBIAN_FRONTEND=noninteractive
export DEBIAN_FRONTEND
apt-get -qq update
# shellcheck disable=SC2086  # a list of packages
apt-get -qq install -y --no-install-recommends -o Dpkg::Use-Pty=0 $missing >/dev/null
if [ -d /run/systemd/system ]; then
    for package in $missing; do
        case $package in openssh-server) systemctl -q disable ssh || : ;; redis-server) systemctl -q disable redis-server || : ;; esac
    done
fi
