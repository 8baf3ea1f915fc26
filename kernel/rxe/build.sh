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
	  SOURCE   kernel source of the version of HEADERS, a folder or an archive;
	           "auto" looks for it in /usr/src
	  HEADERS  kernel build directory, e.g. /lib/modules/\$(uname -r)/build
	  OUTPUT   work directory; the module ends up as OUTPUT/rdma_rxe.ko
	The compiler is \$CC, by default the one that built the kernel. MAKE-ARGUMENTs
	are passed to make.
	END
	exit 2
}

# The source of $version on this machine: a folder, or the archive of the
# packages linux-source-6.12 (Debian) and linux-source-6.8.0 (Ubuntu).
find_source() {
	series=$(echo "$version" | cut -d. -f1,2)
	for place in "$headers" "/usr/src/linux-$version" "/usr/src/linux-source-$version" \
		/usr/src/linux-source-"$series".tar.* /usr/src/linux-source-"$series".0/linux-source-"$series".0.tar.*; do
		if [ -f "$place" ] || [ -f "$place/drivers/infiniband/sw/rxe/rxe_mr.c" ]; then
			source=$place
			return
		fi
	done
	case $(sed -n 's/^ID=//p' /etc/os-release) in
	debian) die "install the package linux-source-$series of the kernel's version" ;;
	ubuntu) die "install the package linux-source-$series.0 of the kernel's version" ;;
	*) die "unpack the distribution's kernel source, or linux-$version.tar.xz of kernel.org, in /usr/src/linux-$version" ;;
	esac
}

# hook FILE before|after|replace ANCHOR TEXT
#
# ANCHOR is a whole line of FILE without its leading blanks. awk gets the strings
# from the environment, since -v would interpret their backslashes.
hook() {
	file=$work/$1
	[ -f "$file" ] || die "rxe has no file $1, so the hooks do not fit Linux $version"
	anchor=$3 text=$4 awk -v place="$2" '
		{ line = $0; sub(/^[ \t]+/, "", line); hit = line == ENVIRON["anchor"] }
		hit { found++ }
		hit && place != "after" { print ENVIRON["text"] }
		!(hit && place == "replace") { print }
		hit && place == "after" { print ENVIRON["text"] }
		END { exit found != 1 }
	' "$file" >"$file.hooked" ||
		die "$1: the line \"$3\" does not occur exactly once, so the hooks do not fit Linux $version; README.md lists the kernels that work"
	mv "$file.hooked" "$file"
}

[ $# -ge 3 ] || usage
here=$(cd "$(dirname "$0")" && pwd)
source=$1
headers=$2
output=$3
shift 3
# An installed copy has its own common.sh.
common=$here/common.sh
[ -f "$common" ] || common=$here/../common.sh
. "$common"

prepare
[ "$source" != auto ] || find_source
start_work rxe
if [ -f "$source" ]; then
	# An archive of a whole kernel source, as Debian and Ubuntu package it.
	mkdir "$work/source"
	tar -xf "$source" -C "$work/source" --strip-components=1 --wildcards --no-wildcards-match-slash \
		'*/Makefile' '*/drivers/infiniband/sw/rxe/*' 2>/dev/null ||
		die "SOURCE $source is not a kernel source archive that contains rxe"
	source=$work/source
fi
rxe=$source/drivers/infiniband/sw/rxe
[ -f "$rxe/rxe_mr.c" ] || die "SOURCE has no $rxe/rxe_mr.c; name a kernel source that contains rxe"
[ -f "$source/Makefile" ] ||
	die "SOURCE $source has no Makefile, which states its version; name the top folder of the kernel source"
found=$(makefile_version "$source/Makefile")
[ "$found" = "$version" ] ||
	die "SOURCE is Linux $found and HEADERS are Linux $version; both must have the same version"
cp "$rxe"/* "$here"/rxe_dmabuf.[ch] "$work"
cat "$here/features.mk" >>"$work/Makefile"

grep -q 'page_info;' "$work/rxe_verbs.h" || grep -q 'struct xarray[[:space:]]*page_list;' "$work/rxe_verbs.h" ||
	die "rxe of Linux $version keeps the pages of a region in a way that rxe_dmabuf.c does not know; README.md lists the kernels that work"

hook rxe_verbs.h after 'struct ib_umem		*umem;' \
	'	bool			umem_is_dmabuf;'
hook rxe_verbs.c after '#include "rxe_hw_counters.h"' \
	'#include "rxe_dmabuf.h"'
hook rxe_verbs.c after '.reg_user_mr = rxe_reg_user_mr,' \
	'	.reg_user_mr_dmabuf = rxe_reg_user_mr_dmabuf,'
hook rxe_verbs.c before 'err = ib_device_set_netdev(&rxe->ib_dev, ndev, 1);' \
	'	err = rxe_dmabuf_init_device(dev);
	if (err)
		return err;
'
hook rxe_verbs.c before 'if (flags & IB_MR_REREG_PD) {' \
	'	if (rxe_mr_check_rereg(mr, flags, access))
		return ERR_PTR(rxe_mr_check_rereg(mr, flags, access));
'
hook rxe_mr.c after '#include "rxe_loc.h"' \
	'#include "rxe_dmabuf.h"'
hook rxe_mr.c replace 'ib_umem_release(mr->umem);' \
	'	rxe_mr_release_umem(mr);'
if grep -q 'static void rxe_mr_init(' "$work/rxe_mr.c"; then
	hook rxe_mr.c replace 'static void rxe_mr_init(int access, struct rxe_mr *mr)' \
		'void rxe_mr_init(int access, struct rxe_mr *mr)'
fi
# A mapped queue may outlive its context and its device.
hook rxe_mmap.c replace 'struct rxe_dev *rxe = to_rdev(ip->context->device);' \
	'	struct rxe_dev *rxe;

	if (list_empty(&ip->pending_mmaps)) {
		vfree(ip->obj);
		kfree(ip);
		return;
	}
	rxe = to_rdev(ip->context->device);'
# kvcalloc() allocates the page array of a dma-buf; kvfree() frees either kind.
if grep -q 'kfree(mr->page_info);' "$work/rxe_mr.c"; then
	hook rxe_mr.c replace 'kfree(mr->page_info);' \
		'	kvfree(mr->page_info);'
fi

make_module rdma_rxe CONFIG_RDMA_RXE=m "$@"
