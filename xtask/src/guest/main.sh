# Second stage: process 1 of the guest, in its final root. Sets up a Debian
# machine with RDMA devices, runs the job and reports its exit status. The host
# has written the job and the settings to the share.

here=/run/xtask
share=$here/share
# Busybox comes first: it is in memory and does not depend on the host.
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

# modprobe can load any module of this kernel, and the chosen flavour of rdma_rxe.
mkdir -p "/lib/modules/$RELEASE"
mount --bind "$MODULES" "/lib/modules/$RELEASE"
if [ -n "$RXE_MODULE" ]; then
	mount --bind "$RXE_MODULE" "$STOCK_RXE"
fi

# Debian's tree does not contain dma_sg. kmod reads its index of that tree, so
# give it an install command; busybox reads modules.dep. The modules that dma_sg
# depends on are already loaded.
if [ -n "$DMA_SG_MODULE" ]; then
	mkdir -p /run/modprobe.d
	echo "install dma_sg insmod $DMA_SG_MODULE" >/run/modprobe.d/dma_sg.conf
	ln -s "$DMA_SG_MODULE" "/lib/modules/$RELEASE/dma_sg.ko"
	echo "dma_sg.ko:" >>"/lib/modules/$RELEASE/modules.dep"
fi

# A kernel that checks itself has kmemleak; every other one checks an allocation every 100 ms.
leaks=/sys/kernel/debug/kmemleak
if [ ! -e $leaks ]; then
	read -r interval </sys/module/kfence/parameters/sample_interval
	[ "$interval" = 100 ] || die "KFENCE has the interval $interval instead of 100 ms"
fi

# The tests need more than the defaults, 64 MiB and 1024 ranges.
echo 65536 >/sys/module/udmabuf/parameters/size_limit_mb
echo 65536 >/sys/module/udmabuf/parameters/list_limit

# The first TCP connections make the kernel initialize its secrets and patch the
# code that checks for them. An emulated CPU that runs this code meanwhile can
# hit the patch's breakpoint ("Oops: int3"), so connect now, with one CPU.
ip link set lo up || die "cannot bring up lo"
for try in 1 2 3; do
	nc -l -p 9 </dev/null >/dev/null 2>&1 &
	sleep 0.05
	nc -w 1 127.0.0.1 9 </dev/null >/dev/null 2>&1
	kill $! 2>/dev/null
done

# A veth pair with an RDMA device on each end; a RoCE MTU of 4096 needs 4200 on the wire. Both addresses are
# local: the rules before the local table send packets for the other end out, and deliver those that arrive.
# Nobody answers neighbour requests, so the entries are permanent.
#
# Busybox's ip has no -batch, so use the host's. Each step has its own message,
# since the guest is gone afterwards.
for tool in /usr/sbin/ip /sbin/ip /usr/bin/ip /bin/ip; do
	[ -x $tool ] && break
done
$tool -batch - <<-END || die "cannot set up the veth pair wire0, wire1"
	link add wire0 address 02:00:00:00:77:01 mtu 4200 type veth peer name wire1 address 02:00:00:00:77:02 mtu 4200
	address add 192.168.77.1/32 dev wire0
	address add 192.168.77.2/32 dev wire1
	address add fd77::1/128 dev wire0 nodad
	address add fd77::2/128 dev wire1 nodad
	link set wire0 up
	link set wire1 up
	neighbour add 192.168.77.2 lladdr 02:00:00:00:77:02 dev wire0 nud permanent
	neighbour add 192.168.77.1 lladdr 02:00:00:00:77:01 dev wire1 nud permanent
	neighbour add fd77::2 lladdr 02:00:00:00:77:02 dev wire0 nud permanent
	neighbour add fd77::1 lladdr 02:00:00:00:77:01 dev wire1 nud permanent
	route add 192.168.77.2 dev wire0 src 192.168.77.1 table 101
	route add 192.168.77.1 dev wire1 src 192.168.77.2 table 102
	route add fd77::2 dev wire0 src fd77::1 table 101
	route add fd77::1 dev wire1 src fd77::2 table 102
	rule add pref 10 iif wire0 lookup local
	rule add pref 11 iif wire1 lookup local
	rule add pref 12 from 192.168.77.1 to 192.168.77.1 lookup local
	rule add pref 13 from 192.168.77.2 to 192.168.77.2 lookup local
	rule add pref 14 to 192.168.77.2 lookup 101
	rule add pref 15 to 192.168.77.1 lookup 102
	rule add pref 20 lookup local
	rule del pref 0
END
$tool -6 -batch - <<-END || die "cannot set up IPv6 rules for wire0, wire1"
	rule add pref 10 iif wire0 lookup local
	rule add pref 11 iif wire1 lookup local
	rule add pref 12 from fd77::1 to fd77::1 lookup local
	rule add pref 13 from fd77::2 to fd77::2 lookup local
	rule add pref 14 to fd77::2 lookup 101
	rule add pref 15 to fd77::1 lookup 102
	rule add pref 20 lookup local
	rule del pref 0
END
# siw is no module of Debian's, so nothing loads what it needs. Later kernels have the checksum built in.
device=rxe
if [ -n "$SIW_MODULE" ]; then
	device=siw
	modprobe -qa crc32c_generic libcrc32c
	insmod "$SIW_MODULE" || die "cannot load siw"
fi
for end in 0 1; do
	echo 1 >/proc/sys/net/ipv4/conf/wire$end/accept_local
	echo 0 >/proc/sys/net/ipv4/conf/wire$end/rp_filter
	rdma link add $device$end type $device netdev wire$end || die "cannot create $device$end on wire$end"
	read -r state </sys/class/infiniband/$device$end/ports/1/state
	[ "$state" = "4: ACTIVE" ] || die "$device$end has port state $state, expected ACTIVE"
done

# An emulated guest boots with one CPU. Those that run already have no such file or say 1.
for cpu in /sys/devices/system/cpu/cpu[0-9]*/online; do
	read -r state <"$cpu" 2>/dev/null || continue
	[ "$state" = 1 ] || echo 1 >"$cpu" || die "cannot start ${cpu%/online}"
done

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
	# Use pipes: a job may open /dev/stderr, and a port can be opened only once.
	mkfifo $here/out $here/err
	port stdout
	cat $here/out >"$port" 3>&- &
	out=$!
	port stderr
	cat $here/err >"$port" 3>&- &
	err=$!
	sh $share/job </dev/null >$here/out 2>$here/err 3>&-
	code=$?
	# Wait until the pipes are empty, at most 2 s: a process that the job left
	# behind may keep them open.
	tries=0
	while [ $tries -lt 40 ] && { [ -d /proc/$out/fd ] || [ -d /proc/$err/fd ]; } &&
		{ kill -0 $out 2>/dev/null || kill -0 $err 2>/dev/null; }; do
		tries=$((tries + 1))
		sleep 0.05
	done
fi
if [ -e $leaks ]; then
	# An object counts as leaked once it is 5 s old. Report leaks, and a lockdep that gave up, as problems.
	sleep 5
	echo scan >$leaks
	echo scan >$leaks
	sed 's/^unreferenced/BUG: kmemleak: &/' $leaks | while read -r line; do echo "<3>$line" >/dev/kmsg; done
	grep -q 'debug_locks: *1' /proc/lockdep_stats || echo "<3>BUG: lockdep is off" >/dev/kmsg
fi
dmesg >$share/dmesg.log 2>/dev/null
sync
echo "exit $code" >&3
stop
