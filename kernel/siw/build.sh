#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Builds siw.ko, which Debian's kernels leave out, from the distribution's own source.

set -eu

die() {
	echo "$0: $*" >&2
	exit 1
}

[ $# -ge 3 ] || {
	cat >&2 <<-END
	usage: $0 SOURCE HEADERS OUTPUT [MAKE-ARGUMENT...]
	  SOURCE   kernel source with drivers/infiniband/sw/siw, of exactly the
	           version of HEADERS
	  HEADERS  kernel build directory
	  OUTPUT   work directory; the module ends up as OUTPUT/siw.ko
	The compiler is \$CC, by default gcc-12. MAKE-ARGUMENTs are passed to make.
	END
	exit 2
}
siw=$1/drivers/infiniband/sw/siw
headers=$2
output=$3
shift 3

[ -f "$siw/siw_main.c" ] || die "SOURCE has no $siw/siw_main.c; name a kernel source that contains siw"
mkdir -p "$output"
output=$(cd "$output" && pwd)
work=$output/siw
[ -e "$work" ] && die "$work exists; name another OUTPUT"
cp -r "$siw" "$work"
make -j"$(nproc)" -C "$headers" M="$work" CC="${CC:-gcc-12}" CONFIG_RDMA_SIW=m \
	CONFIG_DEBUG_INFO_BTF_MODULES= "$@" modules ||
	die "make failed for $headers; see its messages above"
strip -g -o "$output/siw.ko" "$work/siw.ko"
echo "$output/siw.ko"
