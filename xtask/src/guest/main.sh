# Second stage: process 1 of the guest, in its final root. Brings up what a
# Debian machine with an RDMA device would have, runs the job, tells its
# verdict. The host has written the job and its settings into the share.

here=/run/xtask
share=$here/share
# Busybox first: it is in memory, and the same whatever the host has.
export PATH=$here/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
. $share/settings

port() {
	for file in /sys/class/virtio-ports/*/name; do
		read -r name <"$file"
		[ "$name" = "$1" ] || continue
		file=${file%/name}
		port=/dev/${file##*/}
		return
	done
	die "no port $1"
}

stop() {
	exec 3>&-
	while :; do sleep 60; done
}

die() {
	echo "failed $*" >&3
	stop
}

hostname guest
mkdir -p /dev/pts /dev/shm /dev/hugepages
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t hugetlbfs hugetlbfs /dev/hugepages
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
mount -t configfs configfs /sys/kernel/config
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/self/fd/0 /dev/stdin
ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr

# Any module of this kernel can be loaded with modprobe, rdma_rxe in the
# flavour that the guest was started with.
mkdir -p "/lib/modules/$RELEASE"
mount --bind "$MODULES" "/lib/modules/$RELEASE"
if [ -n "$RXE_MODULE" ]; then
	mount --bind "$RXE_MODULE" "$STOCK_RXE"
fi

# A module that Debian's tree does not have. kmod has an index of that tree, so
# it is told what to run instead; busybox reads the list. What dma_sg needs is
# loaded already.
mkdir -p /run/modprobe.d
echo "install dma_sg insmod $DMA_SG_MODULE" >/run/modprobe.d/dma_sg.conf
ln -s "$DMA_SG_MODULE" "/lib/modules/$RELEASE/dma_sg.ko"
echo "dma_sg.ko:" >>"/lib/modules/$RELEASE/modules.dep"

# The defaults, 64 MiB and 1024 pieces, are less than the tests use.
echo 65536 >/sys/module/udmabuf/parameters/size_limit_mb
echo 65536 >/sys/module/udmabuf/parameters/list_limit

# The first TCP connections have the kernel draw its secrets and then patch the
# code that asks for them. An emulated processor that runs that code meanwhile
# can trip over the patch ("Oops: int3"), so it is done now, while all is quiet.
ip link set lo up || die "cannot bring up lo"
for try in 1 2 3; do
	nc -l -p 9 </dev/null >/dev/null 2>&1 &
	sleep 0.05
	nc -w 1 127.0.0.1 9 </dev/null >/dev/null 2>&1
	kill $! 2>/dev/null
done

# An RDMA device with a RoCE MTU of 4096, which takes 4200 on the wire. A
# message of its own for each step, since a guest cannot be looked into later.
[ -d /sys/class/net/dummy0 ] || ip link add dummy0 type dummy || die "cannot make dummy0"
ip link set dummy0 mtu 4200 || die "cannot set the MTU of dummy0"
ip addr add 192.168.77.1/24 dev dummy0 || die "cannot give dummy0 an address"
ip link set dummy0 up || die "cannot bring up dummy0"
rdma link add rxe0 type rxe netdev dummy0 || die "cannot make rxe0"
read -r state </sys/class/infiniband/rxe0/ports/1/state
[ "$state" = "4: ACTIVE" ] || die "rxe0 is not active: $state"

ulimit -Hn 1048576
ulimit -c 0
export OUT=$share/out DMABUF_RDMA_RXE="$RXE"

echo "ready" >&3
if [ -n "$TERMINAL" ]; then
	(
		exec 3>&- </dev/hvc0 >/dev/hvc0 2>&1
		stty rows "$ROWS" cols "$COLUMNS" 2>/dev/null
		exec setsid -c sh $share/job
	)
	code=$?
else
	# Through pipes, because a port cannot be opened twice and a job may well
	# open /dev/stderr.
	mkfifo $here/out $here/err
	port stdout
	cat $here/out >"$port" 3>&- &
	out=$!
	port stderr
	cat $here/err >"$port" 3>&- &
	err=$!
	sh $share/job </dev/null >$here/out 2>$here/err 3>&-
	code=$?
	# Whatever is still in the pipes; a process left behind may hold them open.
	tries=0
	while [ $tries -lt 40 ] && { [ -d /proc/$out/fd ] || [ -d /proc/$err/fd ]; } &&
		{ kill -0 $out 2>/dev/null || kill -0 $err 2>/dev/null; }; do
		tries=$((tries + 1))
		sleep 0.05
	done
fi
dmesg >$share/dmesg.log 2>/dev/null
sync
echo "exit $code" >&3
stop
