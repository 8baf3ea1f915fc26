# SPDX-License-Identifier: GPL-2.0
#
# What the build.sh of rxe, dma_sg and siw share; they source it.

die() {
	echo "$0: $*" >&2
	exit 1
}

# The version that a kernel's Makefile states, such as 6.12.117.
makefile_version() {
	awk -F '[ \t]*=[ \t]*' '
		$1 ~ /^(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION)$/ && !($1 in v) { v[$1] = $2 }
		END { print v["VERSION"] "." v["PATCHLEVEL"] "." v["SUBLEVEL"] v["EXTRAVERSION"] }
	' "$1"
}

# Checks $headers, sets $version to its kernel version and $cc to the compiler.
prepare() {
	[ -f "$headers/Makefile" ] ||
		die "HEADERS $headers has no Makefile; name a kernel build directory such as /lib/modules/$(uname -r)/build"
	config=$headers/include/config/auto.conf
	[ -f "$config" ] || die "HEADERS $headers has no include/config/auto.conf; it is not a configured kernel build directory"
	for tool in make awk sed strip; do
		command -v "$tool" >/dev/null || die "$tool is not installed; install it"
	done
	version=$(make -s --no-print-directory -C "$headers" kernelversion 2>/dev/null) ||
		die "HEADERS $headers does not state a kernel version; is it complete?"
	choose_compiler
}

# $CC, or the compiler that built the kernel: another one may not know its options.
choose_compiler() {
	built=$(sed -n 's/^CONFIG_CC_VERSION_TEXT="\{0,1\}\([^"]*\)"\{0,1\}$/\1/p' "$config")
	llvm=
	if [ -n "${CC:-}" ]; then
		cc=$CC
		command -v "$cc" >/dev/null || die "the compiler $cc is not installed; install it, or set CC to another one"
		return
	fi
	case $built in
	*clang*)
		llvm=LLVM=1
		cc=clang
		command -v clang >/dev/null || die "\"$built\" built this kernel; install clang, lld and llvm, or set CC"
		return
		;;
	esac
	# Such as "gcc-12 (Debian 12.2.0-14) 12.2.0", "gcc (GCC) 15.2.1 20250808 (Red Hat 15.2.1-1)".
	major=$(echo "$built" | sed 's/^[^(]*([^)]*) *//; s/\..*//')
	for cc in "${built%% *}" "gcc-$major" gcc; do
		if command -v "$cc" >/dev/null && [ "$("$cc" -dumpversion | cut -d. -f1)" = "$major" ]; then
			return
		fi
	done
	die "\"$built\" built this kernel; install gcc-$major, or set CC to another compiler"
}

# Makes an empty $work below $output. Removes only a folder that an earlier run made.
start_work() {
	mkdir -p "$output"
	output=$(cd "$output" && pwd)
	case $output$headers in
	*[[:space:]:]*) die "make cannot build in a path with a blank or a colon, use another folder: $output, $headers" ;;
	esac
	work=$output/$1
	if [ -e "$work" ] && [ ! -f "$work/.made-by-build.sh" ]; then
		die "$work exists, and this script did not make it; name another OUTPUT"
	fi
	rm -rf "$work"
	mkdir "$work"
	touch "$work/.made-by-build.sh"
}

# Builds $work/$1.ko and leaves it, stripped, as $output/$1.ko.
make_module() {
	module=$1
	shift
	# With CONFIG_DEBUG_INFO_BTF_MODULES empty the build needs neither pahole nor vmlinux.
	if ! make -j"$(nproc)" -C "$headers" M="$work" CC="$cc" $llvm \
		CONFIG_DEBUG_INFO_BTF_MODULES= "$@" modules >"$work/make.log" 2>&1; then
		# The Makefiles of this repository end with such a line for a kernel that they do not know.
		reason=$(sed -n 's/^.*\*\*\* \(.*)\)\.  Stop\.$/\1/p' "$work/make.log" | head -n 1)
		die "${reason:-$module.ko does not compile for Linux $version with $cc; README.md lists the kernels that work, and make's messages are in $work/make.log}"
	fi
	strip -g -o "$output/$module.ko" "$work/$module.ko"
	echo "$output/$module.ko"
}
