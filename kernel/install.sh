#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Installs a module of this folder on this machine through DKMS, which builds it
# again for each new kernel, or removes it.

set -eu

usage() {
	cat >&2 <<-END
	usage: $0 rxe|dma_sg [KERNEL]
	       $0 --remove rxe|dma_sg
	  KERNEL  a release as printed by uname -r, by default the running one
	END
	exit 2
}

die() {
	echo "$0: $*" >&2
	exit 1
}

remove=
if [ "${1:-}" = --remove ]; then
	remove=yes
	shift
fi
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-}
kernel=${2:-$(uname -r)}
case $folder in
rxe) module=rdma_rxe ;;
dma_sg) module=dma_sg ;;
*) usage ;;
esac
[ "$(id -u)" = 0 ] || die "run this as root"
command -v dkms >/dev/null || die "dkms is not installed; install the package dkms"

name=$(sed -n 's/^PACKAGE_NAME="\(.*\)"$/\1/p' "$here/$folder/dkms.conf")
version=$(sed -n 's/^PACKAGE_VERSION="\(.*\)"$/\1/p' "$here/$folder/dkms.conf")
source=/usr/src/$name-$version

if [ -n "$(dkms status -m "$name" -v "$version" 2>/dev/null)" ]; then
	dkms remove "$name/$version" --all
elif [ -n "$remove" ]; then
	die "$name is not installed"
fi
[ ! -f "$source/dkms.conf" ] || rm -rf "$source"
if [ -n "$remove" ]; then
	echo "removed; \"modprobe -r $module\" unloads it$([ "$folder" = dma_sg ] || echo ", and \"modprobe $module\" then loads the distribution's")"
	exit
fi

mkdir "$source"
cp "$here/common.sh" "$here/$folder"/* "$source"
dkms add "$name/$version"
dkms install "$name/$version" -k "$kernel" ||
	die "DKMS did not install $module for Linux $kernel; the reason is at the end of /var/lib/dkms/$name/$version/build/make.log"
echo "installed; \"modprobe -r $module; modprobe $module\" loads it, and \"$0 --remove $folder\" goes back"
