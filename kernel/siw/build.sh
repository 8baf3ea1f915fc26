#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Builds siw.ko, which Debian's kernels leave out, from the distribution's own source.

set -eu

usage() {
	cat >&2 <<-END
	usage: $0 SOURCE HEADERS OUTPUT [MAKE-ARGUMENT...]
	  SOURCE   kernel source with drivers/infiniband/sw/siw, of exactly the
	           version of HEADERS
	  HEADERS  kernel build directory
	  OUTPUT   work directory; the module ends up as OUTPUT/siw.ko
	The compiler is \$CC, by default the one that built the kernel. MAKE-ARGUMENTs
	are passed to make.
	END
	exit 2
}

[ $# -ge 3 ] || usage
siw=$1/drivers/infiniband/sw/siw
headers=$2
output=$3
shift 3
. "$(dirname "$0")/../common.sh"

[ -f "$siw/siw_main.c" ] || die "SOURCE has no $siw/siw_main.c; name a kernel source that contains siw"
prepare
start_work siw
cp "$siw"/* "$work"
make_module siw CONFIG_RDMA_SIW=m "$@"
