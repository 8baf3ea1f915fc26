#!/bin/sh
# rustdoc with its unstable options, such as JSON. Cargo starts this as RUSTDOC, so that the variable
# reaches rustdoc alone: set for cargo itself, it would build many dependencies again.
RUSTC_BOOTSTRAP=1 exec rustdoc "$@"
