#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Builds rdma_rxe.ko with dma-buf import from a distribution's own rxe source.
# The rxe source is copied and a few lines are added to the copy; each place is
# found by a line of text that must be there exactly once, so that a kernel
# this was not written for is refused instead of built wrong.

set -eu

usage() {
	cat >&2 <<-END
	usage: $0 SOURCE HEADERS OUTPUT [MAKE-ARGUMENT...]
	  SOURCE   kernel source that holds drivers/infiniband/sw/rxe, of the
	           very version that HEADERS is for
	  HEADERS  kernel build directory, e.g. /lib/modules/\$(uname -r)/build
	  OUTPUT   work directory; the module ends up as OUTPUT/rdma_rxe.ko
	The compiler is \$CC, or gcc-12. MAKE-ARGUMENTs go to make as they are.
	END
	exit 2
}

die() {
	echo "$0: $*" >&2
	exit 1
}

# hook FILE before|after|replace ANCHOR TEXT
#
# ANCHOR is a whole line of FILE, without its leading blanks. The environment
# carries the strings because awk's -v would take their backslashes apart.
hook() {
	file=$work/$1
	[ -f "$file" ] || die "$1: no such file in $rxe"
	anchor=$3 text=$4 awk -v place="$2" '
		{ line = $0; sub(/^[ \t]+/, "", line); hit = line == ENVIRON["anchor"] }
		hit { found++ }
		hit && place != "after" { print ENVIRON["text"] }
		!(hit && place == "replace") { print }
		hit && place == "after" { print ENVIRON["text"] }
		END { exit found != 1 }
	' "$file" >"$file.hooked" ||
		die "$1: the line \"$3\" is not there exactly once; this rxe differs from the ones the hooks are for"
	mv "$file.hooked" "$file"
}

[ $# -ge 3 ] || usage
here=$(cd "$(dirname "$0")" && pwd)
rxe=$1/drivers/infiniband/sw/rxe
headers=$2
output=$3
shift 3
cc=${CC:-gcc-12}

[ -f "$rxe/rxe_mr.c" ] || die "$rxe does not hold the rxe source"
[ -f "$headers/Makefile" ] || die "$headers is not a kernel build directory (no Makefile)"
for tool in "$cc" make awk strip; do
	command -v "$tool" >/dev/null || die "$tool is not installed"
done

mkdir -p "$output"
output=$(cd "$output" && pwd)
case $output$headers in
*[[:space:]:]*) die "make takes no folder with a blank or a colon in its path: $output, $headers" ;;
esac
work=$output/rxe
rm -rf "$work" "$output/rdma_rxe.ko"
cp -r "$rxe" "$work"
cp "$here/rxe_dmabuf.c" "$here/rxe_dmabuf.h" "$work"

echo 'rdma_rxe-y += rxe_dmabuf.o' >>"$work/Makefile"

hook rxe_verbs.c after '#include "rxe_hw_counters.h"' \
	'#include "rxe_dmabuf.h"'
hook rxe_verbs.c after '.reg_user_mr = rxe_reg_user_mr,' \
	'	.reg_user_mr_dmabuf = rxe_reg_user_mr_dmabuf,'
hook rxe_verbs.c before 'err = ib_device_set_netdev(&rxe->ib_dev, ndev, 1);' \
	'	err = rxe_dmabuf_init_device(dev);
	if (err)
		return err;
'
hook rxe_mr.c after '#include "rxe_loc.h"' \
	'#include "rxe_dmabuf.h"'
hook rxe_mr.c replace 'ib_umem_release(mr->umem);' \
	'	rxe_umem_release(mr->umem);'
# The page array of a large dma-buf comes from kvcalloc(); kvfree() takes both.
hook rxe_mr.c replace 'kfree(mr->page_info);' \
	'	kvfree(mr->page_info);'

# An empty CONFIG_DEBUG_INFO_BTF_MODULES does without pahole and the vmlinux.
make -j"$(nproc)" -C "$headers" M="$work" CC="$cc" CONFIG_RDMA_RXE=m \
	CONFIG_DEBUG_INFO_BTF_MODULES= "$@" modules ||
	die "the build failed; its messages are above"

strip -g -o "$output/rdma_rxe.ko" "$work/rdma_rxe.ko"
echo "$output/rdma_rxe.ko"
