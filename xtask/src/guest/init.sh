#!/bin/sh
# First stage, in the initramfs: mounts the host's root under an overlay and
# starts the second stage, main.sh, in it.

export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys

# Sets $port to the device of the virtio port with the given name.
port() {
	while :; do
		for file in /sys/class/virtio-ports/*/name; do
			read -r name <"$file" 2>/dev/null || continue
			[ "$name" = "$1" ] || continue
			file=${file%/name}
			port=/dev/${file##*/}
			return
		done
		sleep 0.05
	done
}

die() {
	echo "failed $*" >&3
	sleep 1
	poweroff -f
}

port control
exec 3>"$port"

# The trial of an accelerator ends here: the kernel has started a process.
case $(cat /proc/cmdline) in
*xtask.trial*)
	echo ready >&3
	sleep 60
	;;
esac

load() {
	while read -r module; do
		insmod "/modules/$module.ko" || die "cannot load $module"
	done <"/modules/$1"
}

# The RDMA modules need no file system, so load them while the root is mounted.
load rdma &
load root

options=trans=virtio,version=9p2000.L,msize=512000
mkdir /host /rw /new
mount -t 9p -o "$options,ro,cache=loose" root /host || die "cannot mount the host's root"
mount -t tmpfs -o size=75% rw /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work root /new ||
	die "cannot mount the overlay"

mount --move /dev /new/dev
mount --move /proc /new/proc
mount --move /sys /new/sys
mount -t tmpfs -o mode=755 run /new/run
mkdir -p /new/run/xtask/share /new/run/xtask/bin
mount -t 9p -o "$options,cache=mmap" share /new/run/xtask/share ||
	die "cannot mount the shared folder"
cp -a /bin/. /new/run/xtask/bin/
cp /main.sh /new/run/xtask/

wait
exec switch_root /new /run/xtask/bin/sh /run/xtask/main.sh
