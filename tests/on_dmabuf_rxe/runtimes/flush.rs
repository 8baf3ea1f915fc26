//! Flushes: the mechanics; only a GPU shows the guarantee.

use std::time::Duration;

use dmabuf_rdma::exporter::{Cuda, Hsa, LevelZero, Runtime, Runtimes};
use dmabuf_rdma::mr::{Access, MemoryRegion, RegionCache, RegionSlice};
use dmabuf_rdma::transfer::{Connection, ConnectionOptions, Error, RequestError};
use gpu_stubs::Stub;

use super::{CUDA, HSA, ZE, clean};
use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::Census;
use crate::common::gpu::Gpu;
use crate::common::peers::domain;
use crate::common::system::run;

/// What the device has counted under a name.
fn counter(name: &str) -> u64 {
    let path = format!("/sys/class/infiniband/rxe0/ports/1/hw_counters/{name}");
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}")).trim().parse().unwrap()
}

#[test]
fn a_flush_reads_each_region_through_the_same_device() {
    let census = Census::take();
    {
        let domain = domain();
        let connection = Connection::new(&domain, Default::default()).unwrap();
        connection.connect(&connection.endpoint()).unwrap();
        let buffers = [heap(8192), heap(8192)];
        let access = [Access::REMOTE, Access::LOCAL_WRITE];
        let regions: Vec<MemoryRegion> = buffers
            .iter()
            .zip(access)
            .map(|(buffer, access)| MemoryRegion::builder(&domain, buffer).access(access).register().unwrap())
            .collect();
        let before = run("rdma", &["resource", "show", "qp"]).lines().count();
        // Sent and received over the same connection, then flushed; the bytes stay as they are.
        buffers[0].map().unwrap().write(0, &[7; 8192]).unwrap();
        let target: RegionSlice = regions[1].slice(4096..).unwrap();
        let receive = connection.recv(&target).unwrap();
        connection.send(regions[0].slice(..4096).unwrap()).unwrap().wait().unwrap();
        receive.wait().unwrap();
        // The counter may lag behind: rxe counts a packet after it has delivered it.
        let before_flushes = counter("sent_pkts");
        let both = RegionSlice::concat([RegionSlice::from(&regions[0]), target.clone()]).unwrap();
        for _ in 0..100 {
            connection.flush(&both).unwrap();
        }
        // Each flush reads two regions: a request and its answer for each.
        let sent = counter("sent_pkts") - before_flushes;
        assert!(sent >= 300, "{sent} packets: the device reads through itself");
        // One queue pair more, however many flushes.
        assert_eq!(run("rdma", &["resource", "show", "qp"]).lines().count(), before + 1);
        let mut seen = [0; 4096];
        buffers[1].map().unwrap().read(4096, &mut seen).unwrap();
        assert_eq!(seen, [7; 4096]);
        // Each half of a connection may flush.
        let (_sender, receiver) = connection.split();
        receiver.flush(&both).unwrap();

        let other = crate::common::peers::domain();
        let foreign = MemoryRegion::builder(&other, &buffers[0]).access(Access::REMOTE).register().unwrap();
        let mixed = RegionSlice::concat([target, foreign.into()]).unwrap();
        let message = assert_refused!(
            receiver.flush(&mixed),
            Error::Request(RequestError::ForeignRegion { offset: 4096 })
        );
        assert!(message.contains("another protection domain"), "{message}");
        receiver.flush(&both).unwrap();
    }
    census.assert_unchanged();
}

/// Memory found by its pointer is flushed as any other.
#[test]
fn memory_of_a_pointer_is_flushed() {
    clean(&CUDA, || {
        let (cuda, cache) = (Cuda::load().unwrap(), RegionCache::default());
        let memory = cuda.memory(1 << 20).unwrap();
        let connection = Connection::new(&domain(), Default::default()).unwrap();
        connection.connect(&connection.endpoint()).unwrap();
        let slice =
            cache.get_pointer(connection.domain(), &cuda, memory.address(), 4096, Access::REMOTE).unwrap();
        connection.write(&slice, slice.remote()).unwrap().timeout(Duration::from_secs(20)).wait().unwrap();
        connection.flush(&slice).unwrap();
    });
}

/// A notification of the peer, then a flush of what it announces.
#[test]
fn what_a_notification_announces_is_flushed() {
    clean(&CUDA, || {
        let (cuda, cache) = (Cuda::load().unwrap(), RegionCache::default());
        let memory = cuda.memory(1 << 20).unwrap();
        let options = ConnectionOptions::default().notifications(16);
        let connection = Connection::new(&domain(), options).unwrap();
        connection.connect(&connection.endpoint()).unwrap();
        let get = |offset| {
            let address = memory.address() + offset;
            cache.get_pointer(connection.domain(), &cuda, address, 4096, Access::REMOTE).unwrap()
        };
        let (from, to) = (get(0), get(8192));
        memory.fill(..4096, 0x5a5a_5a5a).unwrap();
        connection.write_notify(&from, to.remote(), 7).unwrap().wait().unwrap();
        let (_sender, receiver) = connection.split();
        receiver.wait_flushed(7, 1, Duration::from_secs(20), &to).unwrap();
        // SAFETY: the stub maps its memory for the processor, and nothing writes it now.
        let seen = unsafe { std::slice::from_raw_parts((memory.address() + 8192) as *const u8, 4096) };
        assert_eq!(seen, [0x5a; 4096]);
        let none = receiver.wait_flushed(7, 1, Duration::from_millis(10), &to);
        assert_refused!(none, Error::NotificationTimeout { .. });
    });
}

#[test]
fn drivers_flush_where_they_can() {
    let flushed = |stub: &Stub, runtime: &dyn Runtime, address: u64| {
        let before = stub.flushes();
        let info = runtime.find(address).unwrap().unwrap();
        let answer = runtime.flush(&info).unwrap();
        assert_eq!(stub.flushes() - before, i32::from(answer));
        answer
    };
    let _ = (&*HSA, &*ZE);
    clean(&CUDA, || {
        for (device, options, answer) in [(0, 0, false), (1, 1, true), (0, 2, false), (0, 3, true)] {
            CUDA.set("flush", options);
            let cuda = Cuda::load().unwrap().with_device(device).unwrap();
            let memory = cuda.memory(1 << 20).unwrap();
            assert_eq!(flushed(&CUDA, &cuda, memory.address() + 9), answer, "options {options}");
            let mapped = super::mapped::Reservation::mapped(1, device as i32);
            assert_eq!(flushed(&CUDA, &cuda, mapped.base), answer);
            let info = cuda.find(memory.address()).unwrap().unwrap();
            if answer {
                assert!(Runtimes::loaded().unwrap().flush(&info).unwrap(), "through all runtimes");
                CUDA.refuse("cuFlushGPUDirectRDMAWrites", 999);
                assert!(cuda.flush(&info).is_err());
            }
            drop(memory);
            assert!(cuda.flush(&info).is_err(), "freed");
        }
        CUDA.set("flush", 0);
    });
    // SAFETY: the type in the stub's source.
    let hdp = || unsafe { HSA.function::<unsafe extern "C" fn() -> u32>("stub_hdp")() };
    clean(&HSA, || {
        let hsa = Hsa::load().unwrap();
        let memory = hsa.memory(1 << 20).unwrap();
        assert_eq!(hdp(), 0);
        let info = hsa.find(memory.address()).unwrap().unwrap();
        assert_eq!((hsa.flush(&info).unwrap(), hdp()), (true, 1), "the register was written");
        drop((memory, hsa));
        // An accelerator without the register.
        HSA.set("hdp", 0);
        let hsa = Hsa::load().unwrap();
        HSA.set("hdp", 1);
        let memory = hsa.memory(1 << 20).unwrap();
        assert!(!hsa.flush(&hsa.find(memory.address()).unwrap().unwrap()).unwrap());
    });
    clean(&ZE, || {
        let ze = LevelZero::load().unwrap();
        let memory = ze.memory(1 << 20).unwrap();
        assert!(!ze.flush(&ze.find(memory.address()).unwrap().unwrap()).unwrap());
    });
}
