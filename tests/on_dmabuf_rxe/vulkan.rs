//! A real Vulkan driver, Mesa's lavapipe, and GBM.

use std::ops::Range;
use std::sync::LazyLock;

use dma_sg::RangeError;
use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::vulkan::{ash, export_raw};
use dmabuf_rdma::exporter::{Error, Exporter, Gbm, PointerError, Udmabuf, Vulkan};

use crate::assert_refused;
use crate::common::buffers::heap;
use crate::common::census::{Census, fds};
use crate::common::drm::card;
use crate::common::peers::Peers;
use crate::common::system::{Setting, unprivileged};
use crate::common::{assert_same, contents, pattern};

const SIZE: u64 = 1 << 20;

/// One device for all tests, because making one takes seconds under emulation.
static VULKAN: LazyLock<Vulkan> = LazyLock::new(|| {
    Vulkan::by_name("llvmpipe").expect("Mesa's lavapipe, which `cargo xtask test` brings; --vulkan for vm")
});

/// A word for each page.
fn words() -> Vec<(Range<u64>, u32)> {
    let page = |number: u64| number * 4096..(number + 1) * 4096;
    (0..SIZE / 4096).map(|number| (page(number), (number as u32 + 3).wrapping_mul(0x9e37_79b1))).collect()
}

/// The bytes of a buffer filled with these words.
fn bytes() -> Vec<u8> {
    words().into_iter().flat_map(|(_, word)| word.to_le_bytes().repeat(1024)).collect()
}

#[test]
fn a_peer_reads_what_the_device_wrote() {
    let peers = Peers::new();
    for vulkan in [VULKAN.clone(), VULKAN.clone().with_host_visible_memory()] {
        let buffer = vulkan.buffer(SIZE).unwrap();
        buffer.fill_each(words()).unwrap();
        let exported = buffer.export().unwrap();
        assert_eq!((exported.size(), exported.exporter_name().unwrap().as_str()), (SIZE, "udmabuf"));
        assert!(exported.is_writable());
        let other = heap(SIZE);
        peers.read(&peers.register(&exported), &peers.register(&other));
        assert_same(&contents(&other), &bytes(), "what the device wrote");
    }
}

#[test]
fn the_device_reads_what_a_peer_wrote() {
    let peers = Peers::new();
    let (from, to) = (VULKAN.buffer(SIZE).unwrap(), VULKAN.buffer(SIZE).unwrap());
    let source = heap(SIZE);
    source.map().unwrap().write(0, &pattern(SIZE as usize, 41)).unwrap();
    let exported = from.export().unwrap();
    peers.write(&peers.register(&source), &peers.register(&exported));
    // The device copies it, and the test reads the copy.
    to.copy_from(&from).unwrap();
    assert_same(&contents(&to.export().unwrap()), &pattern(SIZE as usize, 41), "what the device copied");
}

#[test]
fn an_imported_dmabuf_is_device_memory() {
    let ours = Udmabuf::open().unwrap().allocate(SIZE).unwrap().dmabuf;
    ours.map().unwrap().write(0, &pattern(SIZE as usize, 42)).unwrap();
    let imported = VULKAN.import(&ours).unwrap();
    let copy = VULKAN.buffer(SIZE).unwrap();
    copy.copy_from(&imported).unwrap();
    assert_same(&contents(&copy.export().unwrap()), &pattern(SIZE as usize, 42), "what the device read");
    imported.fill_each(words()).unwrap();
    assert_same(&contents(&ours), &bytes(), "what the device wrote into our buffer");
    // Lavapipe returns success and no descriptor here.
    assert_refused!(imported.export(), Error::Pointer(PointerError::NotExportable { .. }));
}

/// The test makes a device as an application does, and memory of it.
#[test]
fn memory_of_an_applications_device_is_exported() {
    use ash::vk;
    const DMA_BUF: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;
    // SAFETY: all objects are made here, used by one thread, and destroyed at the end.
    unsafe {
        let entry = ash::Entry::load().unwrap();
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
        let info = vk::InstanceCreateInfo::default().application_info(&application);
        let instance = entry.create_instance(&info, None).unwrap();
        let physical = instance.enumerate_physical_devices().unwrap()[0];
        let priorities = [1.0];
        let queues = [vk::DeviceQueueCreateInfo::default().queue_priorities(&priorities)];
        let extensions =
            [ash::khr::external_memory_fd::NAME.as_ptr(), ash::ext::external_memory_dma_buf::NAME.as_ptr()];
        let info =
            vk::DeviceCreateInfo::default().queue_create_infos(&queues).enabled_extension_names(&extensions);
        let device = instance.create_device(physical, &info, None).unwrap();
        let mut export = vk::ExportMemoryAllocateInfo::default().handle_types(DMA_BUF);
        let size = vk::MemoryAllocateInfo::default().allocation_size(SIZE);
        let memory = device.allocate_memory(&size.push_next(&mut export), None).unwrap();
        let buffer = export_raw(&instance, &device, memory).unwrap();
        assert_eq!((buffer.size(), buffer.exporter_name().unwrap().as_str()), (SIZE, "udmabuf"));
        let plain = vk::MemoryAllocateInfo::default().allocation_size(SIZE);
        let plain = device.allocate_memory(&plain, None).unwrap();
        assert!(export_raw(&instance, &device, plain).is_err(), "it was not allocated for export");

        // The application's mapping shows the bytes that arrived.
        let peers = Peers::new();
        let other = heap(SIZE);
        other.map().unwrap().write(0, &pattern(SIZE as usize, 43)).unwrap();
        peers.write(&peers.register(&other), &peers.register(&buffer));
        let mapped = device.map_memory(memory, 0, SIZE, vk::MemoryMapFlags::empty()).unwrap();
        let seen = std::slice::from_raw_parts(mapped.cast::<u8>(), SIZE as usize).to_vec();
        assert_same(&seen, &pattern(SIZE as usize, 43), "the application's mapping");
        device.unmap_memory(memory);
        device.free_memory(plain, None);
        device.free_memory(memory, None);
        device.destroy_device(None);
        instance.destroy_instance(None);
    }
}

#[test]
fn the_exporter_gives_zeroed_memory_that_outlives_it() {
    let buffer = VULKAN.allocate(SIZE - 5).unwrap().dmabuf;
    assert_eq!(buffer.size(), SIZE);
    assert!(contents(&buffer).iter().all(|byte| *byte == 0));
    assert!(Exporter::name(&*VULKAN).starts_with("Vulkan llvmpipe"));
    assert_eq!(VULKAN.device(), None, "a processor is not on PCI");
}

#[test]
fn vulkan_refuses_with_exact_errors_and_leaves_nothing() {
    let buffer = VULKAN.buffer(4096).unwrap();
    // The loader closes a descriptor of the first device when a second one is destroyed.
    assert_refused!(Vulkan::by_name("no such"), Error::Pointer(PointerError::NoDevice { .. }));
    // Before the census: Mesa 25 itself leaks the memfd whose udmabuf was refused.
    {
        let _limit = Setting::new("/sys/module/udmabuf/parameters/size_limit_mb", "1");
        let refused = VULKAN.buffer(2 << 20);
        assert_refused!(refused, Error::OutOfMemory { requested: 0x20_0000, available: None, .. });
    }
    let census = Census::take();
    assert_refused!(VULKAN.buffer(0), Error::Range(RangeError::Empty { .. }));
    assert_refused!(VULKAN.buffer(u64::MAX), Error::SizeTooLarge { .. });
    assert_refused!(buffer.fill(..4097, 1), Error::Range(RangeError::OutOfRange { .. }));
    assert_refused!(Vulkan::by_name("no such"), Error::Pointer(PointerError::NoDevice { .. }));
    for _ in 0..10 {
        drop((buffer.export().unwrap(), VULKAN.buffer(SIZE).unwrap().export().unwrap()));
    }
    let before = fds();
    let exported: Vec<DmaBuf> = (0..3).map(|_| buffer.export().unwrap()).collect();
    assert_eq!((fds(), exported[0].id() == exported[2].id()), (before + 3, true));
    drop(exported);
    census.assert_unchanged();
}

/// Lavapipe lists the extension all the same, so the library has to ask the device.
#[test]
fn lavapipe_without_udmabuf_says_what_it_needs() {
    let refused = unprivileged(|| Vulkan::load().map(drop));
    let message = assert_refused!(refused, Error::NotPermitted { .. });
    assert!(message.contains("no permission to open /dev/udmabuf: lavapipe"), "{message}");
}

#[test]
fn linear_images_of_gbm_are_writable_and_cross_the_wire() {
    let peers = Peers::new();
    for driver in ["virtio_gpu", "vgem"] {
        card(driver);
        let gbm = Gbm::by_driver(driver).unwrap();
        let (image, stride) = gbm.image(333, 77).unwrap();
        let size = image.size();
        assert!(
            stride >= 333 * 4 && size >= 77 * u64::from(stride),
            "{driver}: stride {stride}, {size} bytes"
        );
        assert!(image.is_writable(), "{driver}: libgbm's own export is not");
        let source = heap(size);
        let put = pattern(size as usize, 51);
        source.map().unwrap().write(0, &put).unwrap();
        peers.write(&peers.register(&source), &peers.register(&image));
        assert_same(&contents(&image), &put, driver);
        assert_refused!(gbm.image(0, 5), Error::Range(RangeError::Empty { .. }));
        let made = gbm.allocate(100_000).unwrap().dmabuf;
        // Drivers also pad rows: virtio_gpu's makes 256 KiB of this.
        assert!(made.size() >= 100_000 && made.size() <= 256 << 10, "{driver}: {}", made.size());
    }
    assert_refused!(Gbm::open("/dev/dri/card63"), Error::Missing { .. });
    assert_refused!(Gbm::open("/dev/null"), Error::Unusable { .. });
}
