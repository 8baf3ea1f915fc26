#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Builds dma_sg.ko outside of this folder.

set -eu

usage() {
	cat >&2 <<-END
	usage: $0 HEADERS OUTPUT [MAKE-ARGUMENT...]
	  HEADERS  kernel build directory, e.g. /lib/modules/\$(uname -r)/build
	  OUTPUT   work directory; the module ends up as OUTPUT/dma_sg.ko
	The compiler is \$CC, or gcc-12. MAKE-ARGUMENTs go to make as they are.
	END
	exit 2
}

die() {
	echo "$0: $*" >&2
	exit 1
}

[ $# -ge 2 ] || usage
here=$(cd "$(dirname "$0")" && pwd)
headers=$1
output=$2
shift 2
cc=${CC:-gcc-12}

[ -f "$headers/Makefile" ] || die "$headers is not a kernel build directory (no Makefile)"
for tool in "$cc" make strip; do
	command -v "$tool" >/dev/null || die "$tool is not installed"
done

mkdir -p "$output"
output=$(cd "$output" && pwd)
case $output$headers in
*[[:space:]:]*) die "make takes no folder with a blank or a colon in its path: $output, $headers" ;;
esac
work=$output/dma_sg
rm -rf "$work" "$output/dma_sg.ko"
mkdir "$work"
cp "$here/Makefile" "$here"/*.[ch] "$work"

# An empty CONFIG_DEBUG_INFO_BTF_MODULES does without pahole and the vmlinux.
make -j"$(nproc)" -C "$headers" M="$work" CC="$cc" \
	CONFIG_DEBUG_INFO_BTF_MODULES= "$@" modules ||
	die "the build failed; its messages are above"

strip -g -o "$output/dma_sg.ko" "$work/dma_sg.ko"
echo "$output/dma_sg.ko"
