#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Builds rdma_rxe.ko with dma-buf import from a distribution's own rxe source.
# The script copies the source and inserts hooks into the copy. Each hook has an
# anchor line that must occur exactly once, so the script refuses a kernel that
# the hooks were not written for.

set -eu

usage() {
	cat >&2 <<-END
	usage: $0 SOURCE HEADERS OUTPUT [MAKE-ARGUMENT...]
	  SOURCE   kernel source with drivers/infiniband/sw/rxe, of exactly the
	           version of HEADERS
	  HEADERS  kernel build directory, e.g. /lib/modules/\$(uname -r)/build
	  OUTPUT   work directory; the module ends up as OUTPUT/rdma_rxe.ko
	The compiler is \$CC, by default gcc-12. MAKE-ARGUMENTs are passed to make.
	END
	exit 2
}

die() {
	echo "$0: $*" >&2
	exit 1
}

# hook FILE before|after|replace ANCHOR TEXT
#
# ANCHOR is a whole line of FILE without its leading blanks. awk gets the strings
# from the environment, since -v would interpret their backslashes.
hook() {
	file=$work/$1
	[ -f "$file" ] || die "$rxe has no file $1, so the hooks do not fit this kernel version"
	anchor=$3 text=$4 awk -v place="$2" '
		{ line = $0; sub(/^[ \t]+/, "", line); hit = line == ENVIRON["anchor"] }
		hit { found++ }
		hit && place != "after" { print ENVIRON["text"] }
		!(hit && place == "replace") { print }
		hit && place == "after" { print ENVIRON["text"] }
		END { exit found != 1 }
	' "$file" >"$file.hooked" ||
		die "$1: the line \"$3\" does not occur exactly once, so the hooks do not fit this kernel version; see README.md for the versions that work"
	mv "$file.hooked" "$file"
}

[ $# -ge 3 ] || usage
here=$(cd "$(dirname "$0")" && pwd)
rxe=$1/drivers/infiniband/sw/rxe
headers=$2
output=$3
shift 3
cc=${CC:-gcc-12}

[ -f "$rxe/rxe_mr.c" ] || die "SOURCE has no $rxe/rxe_mr.c; name a kernel source that contains rxe"
[ -f "$headers/Makefile" ] ||
	die "HEADERS $headers has no Makefile; name a kernel build directory such as /lib/modules/$(uname -r)/build"
for tool in "$cc" make awk strip; do
	command -v "$tool" >/dev/null || die "$tool is not installed; install it, or set CC to another compiler"
done

mkdir -p "$output"
output=$(cd "$output" && pwd)
case $output$headers in
*[[:space:]:]*) die "make cannot build in a path with a blank or a colon, use another folder: $output, $headers" ;;
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
# kvcalloc() allocates the page array of a dma-buf; kvfree() frees either kind.
hook rxe_mr.c replace 'kfree(mr->page_info);' \
	'	kvfree(mr->page_info);'

# With CONFIG_DEBUG_INFO_BTF_MODULES empty the build needs neither pahole nor vmlinux.
make -j"$(nproc)" -C "$headers" M="$work" CC="$cc" CONFIG_RDMA_RXE=m \
	CONFIG_DEBUG_INFO_BTF_MODULES= "$@" modules ||
	die "make failed for $headers; see its messages above"

strip -g -o "$output/rdma_rxe.ko" "$work/rdma_rxe.ko"
echo "$output/rdma_rxe.ko"
