#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Builds dma_sg.ko in a folder of your choice.

set -eu

usage() {
	cat >&2 <<-END
	usage: $0 HEADERS OUTPUT [MAKE-ARGUMENT...]
	  HEADERS  kernel build directory, e.g. /lib/modules/\$(uname -r)/build
	  OUTPUT   work directory; the module ends up as OUTPUT/dma_sg.ko
	The compiler is \$CC, by default gcc-12. MAKE-ARGUMENTs are passed to make.
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

[ -f "$headers/Makefile" ] ||
	die "HEADERS $headers has no Makefile; name a kernel build directory such as /lib/modules/$(uname -r)/build"
for tool in "$cc" make strip; do
	command -v "$tool" >/dev/null || die "$tool is not installed; install it, or set CC to another compiler"
done

mkdir -p "$output"
output=$(cd "$output" && pwd)
case $output$headers in
*[[:space:]:]*) die "make cannot build in a path with a blank or a colon, use another folder: $output, $headers" ;;
esac
work=$output/dma_sg
rm -rf "$work" "$output/dma_sg.ko"
mkdir "$work"
cp "$here/Makefile" "$here"/*.[ch] "$work"

# With CONFIG_DEBUG_INFO_BTF_MODULES empty the build needs neither pahole nor vmlinux.
make -j"$(nproc)" -C "$headers" M="$work" CC="$cc" \
	CONFIG_DEBUG_INFO_BTF_MODULES= "$@" modules ||
	die "make failed for $headers; see its messages above"

strip -g -o "$output/dma_sg.ko" "$work/dma_sg.ko"
echo "$output/dma_sg.ko"
