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
	The compiler is \$CC, by default the one that built the kernel. MAKE-ARGUMENTs
	are passed to make.
	END
	exit 2
}

[ $# -ge 2 ] || usage
here=$(cd "$(dirname "$0")" && pwd)
headers=$1
output=$2
shift 2
# An installed copy has its own common.sh.
common=$here/common.sh
[ -f "$common" ] || common=$here/../common.sh
. "$common"

prepare
start_work dma_sg
cp "$here/Makefile" "$here"/*.[ch] "$work"
make_module dma_sg "$@"
